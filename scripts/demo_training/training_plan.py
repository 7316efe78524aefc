"""What is trained, at which sizes, and how long: the full plan and a tiny one for a CPU check."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

Size = tuple[int, int]  # height, width


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes and amounts of one training.

    Attributes:
        square: The default frame.
        wide, tall, large: Frames unlike it.
        small: Frames that the VAE sees first.
        small_batch: Their windows in a batch.
        medium: Frames that it sees next.
        medium_batch: Likewise.
        crop: Side of the crops that the VAE sees now and then.
        crop_batch: Crops in a batch.
        square_batch: Whole frames' windows in a batch.
        clips: Rendered clips of a size that the VAE's windows are cut from.
        batch_of: Clips in a transformer batch, by number of frames, at the default frame.
        large_batch_of: Likewise at the largest frame.
        encode_batch: Clips that are rendered and encoded at once.
        transformer: Arguments of the transformer.
        eval_clips: Held-out clips that the VAE is measured on.
        inference_steps: Denoising steps of the pictures at the end.
        report_every: Seconds between two progress lines.
    """

    square: Size = (256, 256)
    wide: Size = (128, 512)
    tall: Size = (512, 128)
    large: Size = (512, 512)
    small: Size = (64, 64)
    small_batch: int = 8
    medium: Size = (128, 128)
    medium_batch: int = 4
    crop: int = 128
    crop_batch: int = 12
    square_batch: int = 2
    clips: int = 96
    batch_of: dict[int, int] = field(default_factory=lambda: {17: 36, 33: 20, 65: 10})
    large_batch_of: dict[int, int] = field(default_factory=lambda: {17: 9, 33: 5, 65: 3})
    encode_batch: int = 4
    eval_clips: int = 24
    inference_steps: int = 25
    report_every: float = 10.0
    transformer: dict[str, object] = field(
        default_factory=lambda: {
            "num_attention_heads": 2,
            "attention_head_dim": 128,
            "num_layers": 2,
            "num_single_layers": 5,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "rope_axes_dim": (16, 56, 56),
        }
    )


SMOKE = Plan(
    square=(64, 64),
    wide=(32, 128),
    tall=(128, 32),
    large=(80, 80),
    small=(32, 32),
    small_batch=2,
    medium=(48, 48),
    medium_batch=2,
    crop=16,
    crop_batch=1,
    square_batch=1,
    clips=3,
    batch_of={17: 2, 33: 2, 65: 1},
    large_batch_of={17: 1, 33: 1, 65: 1},
    encode_batch=2,
    eval_clips=1,
    inference_steps=1,
    report_every=1.0,
    transformer={
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "rope_axes_dim": (8, 12, 12),
    },
)


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """One call of the training script.

    Attributes:
        stage: `vae`, `decoder`, `text`, `transformer` or `package`.
        work_dir: Checkpoints, reports and pictures.
        started: Wall clock when the process began.
        seconds: Wall seconds that this call may take.
        total_seconds: Training seconds of the stage over all its calls; this call alone if None.
        resume: Whether to go on from the stage's checkpoint.
        start_from: A finished model whose weights the stage begins with; random ones if None.
        seed: Of everything random.
        device: Where to train.
        plan: The sizes.
    """

    stage: str
    work_dir: Path
    started: float
    seconds: float
    total_seconds: float | None
    resume: bool
    start_from: Path | None
    seed: int
    device: torch.device
    plan: Plan

    @property
    def is_smoke(self) -> bool:
        return self.plan is SMOKE

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and activations in training; the CPU is slow at bfloat16."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def elapsed(self) -> float:
        """Wall seconds since the process began."""
        return time.time() - self.started

    def log(self, text: str) -> None:
        """Print a line with the time since the process began."""
        print(f"[{self.elapsed:6.1f} s] {text}", flush=True)


@dataclass(slots=True)
class Clock:
    """Where a stage stands in its schedule, which runs in training seconds over several calls."""

    total: float
    before: float
    deadline: float
    begun: float

    @classmethod
    def begin(cls, job: TrainingJob, before: float, reserve: float) -> "Clock":
        """Start counting; training ends ``reserve`` seconds before the call's limit."""
        deadline = job.started + job.seconds - reserve
        now = time.time()
        total = job.total_seconds
        if total is None:
            total = before + max(deadline - now, 1.0)
        return cls(total=total, before=before, deadline=deadline, begun=now)

    @property
    def spent(self) -> float:
        """Training seconds so far, in all calls."""
        return self.before + time.time() - self.begun

    @property
    def fraction(self) -> float:
        """Share of the schedule behind us."""
        return min(1.0, self.spent / self.total)

    @property
    def planned_fraction(self) -> float:
        """Share of the schedule that will be behind us when this call ends."""
        return min(1.0, (self.before + self.deadline - self.begun) / self.total)

    @property
    def is_over(self) -> bool:
        return self.spent >= self.total or time.time() >= self.deadline

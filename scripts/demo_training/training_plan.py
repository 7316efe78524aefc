"""The plan of a training, its sizes and durations, and a tiny plan for a check on a CPU."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

Size = tuple[int, int]  # height, width


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes and amounts of one training.

    Attributes:
        square: The default frame size.
        wide, tall, large: The other frame sizes.
        small: Frame size with which the VAE's training begins.
        small_batch: Windows in a batch of this size.
        medium: Frame size that follows.
        medium_batch: Windows in a batch of this size.
        crop: Side of the crops in some of the VAE's batches.
        crop_batch: Crops in a batch.
        square_batch: Windows in a batch of whole frames.
        clips: Number of rendered clips of a size, from which the VAE's windows are cut.
        batch_of: {frames: clips in a transformer batch} at the default frame size.
        large_batch_of: The same at the largest frame size.
        encode_batch: Clips that are rendered and encoded at once.
        transformer: Arguments of the transformer.
        eval_clips: Number of held-out clips on which the VAE is measured.
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
        work_dir: Folder of checkpoints, reports and pictures.
        started: Wall clock time at which the process began.
        seconds: Wall seconds that this call may take.
        total_seconds: Training seconds of the stage over all its calls; None means only this call.
        resume: Whether to continue from the stage's checkpoint.
        start_from: A finished model with whose weights the stage begins; None means random ones.
        seed: Seed of everything random.
        device: The device to train on.
        plan: The sizes of the training.
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
        """Dtype of weights and activations in training; float32 on a CPU, slow at bfloat16."""
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
    """Position of a stage in its schedule, which counts training seconds over several calls."""

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
        """Fraction of the schedule that is done."""
        return min(1.0, self.spent / self.total)

    @property
    def planned_fraction(self) -> float:
        """Fraction of the schedule that will be done when this call ends."""
        return min(1.0, (self.before + self.deadline - self.begun) / self.total)

    @property
    def is_over(self) -> bool:
        return self.spent >= self.total or time.time() >= self.deadline

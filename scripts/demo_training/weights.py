"""Trained weights: half-precision working copies, float32 masters, a moving average, checkpoints.

A checkpoint is split into parts under 15 MB. It holds weights, moving average, random states and
the position in the schedule, but not the optimiser's moments. A resumed stage starts these anew
with a short warm-up, which costs a few seconds and keeps the files small.
"""

import io
import json
import random
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from demo_training.training_plan import Clock, TrainingJob
from xattn_video.files import atomic_path, write_json

PART_BYTES = 14 * 1024 * 1024


class TrainedWeights:
    """The parameters of some modules and how they are updated.

    Args:
        modules: The modules, on their device in float32; they are converted to ``dtype``.
        dtype: Dtype of the working copies.
        stored_dtype: Dtype of weights and average in a checkpoint.
        betas: Betas of AdamW.
        weight_decay: Weight decay of every optimiser.
        ema_decay: Decay of the moving average, reached after a ramp.
        matrices: Parameters of the modules that Muon updates; AdamW updates the others.
        matrix_rate: Muon's learning rate over AdamW's.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        *,
        dtype: torch.dtype,
        stored_dtype: torch.dtype,
        betas: tuple[float, float],
        weight_decay: float,
        ema_decay: float,
        matrices: Sequence[nn.Parameter] = (),
        matrix_rate: float = 1.0,
    ) -> None:
        parameters = [p for module in modules for p in module.parameters()]
        for_muon = {id(matrix) for matrix in matrices}
        by_muon = [id(p) in for_muon for p in parameters]
        self.masters = [nn.Parameter(p.detach().clone().float()) for p in parameters]
        self.ema = [p.detach().clone() for p in self.masters]
        for module in modules:
            module.to(dtype)
        self.parameters = [p for module in modules for p in module.parameters()]
        self.stored_dtype = stored_dtype
        self.ema_decay = ema_decay
        self.step_count = 0
        self.steps_since_start = 0
        others = [m for m, muon in zip(self.masters, by_muon, strict=True) if not muon]
        adamw = torch.optim.AdamW(
            others, lr=0.0, betas=betas, weight_decay=weight_decay, fused=others[0].is_cuda
        )
        # Each with its learning rate as a multiple of the argument of `step`.
        self.optimisers: list[tuple[torch.optim.Optimizer, float]] = [(adamw, 1.0)]
        if matrices:
            chosen = [m for m, muon in zip(self.masters, by_muon, strict=True) if muon]
            muon = torch.optim.Muon(
                chosen, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self.optimisers.append((muon, matrix_rate))

    def step(self, learning_rate: float, warmup_steps: int) -> Tensor:
        """Update from the working copies' gradients; returns their norm before clipping."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self.steps_since_start += 1
        self.step_count += 1
        warmup = min(1.0, self.steps_since_start / warmup_steps)
        norm = nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        for optimiser, rate in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * learning_rate * warmup
            optimiser.step()
        masters = [master.detach() for master in self.masters]
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in self.parameters], masters)
            decay = min(self.ema_decay, (1 + self.step_count) / (20 + self.step_count))
            torch._foreach_lerp_(self.ema, masters, 1 - decay)
        return norm

    @torch.no_grad()
    def show_average(self) -> None:
        """Copy the moving average into the modules."""
        torch._foreach_copy_([p.detach() for p in self.parameters], self.ema)

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint."""
        return {
            "weights": [w.detach().to("cpu", self.stored_dtype) for w in self.masters],
            "ema": [w.to("cpu", self.stored_dtype) for w in self.ema],
            "step_count": self.step_count,
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Load a checkpoint's weights."""
        for own, stored in ((self.masters, state["weights"]), (self.ema, state["ema"])):
            for target, source in zip(own, stored, strict=True):
                target.copy_(source)
        torch._foreach_copy_([p.detach() for p in self.parameters], list(self.masters))
        self.step_count = state["step_count"]


def random_state() -> dict[str, Any]:
    """The state of every random generator."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every random generator to a state from `random_state`."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _saved(state: Any) -> bytes:
    """The bytes of torch.save, which on a full disk would not say which file it cannot write."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def save_state(path: Path, state: Any) -> None:
    """Write tensors for `torch.load`, completely or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(_saved(state))


def save_checkpoint(directory: Path, name: str, state: dict[str, Any]) -> list[Path]:
    """Write `name.ckpt.0`, `name.ckpt.1`, ... of at most `PART_BYTES` each."""
    data = _saved(state)
    parts = []
    # The old parts stay until all new parts are written.
    with ExitStack() as stack:
        for index, start in enumerate(range(0, len(data), PART_BYTES)):
            parts.append(directory / f"{name}.ckpt.{index}")
            temporary = stack.enter_context(atomic_path(parts[-1]))
            temporary.write_bytes(data[start : start + PART_BYTES])
    for old in set(directory.glob(f"{name}.ckpt.*")) - set(parts):
        old.unlink()
    return parts


def save_stage(
    job: TrainingJob,
    trained: TrainedWeights,
    clock: Clock,
    calls: int,
    history: list[dict[str, Any]],
) -> None:
    """Write the checkpoint from which the stage can resume."""
    state = {
        "weights": trained.state(),
        "random": random_state(),
        "spent": clock.spent,
        "calls": calls,
        "history": history,
    }
    save_checkpoint(job.work_dir, job.stage, state)


def load_checkpoint(directory: Path, name: str) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote.

    Raises:
        FileNotFoundError: There is no such checkpoint.
    """
    parts = sorted(directory.glob(f"{name}.ckpt.*"), key=lambda path: int(path.suffix[1:]))
    if not parts:
        raise FileNotFoundError(
            f"no checkpoint of {name!r} in {directory}, expected {name}.ckpt.0; "
            "run its stage first, or copy the files of the earlier call there."
        )
    data = b"".join(part.read_bytes() for part in parts)
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


@torch.no_grad()
def load_weights(module: nn.Module, folder: Path) -> None:
    """Copy a saved model's weights, in one file or several, into ``module``."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no .safetensors; give a finished model's folder.")
    state = {name: value for path in paths for name, value in load_file(path).items()}
    module.load_state_dict(state)


def inherit_reports(directory: Path, model_dir: Path) -> None:
    """Begin `training.json` with the training calls of a finished model."""
    path = directory / "training.json"
    if not path.is_file():
        calls = json.loads((model_dir / "TRAINING.json").read_text())["calls"]
        write_json(path, calls)


def add_report(directory: Path, entry: dict[str, Any]) -> None:
    """Append the record of a call, and its GPU, to `training.json`."""
    entry["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    path = directory / "training.json"
    entries = json.loads(path.read_text()) if path.is_file() else []
    write_json(path, [*entries, entry])

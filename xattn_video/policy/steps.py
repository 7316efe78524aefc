"""Which denoising step a forward pass of the transformer belongs to."""

from dataclasses import dataclass

import torch

_EXACT_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """What is read from the arguments of a forward pass, in one transfer from the device.

    Args:
        timestep: The timestep of the first item.
        timestep_dtype: Its dtype; in bfloat16 several steps can share one rounded timestep.
        latent_shape: `[C, T, H, W]` of an item; the batch is the number of ``text_lengths``.
        latent_sample: Some latents of the first item; they are the same in all passes of a step.
        text_sample: Some values of all items' text; they differ between the passes of a step.
        text_lengths: Valid text tokens of each item.
        text_tokens: Text tokens of an item, padding included.
        device: Device of the latents.
        dtype: Dtype of the latents.
        needs_grad: Whether gradients are enabled and an input or parameter of the model needs one.
        lora_scale: Scale of the LoRA adapters in this pass.
    """

    timestep: float
    timestep_dtype: torch.dtype
    latent_shape: tuple[int, ...]
    latent_sample: tuple[float, ...]
    text_sample: tuple[float, ...]
    text_lengths: tuple[int, ...]
    text_tokens: int
    device: torch.device
    dtype: torch.dtype
    needs_grad: bool
    lora_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class SchedulerStep:
    """The step of a forward pass according to the scheduler of a running pipeline.

    Args:
        index: Steps that the scheduler has taken in this generation; None before the first.
        same_iteration: Whether the pipeline's loop has not advanced since the last forward pass.
    """

    index: int | None
    same_iteration: bool = False


class StepTracker:
    """Counts denoising steps by the pipeline's scheduler if known, else by the model's inputs.

    If the scheduler has taken no step yet, a generation begins, except at the guidance pass in the
    same iteration of the pipeline's loop; afterwards the scheduler's count is the step.

    Without a scheduler, the timestep decides. The same timestep is the same step (true
    classifier-free guidance calls the model twice), a lower timestep is the next step, and a
    higher timestep or another latent shape starts a new generation. The same timestep with other
    latents is the next step, because neighbouring steps can have equal timesteps: after rounding
    to bfloat16, and with some schedulers.

    At the first step, only the text then tells the guidance pass from a new run with the same
    noise. A run with another prompt, after one that stopped there, is taken for the guidance pass:
    steps stay right, but the report also lists the earlier pass. Call `reset()` to avoid this. A
    guidance pass with the same text is taken for a new run.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the generation: the next forward pass is step 0."""
        self._first: ForwardInputs | None = None
        self._last: ForwardInputs | None = None
        self.step: int | None = None
        self.forward_pass = 0

    def observe(self, inputs: ForwardInputs, scheduler: SchedulerStep | None = None) -> bool:
        """Count one forward pass; return True if it starts a new generation.

        Args:
            inputs: The inputs of the forward pass.
            scheduler: The step according to the scheduler; None if no pipeline is known.
        """
        first, last, self._last = self._first, self._last, inputs
        if first is None or last is None or self.step is None:
            return self._start(inputs, scheduler)
        if scheduler is None or _stands_still(scheduler, last, inputs, self.step):
            scheduler = None
            starts = _starts_generation(first, last, inputs, self.step)
            step = self.step + (not _continues_step(last, inputs))
        elif scheduler.index is None:
            starts = self.step > 0 or not _is_second_pass(last, inputs, scheduler)
            step = 0
        else:
            starts = False
            step = scheduler.index
        if starts:
            return self._start(inputs, scheduler)
        self.forward_pass = self.forward_pass + 1 if step == self.step else 0
        self.step = step
        return False

    def _start(self, inputs: ForwardInputs, scheduler: SchedulerStep | None) -> bool:
        self._first = inputs
        self.step = 0 if scheduler is None else scheduler.index or 0
        self.forward_pass = 0
        return True


def _stands_still(
    scheduler: SchedulerStep, last: ForwardInputs, inputs: ForwardInputs, step: int
) -> bool:
    """Whether the scheduler is no longer used: its count stays while the timesteps change."""
    if scheduler.index is None:
        return False
    before, now = _comparable(last, inputs)
    return scheduler.index < step or (scheduler.index == step and now != before)


def _is_second_pass(last: ForwardInputs, inputs: ForwardInputs, scheduler: SchedulerStep) -> bool:
    """Whether ``inputs`` belong to the second guidance pass of the pipeline's first step."""
    # Another pipeline may run the transformer after an exception stopped this one.
    return (
        scheduler.same_iteration
        and inputs.latent_shape == last.latent_shape
        and inputs.latent_sample == last.latent_sample
        and len(inputs.text_lengths) == len(last.text_lengths)
    )


def _starts_generation(
    first: ForwardInputs, last: ForwardInputs, inputs: ForwardInputs, step: int
) -> bool:
    """Whether a generation starts here; ``first`` and ``last`` belong to the previous one."""
    before, now = _comparable(last, inputs)
    # After a generation of one step; the second guidance pass would have other texts, as many.
    starts_over = (
        inputs.latent_sample != last.latent_sample
        or inputs.text_sample == first.text_sample
        or len(inputs.text_lengths) != len(last.text_lengths)
    )
    # A pipeline's first timestep is float32, the later ones have the model's dtype. One that is
    # float32 in the middle, as a callback can make it, is lower than the first.
    is_first_again = (
        _are_exact(inputs)
        and not _are_exact(last)
        and now >= _rounded(first.timestep, last.timestep_dtype)
    )
    return (
        inputs.latent_shape != last.latent_shape
        or now > before
        or is_first_again
        or (_are_exact(last, inputs) and now == before and step == 0 and starts_over)
    )


def _continues_step(last: ForwardInputs, inputs: ForwardInputs) -> bool:
    """Whether ``inputs`` belong to the same step as ``last``."""
    before, now = _comparable(last, inputs)
    return now == before and inputs.latent_sample == last.latent_sample


def _comparable(last: ForwardInputs, inputs: ForwardInputs) -> tuple[float, float]:
    """Both timesteps, rounded to the lower of their two precisions."""
    coarser = last if _are_exact(inputs) and not _are_exact(last) else inputs
    dtype = coarser.timestep_dtype
    return _rounded(last.timestep, dtype), _rounded(inputs.timestep, dtype)


def _are_exact(*inputs: ForwardInputs) -> bool:
    """Whether the dtype gives every step a distinct timestep."""
    return all(one.timestep_dtype in _EXACT_DTYPES for one in inputs)


def _rounded(timestep: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(timestep, dtype=torch.float64).to(dtype))

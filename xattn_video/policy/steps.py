"""Which denoising step a forward pass of the transformer belongs to."""

from dataclasses import dataclass

import torch

_EXACT_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """What is read of a forward pass's arguments, in one transfer from the device.

    Args:
        timestep: The first item's.
        timestep_dtype: In bfloat16 several steps share one rounded timestep.
        latent_shape: `[C, T, H, W]`.
        latent_sample: A few latents of the first item: the passes of one step share them.
        text_sample: A few of its text embedding: the passes of one step differ in them.
        text_lengths: Valid text tokens of each item.
        text_tokens: Text tokens of an item, padding included.
        device: Of the latents.
        dtype: Of the latents.
        needs_grad: Whether gradients are on, and an input or a parameter of the model needs them.
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


@dataclass(frozen=True, slots=True)
class SchedulerStep:
    """What a running pipeline's scheduler says of the step that a forward pass belongs to.

    Args:
        index: Steps that the scheduler has taken in this generation; None before the first.
    """

    index: int | None


class StepTracker:
    """Counts steps by the pipeline's scheduler where it tells, else by what the model is given.

    A scheduler that has taken no step yet begins a generation; later its count is the step.
    Without one the timestep decides: the same is the same step (true classifier-free guidance
    calls twice), a lower one the next step, a higher one a new generation, and so is another
    latent shape. Equal timesteps with other latents are the next step: rounded to bfloat16
    neighbouring steps may share one, and so they may with some schedulers.

    Same latents with another text, at the first timestep again, are taken for guidance's second
    pass. Where they are a new generation instead, after one that stopped at its first step, the
    steps are right all the same, and the report holds the pass of the one before as well.
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
        """Count one forward pass; True where a new generation starts with it.

        Args:
            inputs: Of the forward pass.
            scheduler: What the scheduler of a running pipeline says; None where there is none.
        """
        first, last, self._last = self._first, self._last, inputs
        if first is None or last is None or self.step is None:
            return self._start(inputs, scheduler)
        if scheduler is None or _stands_still(scheduler, last, inputs, self.step):
            scheduler = None
            starts = _starts_generation(first, last, inputs, self.step)
            step = self.step + (not _continues_step(last, inputs))
        elif scheduler.index is None:
            starts = self.step > 0 or not _is_second_pass(first, last, inputs)
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
    """Whether nobody steps the scheduler any more: it stays while timesteps go on."""
    if scheduler.index is None:
        return False
    before, now = _comparable(last, inputs)
    return scheduler.index < step or (scheduler.index == step and now != before)


def _is_second_pass(first: ForwardInputs, last: ForwardInputs, inputs: ForwardInputs) -> bool:
    """Whether ``inputs`` are guidance's second pass of the first step."""
    before, now = _comparable(last, inputs)
    return (
        now == before
        and inputs.latent_shape == last.latent_shape
        and inputs.latent_sample == last.latent_sample
        and inputs.text_sample != first.text_sample
    )


def _starts_generation(
    first: ForwardInputs, last: ForwardInputs, inputs: ForwardInputs, step: int
) -> bool:
    """Whether a generation starts here; ``first`` and ``last`` are of the one before."""
    before, now = _comparable(last, inputs)
    # After a generation of one step; guidance's second pass has another text.
    starts_over = (
        inputs.latent_sample != last.latent_sample or inputs.text_sample == first.text_sample
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
    """Whether ``inputs`` are of the same step as ``last``."""
    before, now = _comparable(last, inputs)
    return now == before and inputs.latent_sample == last.latent_sample


def _comparable(last: ForwardInputs, inputs: ForwardInputs) -> tuple[float, float]:
    """Both timesteps in the coarser of their precisions."""
    coarser = last if _are_exact(inputs) and not _are_exact(last) else inputs
    dtype = coarser.timestep_dtype
    return _rounded(last.timestep, dtype), _rounded(inputs.timestep, dtype)


def _are_exact(*inputs: ForwardInputs) -> bool:
    """Whether steps of their own have timesteps of their own."""
    return all(one.timestep_dtype in _EXACT_DTYPES for one in inputs)


def _rounded(timestep: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(timestep, dtype=torch.float64).to(dtype))

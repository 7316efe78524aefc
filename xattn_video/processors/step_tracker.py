"""Which denoising step a forward pass of the transformer belongs to."""

import inspect
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

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


def read_inputs(
    transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ForwardInputs | None:
    """The inputs of a HunyuanVideo transformer's forward, or None where one is missing."""
    signature = inspect.signature(type(transformer).forward)
    given = signature.bind_partial(transformer, *args, **kwargs).arguments
    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
    if not all(isinstance(given.get(name), Tensor) for name in names):
        return None
    latents, timestep, text, mask = (given[name] for name in names)
    parts = (
        timestep.flatten()[:1],
        mask.sum(dim=1, dtype=torch.int),
        # Channel 0 of the last frame holds noisy latents in every variant of the model.
        latents[0, 0, -1].flatten()[:64],
        # One feature of every token: prompts may begin alike.
        text[0, :, 0],
    )
    read = torch.cat([part.detach().to(latents.device, torch.float32) for part in parts])
    values = iter(read.tolist())
    first, lengths, latent_sample, text_sample = (
        tuple(itertools.islice(values, len(part))) for part in parts
    )
    return ForwardInputs(
        timestep=first[0],
        timestep_dtype=timestep.dtype,
        latent_shape=tuple(latents.shape[1:]),
        latent_sample=latent_sample,
        text_sample=text_sample,
        text_lengths=tuple(int(length) for length in lengths),
        text_tokens=mask.shape[1],
        device=latents.device,
        dtype=latents.dtype,
        needs_grad=torch.is_grad_enabled() and _any_needs_grad(transformer, given.values()),
    )


def _any_needs_grad(transformer: nn.Module, given: Iterable[object]) -> bool:
    tensors = (one for one in given if isinstance(one, Tensor))
    return any(one.requires_grad for one in itertools.chain(tensors, transformer.parameters()))


class StepTracker:
    """Counts steps from what the transformer is given.

    The same timestep is the same step (true classifier-free guidance calls twice), a lower one the
    next step, a higher one a new generation, and so is another latent shape. Where the timestep is
    rounded to bfloat16 or float16, as Diffusers' pipelines do, neighbouring steps may share it;
    then other latents mean the next step.

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

    def observe(self, inputs: ForwardInputs) -> bool:
        """Count one forward pass; True where a new generation starts with it."""
        first, last, self._last = self._first, self._last, inputs
        if (
            first is None
            or last is None
            or self.step is None
            or _starts_generation(first, last, inputs, self.step)
        ):
            self._first = inputs
            self.step = self.forward_pass = 0
            return True
        if _continues_step(last, inputs):
            self.forward_pass += 1
        else:
            self.step += 1
            self.forward_pass = 0
        return False


class Observer(Protocol):
    """What a `StepHook` reports to."""

    def begin_forward(self, transformer: nn.Module, inputs: ForwardInputs) -> None:
        """Prepare for a forward pass."""

    def serves(self, transformer: nn.Module) -> bool:
        """Whether a layer of the transformer still uses the processor."""

    def unbind(self, transformer: nn.Module) -> None:
        """Leave a transformer that does not."""


class StepHook:
    """Tells a processor of every forward pass, before it starts.

    A class, not a closure, so that it pickles, and so that a deep copy of the transformer brings a
    hook that belongs to the copy's processor.
    """

    def __init__(self, processor: Observer) -> None:
        self.processor = processor

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self.processor.serves(transformer):
            self.remove_from(transformer)
            self.processor.unbind(transformer)
            return
        inputs = read_inputs(transformer, args, kwargs)
        # Without its arguments the forward itself raises.
        if inputs is not None:
            self.processor.begin_forward(transformer, inputs)

    @classmethod
    def of(cls, processor: Observer, transformer: nn.Module) -> "StepHook":
        """The processor's hook on the transformer, registered if there is none yet."""
        for hook in transformer._forward_pre_hooks.values():
            if isinstance(hook, cls) and hook.processor is processor:
                return hook
        new = cls(processor)
        transformer.register_forward_pre_hook(new, with_kwargs=True)
        return new

    def remove_from(self, transformer: nn.Module) -> None:
        """Unregister, on a deep copy of the transformer too, which a hook's handle cannot."""
        for number, hook in list(transformer._forward_pre_hooks.items()):
            if hook is self:
                del transformer._forward_pre_hooks[number]
                transformer._forward_pre_hooks_with_kwargs.pop(number, None)


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
    same_latents = inputs.latent_sample == last.latent_sample
    return now == before and (_are_exact(last, inputs) or same_latents)


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

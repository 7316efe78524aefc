"""Computes losses and gradients with CUDA graphs.

A training step of the demo model's parts is about a thousand short kernels. Launching them one by
one from Python takes twice as long as running them.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Compute = Callable[..., tuple[Tensor, ...]]
# A limit, so that the host does not queue minutes of steps and mislead the clock of a stage.
STEPS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class _Recording:
    """A CUDA graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    gradients: list[Tensor | None]


class StepGraphs:
    """Computes losses and gradients; on a GPU each kind of batch is recorded at its second use.

    Args:
        parameters: The parameters to compute gradients for, on their device.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._recordings: dict[Hashable, _Recording | None] = {}
        self._stream = torch.cuda.Stream() if self._parameters[0].is_cuda else None
        # All graphs share memory, because no result is read after the next graph has run.
        self._pool = torch.cuda.graph_pool_handle() if self._stream else None
        self._running: deque[torch.cuda.Event] = deque()

    def run(self, kind: Hashable, compute: Compute, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute a loss and set the parameters' gradients.

        Args:
            kind: Key for the shapes of ``inputs`` and everything else that ``compute`` reads.
            compute: Function that returns the loss first; it draws new random numbers each time.
            inputs: Tensors on the parameters' device.

        Returns:
            The detached results of ``compute``.
        """
        if self._stream is None:
            return _backward(compute, inputs)
        while len(self._running) >= STEPS_AHEAD:
            self._running.popleft().synchronize()
        if kind in self._recordings:
            results = self._replay(kind, compute, inputs)
        else:
            # Libraries choose kernels in this first run, which they cannot do during recording.
            self._recordings[kind] = None
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                results = _backward(compute, inputs)
            current.wait_stream(self._stream)
        event = torch.cuda.Event()
        event.record()
        self._running.append(event)
        return results

    def _replay(
        self, kind: Hashable, compute: Compute, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        recording = self._recordings[kind]
        if recording is None:
            recording = self._recordings[kind] = self._record(compute, inputs)
        for recorded, given in zip(recording.inputs, inputs, strict=True):
            recorded.copy_(given)
        recording.graph.replay()
        for parameter, gradient in zip(self._parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        return tuple(result.clone() for result in recording.results)

    def _record(self, compute: Compute, inputs: tuple[Tensor, ...]) -> _Recording:
        inputs = tuple(value.clone() for value in inputs)
        for parameter in self._parameters:
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            results = _backward(compute, inputs)
        return _Recording(graph, inputs, results, [p.grad for p in self._parameters])


def _backward(compute: Compute, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run ``compute`` and the backward pass of its loss; returns the results of ``compute``."""
    results = compute(*inputs)
    results[0].backward()
    return tuple(result.detach() for result in results)

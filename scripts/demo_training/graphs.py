"""Losses and gradients replayed as CUDA graphs.

A step of the demo's models is some thousand short kernels; launched one by one from Python they
take twice as long as they run.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Compute = Callable[..., tuple[Tensor, ...]]
# Or the host queues steps for minutes ahead, and the clock of a stage is wrong.
STEPS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class _Recording:
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    gradients: list[Tensor | None]


class StepGraphs:
    """Computes losses and gradients; on a GPU each kind of batch is recorded at its second use.

    Args:
        parameters: Whose gradients are wanted, on their device.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._recordings: dict[Hashable, _Recording | None] = {}
        self._stream = torch.cuda.Stream() if self._parameters[0].is_cuda else None
        # All graphs share their memory: none is read after the next one has run.
        self._pool = torch.cuda.graph_pool_handle() if self._stream else None
        self._running: deque[torch.cuda.Event] = deque()

    def run(self, kind: Hashable, compute: Compute, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Set the parameters' gradients of a loss.

        Args:
            kind: Stands for the shapes of ``inputs`` and for all else that ``compute`` reads.
            compute: Gives the loss first; random numbers are drawn anew in each run.
            inputs: On the parameters' device.

        Returns:
            What ``compute`` gives, without its history.
        """
        if self._stream is None:
            return _backward(compute, inputs)
        while len(self._running) >= STEPS_AHEAD:
            self._running.popleft().synchronize()
        if kind in self._recordings:
            results = self._replay(kind, compute, inputs)
        else:
            # Libraries choose their kernels here, which they cannot while a graph is recorded.
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
    """What ``compute`` gives, after the gradients of its loss."""
    results = compute(*inputs)
    results[0].backward()
    return tuple(result.detach() for result in results)

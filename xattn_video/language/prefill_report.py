"""The report of a language model's attention, sparse or dense, by layer and by forward pass."""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from xattn_video.files import write_json

SPARSE = "sparse"


@dataclass(frozen=True, slots=True)
class LayerPrefill:
    """One layer over all forward passes.

    Attributes:
        layer: Number of the layer, from 0; None if it has none, as in a vision tower.
        sparse: How often it ran sparse.
        dense: How often it ran dense, by reason.
        kept: Blocks computed in its sparse runs, over batch and heads.
        valid: Blocks that dense attention would have computed in these runs.
    """

    layer: int | None
    sparse: int
    dense: dict[str, int]
    kept: int
    valid: int

    @property
    def density(self) -> float | None:
        """Kept over valid blocks; None if it never ran sparse."""
        return self.kept / self.valid if self.valid else None


@dataclass(frozen=True, slots=True)
class ForwardCount:
    """Forward passes with the same decision, counted by kind of layer.

    Attributes:
        decision: ``"sparse"``, or why attention ran dense.
        forwards: Number of forward passes.
        tokens: Number of their input tokens. The padding of an item counts, unless the item has
            nothing else in the forward pass.
    """

    decision: str
    forwards: int
    tokens: int


@dataclass(frozen=True, slots=True)
class PrefillReport:
    """What attention did since it was enabled.

    In a model with two kinds of layers, such as full and sliding, a forward pass counts once for
    each kind. A batch in which some items have too few tokens counts as sparse and as dense, each
    with the tokens of its items; a layer that runs such a batch counts both, too.

    Attributes:
        forwards: The forward passes, by decision.
        layers: What each layer did, by number.
        backends: The backends of the sparse layers.
        num_refused: Layer runs that were refused; each raised an error.
        compiled: Whether torch.compile ran some attention, dense; those runs are not counted.
    """

    forwards: tuple[ForwardCount, ...]
    layers: tuple[LayerPrefill, ...]
    backends: tuple[str, ...]
    num_refused: int
    compiled: bool

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers that ran sparse at least once, ascending."""
        return tuple(one.layer for one in self.layers if one.sparse and one.layer is not None)

    @property
    def density(self) -> float | None:
        """Kept over valid blocks of all sparse layer runs; None if there were none."""
        valid = sum(one.valid for one in self.layers)
        return sum(one.kept for one in self.layers) / valid if valid else None

    @property
    def sparse_tokens(self) -> int:
        """Input tokens of the sparse forward passes; none if no layer could follow."""
        if not any(one.sparse for one in self.layers):
            return 0
        return sum(one.tokens for one in self.forwards if one.decision == SPARSE)

    @property
    def dense_reasons(self) -> dict[str, int]:
        """{reason: number of layer runs} for the layers that ran dense."""
        reasons: Counter[str] = Counter()
        for one in self.layers:
            reasons.update(one.dense)
        return dict(reasons)

    def layer_densities(self) -> dict[int, float | None]:
        """{layer: kept over valid blocks}; None for a layer that never ran sparse."""
        return {one.layer: one.density for one in self.layers if one.layer is not None}

    def summary(self) -> str:
        """One line, such as "32/32 layers sparse over 32,768 tokens, density 0.21, 0 refused"."""
        if not self.layers and not self.compiled:
            return f"nothing has run, {self.num_refused} refused"
        numbered = sum(one.layer is not None for one in self.layers)
        layers = f"{len(self.sparse_layers)}/{numbered} layers"
        others = sum(one.sparse for one in self.layers if one.layer is None)
        if others:
            # Towers and shared layers.
            runs = f"{others} run{'s' * (others > 1)} of layers without a number"
            layers = f"{layers} and {runs}" if numbered else runs
        parts = [f"{layers} sparse over {self.sparse_tokens:,} tokens"]
        if self.density is not None:
            parts.append(f"density {self.density:.2f}")
        if self.dense_reasons:
            runs = ", ".join(f"{reason} {count}" for reason, count in self.dense_reasons.items())
            parts.append(f"layer runs that were dense: {runs}")
        if self.compiled:
            parts.append("compiled code ran dense and is not counted")
        return ", ".join([*parts, f"{self.num_refused} refused"])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "summary": self.summary(),
            "density": self.density,
            "sparse_tokens": self.sparse_tokens,
            "backends": list(self.backends),
            "num_refused": self.num_refused,
            "compiled": self.compiled,
            "dense_reasons": self.dense_reasons,
            "forwards": [asdict(one) for one in self.forwards],
            "layers": [
                {
                    "layer": one.layer,
                    "sparse": one.sparse,
                    "dense": one.dense,
                    "density": one.density,
                }
                for one in self.layers
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write the report as JSON; raises FileNotWrittenError if that fails."""
        write_json(path, self.to_dict())


@dataclass(slots=True)
class _LayerTally:
    sparse: int = 0
    dense: Counter[str] = field(default_factory=Counter)
    kept: Tensor | None = None
    valid: int = 0


class PrefillRecorder:
    """Counts what runs, without waiting for the device.

    Attributes:
        compiled: Set when torch.compile traces attention. Compiled code cannot count its runs:
            it would be compiled anew for each number.
        num_refused: Layer runs that were refused.
    """

    def __init__(self) -> None:
        self.compiled = False
        self.num_refused = 0
        self._forwards: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        # Decoding counts every layer at every token, so a tally is created only once.
        self._layers: defaultdict[int | None, _LayerTally] = defaultdict(_LayerTally)
        self._backends: set[str] = set()

    def count_forward(self, decision: str, tokens: int) -> None:
        """Count a forward pass for one kind of layer."""
        self._forwards[decision] += 1
        self._tokens[decision] += tokens

    def count_dense(self, layer: int | None, reason: str) -> None:
        """Count a layer that runs dense."""
        self._layers[layer].dense[reason] += 1

    def count_sparse(self, layer: int | None, kept: Tensor, valid: int, backend: str) -> None:
        """Count a layer that ran sparse; ``kept`` is a scalar that stays on its device."""
        tally = self._layers[layer]
        tally.sparse += 1
        tally.kept = kept if tally.kept is None else tally.kept + kept
        tally.valid += valid
        self._backends.add(backend)

    def report(self) -> PrefillReport:
        """What has run so far; waits for the device."""
        numbered = sorted(self._layers, key=lambda layer: (layer is None, layer))
        return PrefillReport(
            tuple(
                ForwardCount(decision, count, self._tokens[decision])
                for decision, count in self._forwards.items()
            ),
            tuple(_as_layer(layer, self._layers[layer]) for layer in numbered),
            tuple(sorted(self._backends)),
            self.num_refused,
            self.compiled,
        )


def _as_layer(layer: int | None, tally: _LayerTally) -> LayerPrefill:
    kept = 0 if tally.kept is None else int(tally.kept)
    return LayerPrefill(layer, tally.sparse, dict(tally.dense), kept, tally.valid)

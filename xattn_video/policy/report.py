"""The report of what ran, dense or sparse, by step and layer."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from xattn_video.errors import require_packages
from xattn_video.files import write_figure, write_json

State: TypeAlias = Literal["dense", "sparse", "skipped"]


@dataclass(frozen=True, slots=True)
class LayerRun:
    """One layer in one forward pass.

    Args:
        state: ``"dense"``, ``"sparse"``, or ``"skipped"`` if a cache did not run the layer.
        reason: Why the layer ran dense: "warm-up", "cool-down", "threshold 1", "density 1", "too
            few tokens", "gradients" or, with refreshes, "last step". None if it did not.
        kept: Blocks computed, over the batch and all heads; None unless sparse.
        valid: Blocks that dense attention computes; None if skipped.
        refreshed: Whether the layer computed both outputs and returned the dense one.
    """

    state: State
    reason: str | None = None
    kept: int | None = None
    valid: int | None = None
    refreshed: bool = False

    @property
    def density(self) -> float | None:
        """Kept over valid blocks; None unless sparse."""
        return _density((self,))


@dataclass(frozen=True, slots=True)
class ForwardRun:
    """One forward pass of the transformer.

    Args:
        step: Denoising step, from 0.
        forward_pass: Pass within the step, from 0; true classifier-free guidance runs two.
        timestep: The timestep that the transformer was given.
        threshold: Tau of the step if it is one number for all layers and heads, else None.
        backend: The backend of the sparse layers; None if no layer ran sparse.
        layers: One entry per layer.
        imbalance: If ranks split the heads: blocks of a layer's busiest rank divided by the mean
            of the ranks, averaged over the sparse layers. None otherwise.
    """

    step: int
    forward_pass: int
    timestep: float
    threshold: float | None
    backend: str | None
    layers: tuple[LayerRun, ...]
    imbalance: float | None = None


@dataclass(frozen=True, slots=True)
class SparsityReport:
    """What ran in the latest generation: by step, forward pass and layer.

    Args:
        layer_names: The transformer's joint-attention layers that the processor serves.
        forwards: Forward passes in the order they ran. The processor keeps the latest 4,096.
        num_refused: Forward passes that a backend refused; each raised an error.
    """

    layer_names: tuple[str, ...]
    forwards: tuple[ForwardRun, ...]
    num_refused: int = 0

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that ran, ascending."""
        return tuple(sorted({forward.step for forward in self.forwards}))

    @property
    def sparse_steps(self) -> tuple[int, ...]:
        """The steps in which at least one layer ran sparse, ascending."""
        return tuple(sorted({forward.step for forward, _, _ in self._runs("sparse")}))

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers that ran sparse at least once, ascending."""
        return tuple(sorted({layer for _, layer, _ in self._runs("sparse")}))

    @property
    def density(self) -> float | None:
        """Kept over valid blocks of all sparse layer runs; None if there were none."""
        return _density(run for _, _, run in self._runs("sparse"))

    @property
    def budget(self) -> float | None:
        """The density, with refreshes and the last step that follows them counted as 1.

        None if nothing ran sparse.
        """
        if self.density is None:
            return None
        return _density(
            replace(run, kept=run.valid) if run.refreshed or run.kept is None else run
            for _, _, run in self._runs()
            if run.state == "sparse" or run.reason == "last step"
        )

    @property
    def refresh_steps(self) -> tuple[int, ...]:
        """The steps in which at least one layer refreshed its residual, ascending."""
        return tuple(sorted({forward.step for forward, _, run in self._runs() if run.refreshed}))

    @property
    def imbalance(self) -> float | None:
        """Mean of the passes' ``imbalance``; None if ranks never split the heads."""
        found = [forward.imbalance for forward in self.forwards if forward.imbalance is not None]
        return sum(found) / len(found) if found else None

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that computed the sparse layers."""
        return tuple(sorted({forward.backend for forward in self.forwards if forward.backend}))

    @property
    def dense_reasons(self) -> dict[str, int]:
        """{reason: number of layer runs} for the layers that ran dense."""
        reasons = (run.reason for _, _, run in self._runs() if run.reason is not None)
        return dict(Counter(reasons))

    def layer_densities(self) -> list[list[float | None]]:
        """`[layers][steps]`: kept over valid blocks, all passes together; None unless sparse."""
        runs: dict[tuple[int, int], list[LayerRun]] = {}
        for forward, layer, run in self._runs("sparse"):
            runs.setdefault((layer, forward.step), []).append(run)
        return [
            [_density(runs.get((layer, step), ())) for step in self.steps]
            for layer in range(len(self.layer_names))
        ]

    def step_density(self, step: int) -> float | None:
        """Kept over valid blocks, over a step's passes and layers; None if none ran sparse."""
        return _density(run for forward, _, run in self._runs("sparse") if forward.step == step)

    def summary(self) -> str:
        """One line, such as "45/50 steps x 60/60 layers sparse, density 0.41, 0 refused"."""
        # A layer that refreshes its residual runs both dense and sparse.
        alone = set(self.sparse_steps) - set(self.refresh_steps)
        sparse = (
            f"{len(alone)}/{len(self.steps)} steps x "
            f"{len(self.sparse_layers)}/{len(self.layer_names)} layers sparse"
        )
        if self.refresh_steps:
            sparse += f" and {len(self.refresh_steps)} refreshed"
        if self.density is not None:
            what = f"density {self.density:.2f}"
            if self.refresh_steps:
                what += f" (budget {self.budget:.2f})"
        elif self.forwards:
            what = f"dense throughout ({', '.join(self.dense_reasons)})"
        else:
            what = "nothing has run"
        return f"{sparse}, {what}, {self.num_refused} refused"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the lists of a forward pass have one entry per layer."""
        return {
            "summary": self.summary(),
            "num_steps": len(self.steps),
            "num_sparse_steps": len(self.sparse_steps),
            "num_layers": len(self.layer_names),
            "num_sparse_layers": len(self.sparse_layers),
            "density": self.density,
            "budget": self.budget,
            "imbalance": self.imbalance,
            "refresh_steps": list(self.refresh_steps),
            "backends": list(self.backends),
            "dense_reasons": self.dense_reasons,
            "num_refused": self.num_refused,
            "layer_names": list(self.layer_names),
            "forwards": [
                {
                    "step": forward.step,
                    "forward_pass": forward.forward_pass,
                    "timestep": forward.timestep,
                    "threshold": forward.threshold,
                    "backend": forward.backend,
                    "states": [run.state for run in forward.layers],
                    "reasons": [run.reason for run in forward.layers],
                    "densities": [run.density for run in forward.layers],
                    "refreshed": [run.refreshed for run in forward.layers],
                    "imbalance": forward.imbalance,
                }
                for forward in self.forwards
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write the report as JSON; raises FileNotWrittenError if that fails."""
        write_json(path, self.to_dict())

    def plot(self, path: str | Path) -> None:
        """Draw density by step and layer; all passes of a step count together.

        Raises:
            ValueError: Nothing has run yet.
            MissingPackageError: matplotlib is not installed.
            FileNotWrittenError: The file cannot be written.
        """
        if not self.forwards:
            raise ValueError("the report is empty; run the pipeline before plotting it.")
        require_matplotlib()
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

        steps, num_layers = self.steps, len(self.layer_names)
        densities = self._grid()
        figure = Figure(
            figsize=(max(7.0, 0.16 * len(steps) + 3), max(3.5, 0.09 * num_layers + 1.8)),
            layout="constrained",
        )
        axes = figure.add_subplot()
        edges = (-0.5, len(steps) - 0.5, num_layers - 0.5, -0.5)
        dense = [[0.0 if cell == "dense" else float("nan") for cell in row] for row in densities]
        axes.imshow(dense, ListedColormap(["0.82"]), extent=edges, aspect="auto")
        sparse = [[float("nan") if isinstance(c, str) else c for c in row] for row in densities]
        image = axes.imshow(sparse, "viridis", vmin=0, vmax=1, extent=edges, aspect="auto")
        figure.colorbar(image, label="density (kept / valid blocks)")
        columns = range(0, len(steps), max(1, len(steps) // 12))
        axes.set_xticks(list(columns), [str(steps[column]) for column in columns])
        axes.set_yticks(range(0, num_layers, max(1, num_layers // 10)))
        axes.set(xlabel="denoising step", ylabel="layer")
        # With refreshes the summary is wider than a plot of few steps.
        axes.set_title(self.summary(), wrap=True)
        keys = [Patch(facecolor="0.82", label="dense")]
        if any("skipped" in row for row in densities):
            keys.append(Patch(facecolor="white", edgecolor="0.6", label="skipped by a cache"))
        figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False)
        # As in matplotlib, a name without a suffix means PNG.
        write_figure(path if Path(path).suffix else f"{path}.png", figure)

    def _runs(self, state: State | None = None) -> Iterator[tuple[ForwardRun, int, LayerRun]]:
        """All layer runs, or those of one state, each with its forward pass and layer."""
        for forward in self.forwards:
            for layer, run in enumerate(forward.layers):
                if state in (None, run.state):
                    yield forward, layer, run

    def _grid(self) -> list[list[float | Literal["dense", "skipped"]]]:
        """`[layers][steps]`: a density, or "dense" or "skipped"."""
        dense = {(layer, forward.step) for forward, layer, _ in self._runs("dense")}
        return [
            [
                ("dense" if (layer, step) in dense else "skipped") if density is None else density
                for step, density in zip(self.steps, densities, strict=True)
            ]
            for layer, densities in enumerate(self.layer_densities())
        ]


def _density(runs: Iterable[LayerRun]) -> float | None:
    """Kept over valid blocks of the sparse runs; None if there are none."""
    counts = [(run.kept, run.valid or 0) for run in runs if run.kept is not None]
    valid = sum(of for _, of in counts)
    return sum(kept for kept, _ in counts) / valid if valid else None


def require_matplotlib() -> None:
    """Raise MissingPackageError if matplotlib, which every plot needs, is missing."""
    require_packages("plots", "matplotlib")

"""Predicts how long a run takes, with a model fitted to measured parts of full-size videos.

Shared work is fitted to one GPU and two: `T(n) = F + (T(1) - F) / n + X(n)`. F is the part that
does not shrink, and X(n) the exchange among n GPUs, proportional to what each sends. Times scale
with FLOP for other sizes, and linearly with the density.
"""

from dataclasses import asdict, dataclass
from typing import Any

from xattn_video.measure.full_size import read_full_size
from xattn_video.pipelines.loading import LoadOptions
from xattn_video.pipelines.model_shape import ModelShape
from xattn_video.pipelines.request import VideoSettings
from xattn_video.pipelines.run_plan import RunPlan, plan_run
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.web_page import Figure


@dataclass(frozen=True, slots=True)
class VideoParts:
    """Seconds of the parts of a generation."""

    text: float
    dense_step: float
    sparse_step: float
    decoding: float


@dataclass(frozen=True, slots=True)
class MeasuredParts:
    """Measurements of the same video on one GPU and on two GPUs of one machine.

    Attributes:
        device: Name of the GPU.
        video: Size of the video.
        video_tokens, dense_step_tflop, attention_share: As in its `RunPlan`.
        density: Kept over valid blocks of the sparse steps.
        one, two: Times on one GPU and on two.
        exchange: Seconds of a step on two GPUs in which they trade tokens for heads.
        sent_gib: GiB that each of the two sends in a step.
        sources: The result files.
    """

    device: str
    video: str
    video_tokens: int
    dense_step_tflop: float
    attention_share: float
    density: float
    one: VideoParts
    two: VideoParts
    exchange: float
    sent_gib: float
    sources: tuple[str, ...]

    @classmethod
    def read(cls) -> "MeasuredParts":
        """The measurements that ship with the package."""
        return cls.of_record(read_full_size("parts"))

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "MeasuredParts":
        """The measurements from plain values."""
        parts = {name: VideoParts(**record[name]) for name in ("one", "two")}
        return cls(**record | parts | {"sources": tuple(record["sources"])})


@dataclass(frozen=True, slots=True)
class ExpectedSeconds:
    """The expected seconds of a planned run.

    Args:
        measured: The measurements to derive them from.
        plan: A plan of HunyuanVideo, on GPUs like the measured one.
    """

    measured: MeasuredParts
    plan: RunPlan

    @property
    def density(self) -> float:
        """The density of sparse steps that the settings ask for, or else the measured one."""
        if not self.plan.sparse_steps:
            return 1.0
        return self.measured.density if self.plan.density is None else self.plan.density

    @property
    def traded(self) -> float:
        """Seconds of a step in which GPUs trade tokens for heads."""
        return self.measured.exchange * self.plan.share.sent_gib / self.measured.sent_gib

    def parts(self, density: float) -> VideoParts:
        """Seconds of the run's parts, with this density in sparse steps."""
        measured, plan = self.measured, self.plan
        one, two = measured.one, measured.two
        work = plan.dense_step_tflop / measured.dense_step_tflop
        # Sparse steps save time in attention only.
        saved = (1 - density) / (1 - measured.density)
        saved *= plan.attention_share / measured.attention_share
        alone, shared = (
            times.dense_step - saved * (times.dense_step - times.sparse_step)
            for times in (one, two)
        )
        return VideoParts(
            text=one.text * plan.forwards_per_step,
            dense_step=work * self._split(one.dense_step, two.dense_step - measured.exchange)
            + self.traded,
            sparse_step=work * self._split(alone, shared - measured.exchange) + self.traded,
            decoding=self._split(one.decoding, two.decoding)
            * (plan.video_tokens / measured.video_tokens),
        )

    def total(self, density: float) -> float:
        """Seconds from the prompt to the frames."""
        parts, plan = self.parts(density), self.plan
        steps = self._dense_steps * parts.dense_step + plan.sparse_steps * parts.sparse_step
        return parts.text + steps + parts.decoding

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: parts and total for each density of the plan."""
        densities = [bound.density for bound in self.plan.speedup_bounds] or [1.0]
        rows = [
            {"density": density, **asdict(self.parts(density)), "seconds": self.total(density)}
            for density in densities
        ]
        return {"device": self.measured.device, "rows": rows, "sources": self.measured.sources}

    def describe(self) -> str:
        """`total` with its terms as text, at the density asked for, or else the measured one."""
        plan, density = self.plan, self.density
        parts = self.parts(density)
        dense_steps = f"{round(self._dense_steps, 1):g}"
        terms = [f"{parts.text:.0f} text", f"{dense_steps} dense x {parts.dense_step:.2f}"]
        if plan.sparse_steps:
            terms.append(f"{plan.sparse_steps} sparse x {parts.sparse_step:.2f}")
        at = f" at density {density:.3f}" if plan.sparse_steps else ""
        return (
            f"about {self.total(density):.0f}{at} on {self.measured.device} without offloading "
            f"(a model from measured parts: {' + '.join(terms)} + {parts.decoding:.0f} decoding)"
        )

    @property
    def _dense_steps(self) -> float:
        """Dense steps of the plan, and the refreshes, which also compute dense attention."""
        return self.plan.dense_steps + self.plan.refreshed

    def _split(self, alone: float, on_two: float) -> float:
        """Seconds of a part on the planned number of GPUs."""
        fixed = max(0.0, 2 * on_two - alone)
        return fixed + (alone - fixed) / self.plan.share.num_gpus


def expected_seconds(shape: ModelShape, plan: RunPlan) -> ExpectedSeconds | None:
    """The expected seconds of HunyuanVideo on a CUDA GPU; None for anything else."""
    if not plan.device.startswith("cuda"):
        return None
    if shape.transformer_parameters != ModelShape().transformer_parameters:
        return None
    return ExpectedSeconds(MeasuredParts.read(), plan)


def expected_speedup(sparse: SparseSettings) -> Figure | None:
    """The expected speed-up of HunyuanVideo's default video; None without one density for all."""
    if not isinstance(sparse.density, float):
        return None
    shape, video = ModelShape(), VideoSettings()
    options = LoadOptions(device="cuda", device_elsewhere=True)
    measured = MeasuredParts.read()
    runs = (
        ExpectedSeconds(measured, plan_run(shape, video, settings, options))
        for settings in (sparse, None)
    )
    here, dense = (run.total(run.density) for run in runs)
    return Figure(
        f"{dense / here:.2f}x",
        "speed expected at full size",
        f"{measured.video}, {measured.device}: about {here:.0f} s per video instead of "
        f"{dense:.0f} s, computed from measured parts",
    )

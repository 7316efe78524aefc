"""How long a run will take: a model, from measured parts of videos of full size.

What GPUs share is fitted to one GPU and two: `T(n) = F + (T(1) - F) / n + X(n)`, where F is what
does not shrink, and X(n) the exchanges of n GPUs, in proportion to what each sends. Other sizes
are reached in proportion to arithmetic, other densities along a straight line.
"""

from dataclasses import asdict, dataclass
from typing import Any

from xattn_video.measure.full_size import read_full_size
from xattn_video.pipelines.model_shape import ModelShape
from xattn_video.pipelines.run_plan import RunPlan


@dataclass(frozen=True, slots=True)
class VideoParts:
    """Seconds of the parts of a video."""

    text: float
    dense_step: float
    sparse_step: float
    decoding: float


@dataclass(frozen=True, slots=True)
class MeasuredParts:
    """The same video on one GPU and on two of one machine.

    Attributes:
        device: One of the GPUs.
        video: Its size.
        video_tokens, dense_step_tflop, attention_share: As in its `RunPlan`.
        density: Kept over valid blocks of the sparse steps.
        one, two: What one GPU and two took.
        exchange: Seconds of a step of two in which they traded tokens for heads.
        sent_gib: What each of the two sent then.
        sources: The files that say so.
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
        """What the package carries."""
        return cls.of_record(read_full_size("parts"))

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "MeasuredParts":
        """From plain values."""
        parts = {name: VideoParts(**record[name]) for name in ("one", "two")}
        return cls(**record | parts | {"sources": tuple(record["sources"])})


@dataclass(frozen=True, slots=True)
class ExpectedSeconds:
    """What a planned run is expected to take.

    Args:
        measured: What it is derived from.
        plan: Of HunyuanVideo, on GPUs like the measured one.
    """

    measured: MeasuredParts
    plan: RunPlan

    @property
    def traded(self) -> float:
        """Seconds of a step in which GPUs trade tokens for heads."""
        return self.measured.exchange * self.plan.share.sent_gib / self.measured.sent_gib

    def parts(self, density: float) -> VideoParts:
        """Seconds of its parts, where sparse steps have this density."""
        measured, plan = self.measured, self.plan
        one, two = measured.one, measured.two
        work = plan.dense_step_tflop / measured.dense_step_tflop
        # Sparse steps save attention alone.
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
        """Plain values, ready for JSON: the parts and their sum for each density of the plan."""
        densities = [bound.density for bound in self.plan.speedup_bounds] or [1.0]
        rows = [
            {"density": density, **asdict(self.parts(density)), "seconds": self.total(density)}
            for density in densities
        ]
        return {"device": self.measured.device, "rows": rows, "sources": self.measured.sources}

    def describe(self) -> str:
        """The sum that `total` comes from, at the measured density if steps are sparse."""
        plan = self.plan
        density = self.measured.density if plan.sparse_steps else 1.0
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
        """Those of the plan; a layer that refreshes runs dense as well."""
        return self.plan.dense_steps + self.plan.refreshed

    def _split(self, alone: float, on_two: float) -> float:
        """Seconds of a part on the planned number of GPUs."""
        fixed = max(0.0, 2 * on_two - alone)
        return fixed + (alone - fixed) / self.plan.share.num_gpus


def expected_seconds(shape: ModelShape, plan: RunPlan) -> ExpectedSeconds | None:
    """For a plan of HunyuanVideo's size on a GPU; None for others, of which nothing is known."""
    if not plan.device.startswith("cuda"):
        return None
    if shape.transformer_parameters != ModelShape().transformer_parameters:
        return None
    return ExpectedSeconds(MeasuredParts.read(), plan)

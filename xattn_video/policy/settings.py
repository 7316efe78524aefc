"""Every setting of sparse attention: its name, default, help and check, defined once."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from xattn_video.policy.schedule import CallableSchedule, ThresholdLike, ThresholdSchedule

if TYPE_CHECKING:
    import torch

    from xattn_video.ops.scoring import Precision

ResidualPlace: TypeAlias = Literal["auto", "device", "host"]
TokenOrder: TypeAlias = Literal["raster", "hilbert"]
Compensation: TypeAlias = Literal["none", "means", "first-order"]

DEFAULT_THRESHOLD = 0.95
MIN_TOKENS_CUDA = 16384
_MIN_TOKENS_ELSEWHERE = 2048


@dataclass(frozen=True, slots=True)
class SparseSettings:
    """When and how attention is sparse; also the arguments of `XAttnProcessor`.

    The processor, the command line, `compare`, `plan` and reports hold this object. Command-line
    options and their help are made from its fields.

    Attributes:
        threshold: Share tau of each row's estimated mass to keep, in (0, 1]. Lower is faster and
            further from dense attention; 1 is dense. A float, a list (step i uses entry i, the
            last one holds), a mapping {step: tau}, a callable step -> tau, or a
            `ThresholdSchedule`. 0.95 if neither it nor ``density`` is given.
        stride: Tokens in a group of the estimate; must divide ``block_size``. A smaller stride
            estimates better and costs more.
        block_size: Tokens in a block.
        warmup_steps: Number of first steps that run dense; they settle the layout of the video.
        cooldown_steps: Number of last steps that run dense.
        min_tokens: With fewer video tokens, every step runs dense. None means the length from
            which sparse attention was measured as faster: 16384 on CUDA, 2048 elsewhere.
        backend: A name from `available_backends`, or ``"auto"``.
        scoring_precision: Precision of the scores: ``"exact"``, ``"float8"`` (8-bit operands, for
            the scores only), or ``"auto"`` for the faster; see `block_scores`.
        density: Share of each row's valid blocks to keep, in (0, 1], the best-scoring ones; None
            if the threshold decides. A `ThresholdSchedule` of kind ``"density"`` sets it by
            step, layer and head.
        token_order: Order of the video tokens in sparse layers: ``"raster"`` (frame by frame, row
            by row), or ``"hilbert"``, in which a block is a compact piece of the video.
        compensation: What replaces the skipped blocks: ``"none"``, the mean key and value of each
            (``"means"``), or these and a linear term (``"first-order"``).
        mask_every: Blocks are chosen at every m-th sparse step and used until the next choice.
        refresh_every: The last warm-up step and then every r-th sparse step compute the dense and
            the sparse output of each layer and keep the difference. The steps in between reuse
            its blocks and add the difference. The last step runs dense. None never refreshes.
        residual: Where the difference is kept, in 8 bits: on the layers' ``"device"``, in
            ``"host"`` memory, or ``"auto"``, by the memory that is free.

    docs/fewer-blocks.md explains and measures the last six.

    Raises:
        ValueError, TypeError: An argument is out of range or of a wrong type.
    """

    threshold: "ThresholdLike | None" = field(
        default=None,
        metadata={
            "help": "Share of the estimated attention mass to keep, in (0, 1].",
            "kind": float | None,
            "shown_default": f"{DEFAULT_THRESHOLD}",
        },
    )
    _: KW_ONLY
    stride: int = field(default=8, metadata={"help": "Tokens between scored antidiagonals."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a block."})
    warmup_steps: int = field(
        default=5, metadata={"help": "Number of first steps that stay dense."}
    )
    cooldown_steps: int = field(
        default=0, metadata={"help": "Number of last steps that stay dense."}
    )
    min_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Videos with fewer tokens run dense in every step.",
            "shown_default": f"{MIN_TOKENS_CUDA} on CUDA, else {_MIN_TOKENS_ELSEWHERE}; demo 0",
        },
    )
    backend: str = field(
        default="auto", metadata={"help": "auto, or a name that `xattn-video backends` lists."}
    )
    scoring_precision: "Precision" = field(
        default="auto",
        metadata={"help": "Precision of scoring: exact, float8, or auto (whichever is faster)."},
    )
    density: float | ThresholdSchedule | None = field(
        default=None,
        metadata={
            "help": "Share of the blocks to keep, in (0, 1], instead of a threshold.",
            "kind": float | None,
        },
    )
    token_order: TokenOrder = field(
        default="raster",
        metadata={"help": "Order of the video tokens in sparse layers: raster or hilbert."},
    )
    compensation: Compensation = field(
        default="none",
        metadata={"help": "How skipped blocks are approximated: none, means or first-order."},
    )
    mask_every: int = field(
        default=1,
        metadata={"help": "Select blocks at every n-th sparse step and reuse them in between."},
    )
    refresh_every: int | None = field(
        default=None,
        metadata={
            "help": "Refresh every n steps: also run dense, and add the difference until "
            "the next refresh.",
            "shown_default": "never",
        },
    )
    residual: ResidualPlace = field(
        default="auto",
        metadata={
            "help": "Where refreshes store the difference: device, host, or auto (by free memory)."
        },
    )

    def __post_init__(self) -> None:
        if self.density is not None:
            self._check_density(self.density)
        elif self.threshold is None:
            object.__setattr__(self, "threshold", DEFAULT_THRESHOLD)
        ThresholdSchedule.coerce(self._share)
        self._check_kind()
        self._check_reuse()
        # These import torch, which is slow; a command line that only shows help avoids it.
        from xattn_video.backends.table import load_backend
        from xattn_video.ops.arguments import check_block_size
        from xattn_video.ops.scoring import check_precision

        check_block_size(self.block_size, self.stride)
        for name in ("warmup_steps", "cooldown_steps", "min_tokens"):
            count = getattr(self, name)
            if count is None and name == "min_tokens":
                continue
            if isinstance(count, bool) or not isinstance(count, int):
                raise ValueError(f"{name} must be a whole number of at least 0, got {count!r}.")
            if count < 0:
                raise ValueError(f"{name} must be at least 0, got {count}; use 0 for none.")
        if self.backend != "auto":
            load_backend(self.backend)
        check_precision(self.scoring_precision)

    @classmethod
    def of(
        cls, threshold: "ThresholdLike | SparseSettings | None", **options: Any
    ) -> "SparseSettings":
        """Settings made from the arguments, or the settings given in place of a threshold."""
        if not isinstance(threshold, SparseSettings):
            return cls(threshold, **options)
        if options:
            raise TypeError(
                f"{', '.join(options)} cannot be combined with a SparseSettings; "
                "use dataclasses.replace(settings, ...)."
            )
        return threshold

    @property
    def schedule(self) -> ThresholdSchedule | CallableSchedule:
        """The threshold of every step, layer and head, or the density in its place."""
        return ThresholdSchedule.coerce(self._share)

    @property
    def _share(self) -> ThresholdLike:
        share = self.threshold if self.density is None else self.density
        assert share is not None
        return share

    @property
    def keeps_all_reason(self) -> 'Literal["threshold 1", "density 1"]':
        """The reason of a layer that runs dense because it keeps every block."""
        return "threshold 1" if self.density is None else "density 1"

    @property
    def keeps_between_steps(self) -> bool:
        """Whether steps reuse the blocks or the residual of an earlier step."""
        return self.refresh_every is not None or self.mask_every != 1

    @property
    def needs_lse(self) -> bool:
        """Whether backends must return the log-sum-exp, by which skipped blocks are merged."""
        return self.compensation != "none"

    def min_tokens_on(self, device_type: str) -> int:
        """``min_tokens``, or the default of the device.

        From this length on, XAttention with half of the blocks is faster than the best dense
        kernel. The CUDA value was measured on an H100 with flash4 and triton. The other is the
        shortest length measured on a CPU, in float32; a CPU with AMX gains less in bfloat16.
        docs/benchmarks.md has the curves.
        """
        if self.min_tokens is not None:
            return self.min_tokens
        return MIN_TOKENS_CUDA if device_type == "cuda" else _MIN_TOKENS_ELSEWHERE

    def backend_for(
        self,
        device: "torch.device",
        dtype: "torch.dtype",
        head_dim: int,
        *,
        causal: bool = False,
        ragged: bool = False,
    ) -> str:
        """The backend that computes sparse attention of such inputs.

        Raises:
            BackendUnavailableError: The backend cannot run them; lists every reason.
            ValueError: Their scores cannot be computed in 8 bits, but must be.
        """
        from xattn_video.backends.table import resolve_backend
        from xattn_video.ops.problem import Problem
        from xattn_video.ops.scoring import check_precision

        problem = Problem(
            device, dtype, head_dim, self.block_size, causal, ragged, lse=self.needs_lse
        )
        check_precision(self.scoring_precision, problem, self.stride)
        return resolve_backend(self.backend, problem)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = {knob.name: getattr(self, knob.name) for knob in fields(self)}
        for name in ("threshold", "density"):
            if not isinstance(values[name], int | float | None):
                values[name] = self.schedule.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SparseSettings":
        """The inverse of `to_dict`."""
        given = dict(values)
        for name in ("threshold", "density"):
            if isinstance(given.get(name), Mapping):
                given[name] = ThresholdSchedule.from_dict(given[name])
        return cls(**given)

    def _check_kind(self) -> None:
        for name in ("threshold", "density"):
            schedule = getattr(self, name)
            if isinstance(schedule, ThresholdSchedule) and schedule.kind != name:
                raise ValueError(
                    f"{name} got a schedule of kind {schedule.kind!r}; give it as "
                    f"{schedule.kind}, or make it with kind={name!r}."
                )

    def _check_density(self, density: object) -> None:
        if not isinstance(density, ThresholdSchedule):
            if isinstance(density, bool) or not isinstance(density, int | float):
                raise TypeError(f"density must be a number in (0, 1], got {density!r}; try 0.1.")
            if not 0 < density <= 1:
                raise ValueError(f"density must lie in (0, 1], got {density}; try 0.1.")
        if self.threshold is not None:
            raise ValueError(
                "density and threshold cannot be combined, got "
                f"density={density}, threshold={self.threshold}; give one of them."
            )

    def _check_reuse(self) -> None:
        for name, kinds in (
            ("token_order", TokenOrder),
            ("compensation", Compensation),
            ("residual", ResidualPlace),
        ):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(kinds))}, "
                    f"got {getattr(self, name)!r}."
                )
        for name in ("mask_every", "refresh_every"):
            every = getattr(self, name)
            if every is None and name == "refresh_every":
                continue
            if isinstance(every, bool) or not isinstance(every, int):
                raise TypeError(f"{name} must be a whole number of steps, got {every!r}; try 5.")
            if every < 1:
                raise ValueError(f"{name} must be at least 1 step, got {every}; try 5.")
        if self.refresh_every is None and self.residual != "auto":
            raise ValueError(
                f"residual={self.residual!r} has no effect without refresh_every; give it too, "
                "such as refresh_every=5."
            )
        if self.refresh_every is not None and self.mask_every != 1:
            raise ValueError(
                "with refresh_every, blocks are selected at refreshes; omit mask_every, got "
                f"mask_every={self.mask_every} and refresh_every={self.refresh_every}."
            )

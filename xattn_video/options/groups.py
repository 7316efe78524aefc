"""Options for the model, the video and sparse attention, shared by several commands."""

from collections.abc import Sequence
from dataclasses import Field, dataclass, fields, replace
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xattn_video.options.command import Group, group_of, knob, option
from xattn_video.pipelines.request import DEMO_SETTINGS, VideoSettings, default_settings
from xattn_video.pipelines.source import DEMO, HUNYUAN_VIDEO
from xattn_video.policy.presets import SET_BY_PRESETS, settings_of
from xattn_video.policy.schedule import ThresholdSchedule, read_schedule
from xattn_video.policy.settings import SparseSettings

if TYPE_CHECKING:
    from xattn_video.pipelines.loading import LoadOptions

SPARSITY = "Sparse attention"


@dataclass(frozen=True, slots=True)
class _Model:
    """The arguments of `LoadOptions`, as typed."""

    model: str = knob(
        "demo (ships with the package), a hub ID, or a folder.",
        HUNYUAN_VIDEO,
        panel="Model",
        # Help of 80 columns has no room for the whole ID.
        shown_default="HunyuanVideo, from the hub",
    )
    dtype: str | None = knob(
        "Dtype of the transformer: bfloat16, float16 or float32.",
        panel="Model",
        shown_default="bfloat16 where it is fast",
    )
    device: str | None = knob(
        "cpu, cuda or cuda:N.", panel="Model", shown_default="cuda if there is one"
    )
    offload: str | None = knob(
        "How to offload weights to host memory: none, model, sequential or group.",
        panel="Model",
        shown_default="the fastest that fits",
    )
    vae_tiling: bool | None = knob(
        "Decode the video in tiles, which needs less memory.",
        panel="Model",
        shown_default="on; demo off",
    )
    attention_backend: str | None = knob(
        "Diffusers' attention backend for the dense steps, such as native or flash.",
        panel="Model",
    )


@dataclass(frozen=True, slots=True)
class _PlannedGpu:
    """Additional options of `plan`, for GPUs in another machine."""

    gpu_memory: float | None = knob(
        "Memory of the GPU, in GiB.", panel="Model", shown_default="what is free here"
    )
    num_gpus: int = knob("Number of GPUs that generate each video together.", 1, panel="Model")


@dataclass(frozen=True, slots=True)
class _Instead:
    """Options that can be given instead of a threshold."""

    preset: str | None = knob(
        "quality, balanced or fast; sets density, token order, compensation and refreshes.",
        panel=SPARSITY,
    )
    schedule: Path | None = knob(
        "JSON file with a threshold for each step, or with what `xattn-video calibrate` found.",
        panel=SPARSITY,
        reads=True,
    )
    dense: bool = knob("Use dense attention in every step.", False, "--dense", panel=SPARSITY)


def loading(*names: str, elsewhere: bool = False, **model: Any) -> Group:
    """The options of `LoadOptions`, how the model is loaded.

    Args:
        names: The options to include; all of them if none is named.
        elsewhere: Whether the device may be in another machine.
        model: Changes to the option --model, as in `option`.
    """
    options = {name: made for name, made in group_of(_Model).options.items() if _in(name, names)}
    if elsewhere:
        options |= group_of(_PlannedGpu).options
    if model:
        options["model"] = option(fields(_Model)[0], kind=str | None, **model)
    return Group(options, lambda values: load_options(values, elsewhere))


def load_options(values: dict[str, Any], elsewhere: bool = False) -> "LoadOptions":
    """How to load the model.

    Raises:
        ValueError: A value is unknown.
    """
    from xattn_video.pipelines.loading import DTYPES, LoadOptions

    given = _given((*fields(_Model), *fields(_PlannedGpu)), values)
    dtype = given.pop("dtype", None)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    given["dtype"] = None if dtype is None else DTYPES[dtype]
    return LoadOptions(**given | {"model": chosen_model(values), "device_elsewhere": elsewhere})


def chosen_model(values: dict[str, Any]) -> str:
    """The requested model. If a command has no default model, a CPU gets the demo model."""
    model = values.get("model", HUNYUAN_VIDEO)
    if model is not None:
        return str(model)
    on_cpu = load_options(values | {"model": DEMO}).resolved_device.type == "cpu"
    return DEMO if on_cpu else HUNYUAN_VIDEO


def video_settings(*names: str) -> Group:
    """The options of `VideoSettings`, size and sampling; the defaults depend on the model.

    Args:
        names: The options to include; all of them if none is named.
    """
    options = {}
    for source in fields(VideoSettings):
        demo = getattr(DEMO_SETTINGS, source.name)
        shown = f"{source.default:g}" + (f"; demo {demo:g}" if demo != source.default else "")
        if _in(source.name, names):
            kind = type(source.default) | None
            options[source.name] = option(
                source, kind=kind, default=None, panel="Video", shown_default=shown
            )

    def make(values: dict[str, Any]) -> VideoSettings:
        given = _given(fields(VideoSettings), values)
        return replace(default_settings(chosen_model(values)), **given)

    return Group(options, make)


def sparse_options(*names: str, without: Sequence[str] = ()) -> dict[str, Parameter]:
    """The options of `SparseSettings`.

    Args:
        names: The options to include; all of them if none is named.
        without: Options that the command has in another form.
    """
    return {
        source.name: option(source, panel=SPARSITY, **_unless_given(source))
        for source in fields(SparseSettings)
        if _in(source.name, names) and source.name not in without
    }


def _unless_given(source: "Field[Any]") -> dict[str, Any]:
    """No default for an option that presets set: typed, the default contradicts them too."""
    if source.name not in SET_BY_PRESETS or source.default is None:
        return {}
    kind = type(source.default) | None
    return {"kind": kind, "default": None, "shown_default": str(source.default)}


def sparse_subset(*names: str) -> Group:
    """Some options of `SparseSettings`; sparse for any number of tokens."""
    options = sparse_options(*names)

    def make(values: dict[str, Any]) -> SparseSettings:
        return SparseSettings(**{name: values[name] for name in options}, min_tokens=0)

    return Group(options, make)


def given_sparse(values: dict[str, Any]) -> dict[str, Any]:
    """The given arguments of `SparseSettings`, with the demo model's default.

    Settings of presets are included only if they were typed.
    """
    # The demo model is meant to show sparse attention.
    own = {"min_tokens": 0} if chosen_model(values) == DEMO else {}
    return own | _given(fields(SparseSettings), values)


def sparse_settings() -> Group:
    """The options for when and how attention is sparse: `SparseSettings`, or None for dense."""
    first = fields(SparseSettings)[0]
    options = {first.name: option(first, panel=SPARSITY)} | group_of(_Instead).options
    return Group(options | sparse_options(without=[first.name]), _make_sparse)


def _make_sparse(values: dict[str, Any]) -> SparseSettings | None:
    """The requested sparse settings; None for dense attention in every step.

    Raises:
        ValueError: Options exclude each other, the file holds no schedule, or a value is out of
            range.
    """
    ways = {"--threshold": values["threshold"], "--schedule": values["schedule"]}
    ways |= {"--dense": values["dense"] or None, "--density": values["density"]}
    check_one_way(ways)
    given = given_sparse(values)
    if values["schedule"] is not None:
        schedule = read_schedule(values["schedule"])
        given[schedule.kind] = schedule
    if isinstance(given.get("threshold"), ThresholdSchedule) and values["preset"] is not None:
        raise ValueError(
            "--preset can be combined with a --schedule of densities, as `xattn-video calibrate` "
            "writes, got one of thresholds; give only one of them."
        )
    if not isinstance(given.get("density"), ThresholdSchedule):
        # Densities by layer and head can replace a preset's density.
        check_one_way(ways | {"--preset": values["preset"]})
    # This also checks values that --dense leaves unused.
    sparse = settings_of(values["preset"], **given)
    return None if values["dense"] else sparse


def calibrated_settings() -> Group:
    """The options of `SparseSettings` with a number as density, the mean over layers and heads."""
    options = {"preset": group_of(_Instead).options["preset"]}
    options |= sparse_options(without=["threshold", "residual"])
    density = next(source for source in fields(SparseSettings) if source.name == "density")
    text = "Mean share of the blocks to keep, below 1."
    shown = "that of the preset"
    options["density"] = option(density, help=text, shown_default=shown, panel=SPARSITY)
    return Group(options, _make_calibrated)


def _make_calibrated(values: dict[str, Any]) -> SparseSettings:
    """The settings to find densities for.

    Raises:
        ValueError: No density was given, or a value is out of range.
    """
    given, preset = given_sparse(values), values["preset"]
    # The density is the mean to distribute, so it does not contradict a preset.
    density = given.pop("density", None)
    if density is None and preset is None:
        raise ValueError("give --density or --preset, got none; try --density 0.1.")
    wanted = {} if density is None else {"density": density}
    sparse = SparseSettings(**wanted, **given) if preset is None else settings_of(preset, **given)
    sparse = replace(sparse, **wanted)
    if sparse.density == 1:
        raise ValueError("density must be below 1, which keeps every block; try 0.1.")
    return sparse


def check_one_way(ways: dict[str, Any]) -> None:
    """Raise ValueError if several options were given that exclude each other.

    Args:
        ways: {option as typed: its value, or None if it was not given}.
    """
    chosen = [name for name, value in ways.items() if value is not None]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} cannot be combined; give only one.")


def _given(sources: Sequence[Any], values: dict[str, Any]) -> dict[str, Any]:
    """The values of those fields that were given."""
    named = {source.name: values.get(source.name) for source in sources}
    return {name: value for name, value in named.items() if value is not None}


def _in(name: str, names: Sequence[str]) -> bool:
    return not names or name in names

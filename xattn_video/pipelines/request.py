"""What to generate, checked before any model is loaded."""

from dataclasses import dataclass, field

from xattn_video.pipelines.source import DEMO
from xattn_video.policy.settings import SparseSettings

SIZE_STEP = 16
"""Side of the square of pixels that one latent patch covers."""

MAX_FPS = 240
"""Most frames per second that players can follow."""


def shorten_prompt(prompt: str, length: int) -> str:
    """The first characters of a prompt, up to a space if there is one, and "..."."""
    text = " ".join(prompt.split())
    if len(text) <= length:
        return text
    start = text[: length - 3]
    return f"{start[: start.rfind(' ')] if ' ' in start else start}..."


@dataclass(frozen=True, slots=True)
class VideoSettings:
    """The video's size and how it is sampled; the defaults are HunyuanVideo's own.

    Attributes:
        height, width: In pixels, multiples of 16.
        num_frames: Number of frames, 4k + 1.
        num_inference_steps: Number of denoising steps.
        guidance_scale: Embedded guidance, an input of the model.
        true_cfg_scale: Scale of classifier-free guidance with a second forward pass; 1 means none.
    """

    height: int = field(default=720, metadata={"help": "Pixels, a multiple of 16."})
    width: int = field(default=1280, metadata={"help": "Pixels, a multiple of 16."})
    num_frames: int = field(default=129, metadata={"help": "Number of frames, 4k + 1."})
    num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps."})
    guidance_scale: float = field(
        default=6.0, metadata={"help": "Embedded guidance, an input of the model."}
    )
    true_cfg_scale: float = field(
        default=1.0,
        metadata={
            "help": "True classifier-free guidance with a second forward pass; active above 1."
        },
    )

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            size = getattr(self, name)
            if size < SIZE_STEP or size % SIZE_STEP:
                nearest = max(1, round(size / SIZE_STEP)) * SIZE_STEP
                raise ValueError(
                    f"{name} must be a positive multiple of {SIZE_STEP} pixels, got {size}; "
                    f"use {nearest}."
                )
        if self.num_frames < 1 or self.num_frames % 4 != 1:
            nearest = max(0, round((self.num_frames - 1) / 4)) * 4 + 1
            raise ValueError(
                f"num_frames must be 4k + 1, such as 33, 65 or 129, got {self.num_frames}; "
                f"use {nearest}."
            )
        if self.num_inference_steps < 1:
            raise ValueError(
                f"num_inference_steps must be at least 1, got {self.num_inference_steps}; use 50."
            )
        # Below 1 the pipeline silently omits the second forward pass.
        for name, least, usual in (
            ("guidance_scale", 0, "6"),
            ("true_cfg_scale", 1, "1 for none"),
        ):
            scale = getattr(self, name)
            if not least <= scale < float("inf"):
                raise ValueError(
                    f"{name} must be a finite number of at least {least}, got {scale:g}; "
                    f"use {usual}."
                )


DEMO_SETTINGS = VideoSettings(height=256, width=256, num_frames=65, num_inference_steps=25)


def default_settings(model: str) -> VideoSettings:
    """The default settings of a model."""
    return DEMO_SETTINGS if model == DEMO else VideoSettings()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One video.

    Attributes:
        prompt: What the video shows.
        negative_prompt: What the video must not show; needs ``video.true_cfg_scale`` above 1.
        seed: Seed of the initial noise. The noise is drawn on the host, so it is the same on
            every device.
        video: Size and sampling.
        sparse: When and how attention is sparse; None for dense attention throughout.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    video: VideoSettings = field(default_factory=VideoSettings)
    sparse: SparseSettings | None = field(default_factory=SparseSettings)

    def __post_init__(self) -> None:
        for what, text in (("prompt", self.prompt), ("negative prompt", self.negative_prompt)):
            _check_text(what, text or "")
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; say what the video shows.")
        if self.negative_prompt is not None and self.video.true_cfg_scale <= 1:
            raise ValueError(
                "a negative prompt needs true_cfg_scale above 1, "
                f"got {self.video.true_cfg_scale}; try 6."
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie between 0 and 2**63 - 1, got {self.seed}; use 0.")


def _check_text(what: str, text: str) -> None:
    """Raise ValueError unless the text is valid UTF-8; a shell passes any bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"the {what} is not UTF-8 text, got {text!r}; set the terminal to UTF-8, or put the "
            "text into a UTF-8 file and give --prompts-file."
        ) from None


def check_fps(fps: int) -> None:
    """Raise ValueError unless a video can have this frame rate."""
    if not 1 <= fps <= MAX_FPS:
        raise ValueError(f"fps must lie between 1 and {MAX_FPS}, got {fps}; use 24.")

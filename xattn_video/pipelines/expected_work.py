"""The expected work of a generation, by kind, computed before it begins."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xattn_video.pipelines.model_shape import ModelShape, shape_of_configs
from xattn_video.pipelines.request import GenerationRequest, VideoSettings
from xattn_video.pipelines.run_plan import dense_step_flop, planned_steps

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

# How much slower the VAE's convolutions are than a step's matrix products; measured with the demo
# model on a CPU. Used only until a decoding has been timed.
_CONVOLUTIONS_SLOWER = 3.0
# Size of the latents to count the work on; more latents give the same work per latent.
_PROBE = (3, 16, 16)


@dataclass(frozen=True, slots=True)
class ExpectedWork:
    """The work of a model's generations, by kind.

    Attributes:
        shape: The sizes of the model.
        device_type: Type of the device on which it runs.
        vae_config: The configuration of its VAE.
    """

    shape: ModelShape
    device_type: str
    vae_config: Mapping[str, Any]

    @classmethod
    def of(cls, pipe: "HunyuanVideoPipeline") -> "ExpectedWork":
        """The work of a loaded pipeline."""
        shape = shape_of_configs(pipe.transformer.config, pipe.vae.config)
        return cls(shape, pipe._execution_device.type, pipe.vae.config)

    def of_run(
        self, request: GenerationRequest, videos: int = 1, kept_mass: bool = False
    ) -> dict[str, float]:
        """Units of work of each kind in one call of the pipeline, for `RunProgress`.

        Args:
            request: One of the videos, which share their settings.
            videos: Number of videos made in the call.
            kept_mass: Whether the sparse steps measure kept mass.
        """
        counts = planned_steps(self.shape, request.video, request.sparse, self.device_type)
        sparse = "sparse, kept mass" if kept_mass else "sparse"
        units = {"text": 1, "dense": counts.dense - counts.primes, "decoding": 1}
        units |= {"refresh": counts.refreshes + counts.primes}
        units |= {sparse: counts.sparse - counts.refreshes}
        return {kind: float(count * videos) for kind, count in units.items() if count}

    def decoding_steps(self, video: VideoSettings) -> float:
        """Number of dense steps that take about as long as decoding, estimated from FLOP."""
        grid = self.shape.grid(video.height, video.width, video.num_frames)
        latents = math.prod(grid) * self.shape.patch_size**2
        decoding = latents * self.shape.patch_size_t * _flop_of_latent(self.vae_config)
        return _CONVOLUTIONS_SLOWER * decoding / dense_step_flop(self.shape, video)


def _flop_of_latent(vae_config: Mapping[str, Any]) -> float:
    """Floating-point operations to decode one latent, counted on the meta device."""
    import torch
    from diffusers import AutoencoderKLHunyuanVideo
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae = AutoencoderKLHunyuanVideo.from_config(vae_config)
        vae.decode(torch.empty(1, vae.config.latent_channels, *_PROBE))
    return counter.get_total_flops() / math.prod(_PROBE)

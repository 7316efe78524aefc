"""The supported families of models, one file each."""

from xattn_video.processors.families.family import Family
from xattn_video.processors.families.hunyuan_video import HUNYUAN_VIDEO

FAMILIES = (HUNYUAN_VIDEO,)

__all__ = ["FAMILIES", "Family"]

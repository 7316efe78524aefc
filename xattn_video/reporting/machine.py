"""The machine and the package versions of a measurement."""

import contextlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from xattn_video import __version__

if TYPE_CHECKING:
    import torch


def machine_record(device: "torch.device", *packages: str) -> dict[str, Any]:
    """The name of the device, and versions of the main packages, of backends and of these."""
    import torch

    versions = {"xattn_video": __version__, "torch": torch.__version__}
    # The others are the packages of the backends.
    kept = ("diffusers", "triton", "flash-attn-4", "block-sparse-attn")
    versions |= installed_versions((*kept, *packages))
    cuda = device.type == "cuda"
    return {
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
    }


def describe_versions(versions: Mapping[str, str]) -> str:
    """Names and versions of packages in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of the packages that are installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions

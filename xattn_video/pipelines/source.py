"""Finds a model in the package, in a folder or on the hub. Reads JSON files, no weights."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xattn_video.checkpoint_files import folder_or_file, read_json
from xattn_video.errors import PipelineLoadError, UnsupportedModelError
from xattn_video.files import user_path

DEMO = "demo"
HUNYUAN_VIDEO = "hunyuanvideo-community/HunyuanVideo"
SUPPORTED_PIPELINE = "HunyuanVideoPipeline"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The name of a model, and its folder unless it is on the hub."""

    name: str
    folder: Path | None

    def read_json(self, path: str) -> dict[str, Any]:
        """A JSON file of the model, from its folder or from the hub and its cache.

        Raises:
            ValueError: The folder has no such file, or the file cannot be read.
            PipelineLoadError: The hub has no such model or file, or cannot be reached.
        """
        if self.folder is None:
            return read_json(self._fetch(path))
        try:
            return read_json(self.folder / path)
        except FileNotFoundError:
            raise ValueError(
                f"{self.folder} is not a Diffusers pipeline: it has no {path}; "
                "give a folder written by save_pretrained."
            ) from None

    def _fetch(self, path: str) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )

        try:
            return Path(hf_hub_download(self.name, path))
        except GatedRepoError:
            reason = "its owner must grant you access; accept its terms, then `hf auth login`"
        except RepositoryNotFoundError:
            reason = "there is no such model, or it is private; check the name, or `hf auth login`"
        except LocalEntryNotFoundError:
            reason = (
                "the hub cannot be reached and the model is not in the cache; "
                f"connect, give a folder, or use --model {DEMO}, which needs no network"
            )
        except EntryNotFoundError:
            reason = f"it has no {path}, so it is not a Diffusers pipeline"
        except HfHubHTTPError as error:
            reason = f"the hub answered: {error.args[0].splitlines()[0]}"
        raise PipelineLoadError(f"cannot load {self.name!r} from the hub: {reason}.")


def find_model(name: str) -> ModelSource:
    """Find out whether a name means the demo model, a folder or a model on the hub.

    Raises:
        ValueError: ``name`` is neither a folder that can be opened nor a hub ID.
    """
    if name == DEMO:
        from xattn_video.pipelines.demo import DEMO_DIR

        return ModelSource(name, DEMO_DIR)
    folder = user_path(name)
    is_folder, is_file = folder_or_file(name, folder, " or a hub ID")
    if is_folder:
        return ModelSource(name, folder)
    if _HUB_ID.fullmatch(name) and not is_file:
        return ModelSource(name, None)
    raise ValueError(
        f"model {name!r} is neither a folder nor a hub ID; "
        f"expected {DEMO!r}, a folder, or an ID such as {HUNYUAN_VIDEO!r}."
    )


def is_on_hub(name: str) -> bool:
    """Whether the name is a hub ID, so that loading may download the model."""
    return find_model(name).folder is None


def check_supported(source: ModelSource) -> None:
    """Refuse every pipeline except HunyuanVideo's, reading only its model_index.json.

    Raises:
        UnsupportedModelError: The model is another kind of pipeline.
    """
    found = source.read_json("model_index.json").get("_class_name")
    if found != SUPPORTED_PIPELINE:
        raise UnsupportedModelError(
            f"model {source.name!r} is a {found}, but the command line loads text-to-video "
            "pipelines "
            f"only; use a {SUPPORTED_PIPELINE}, for example {HUNYUAN_VIDEO!r} or {DEMO!r}. "
            "In your own code, XAttnProcessor supports every HunyuanVideoTransformer3DModel: "
            "HunyuanVideo text-to-video, HunyuanVideo image-to-video and SkyReels-V1."
        )

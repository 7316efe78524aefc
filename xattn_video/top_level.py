"""Makes a clone's links `processors` and `pipelines` the same modules as the package's.

Run from a clone's root, Python finds `processors/` and would import its files a second time, as
classes other than those of `xattn_video.processors`.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _SameModule(Loader):
    """Loads a module of the package under another name."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import machinery replaced it by the spec of the other name.
        module.__spec__ = self._spec


class _InPackage(MetaPathFinder):
    """Finds the modules below a link in the package."""

    def __init__(self, link: str) -> None:
        self._below = f"{link}."

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(self._below):
            return None
        return ModuleSpec(name, _SameModule(f"xattn_video.{name}"))


def become(link: str) -> None:
    """Put the package's module in `sys.modules` for a link, and find modules below it there."""
    sys.meta_path.insert(0, _InPackage(link))
    sys.modules[link] = importlib.import_module(f"xattn_video.{link}")

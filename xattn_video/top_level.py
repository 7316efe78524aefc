"""Makes the links `processors` and `pipelines` of a clone the package's own modules.

In a clone's root Python finds `processors/` and would import its files a second time, with classes
that are not those of `xattn_video.processors`.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _SameModule(Loader):
    """Gives a module of the package another name."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import gave it that of the other name.
        module.__spec__ = self._spec


class _InPackage(MetaPathFinder):
    """Finds what is below a link in the package."""

    def __init__(self, link: str) -> None:
        self._below = f"{link}."

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(self._below):
            return None
        return ModuleSpec(name, _SameModule(f"xattn_video.{name}"))


def become(link: str) -> None:
    """Stand in `sys.modules` for a link that is being imported, and for all below it."""
    sys.meta_path.insert(0, _InPackage(link))
    sys.modules[link] = importlib.import_module(f"xattn_video.{link}")

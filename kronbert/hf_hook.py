"""Registers the checkpoint format with transformers when it is needed, not before.

Importing transformers' quantizer registry costs more than half of `import torch, transformers`
(1.6 s beside 2.5 s on a 2-core Xeon), so kronbert waits until something imports it:
`from_pretrained` of any model does."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

REGISTRY = "transformers.quantizers.auto"


class _RegisterAfter(importlib.abc.Loader):
    """The registry's own loader, followed by our registration."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        from .hf import register

        register()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def install() -> None:
    """Register at once if the registry is loaded, else when it is."""
    if REGISTRY in sys.modules:
        from .hf import register

        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())

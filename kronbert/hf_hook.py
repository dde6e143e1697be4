"""Registers the checkpoint format with transformers when it is needed, not before.

Importing transformers' quantizer registry costs more than half of `import torch, transformers`
(1.6 s beside 2.5 s on a 2-core Xeon), so kronbert waits until something imports it:
`from_pretrained` of any model does. What is registered then are two stand-ins that import
`kronbert.hf` when a Kronecker checkpoint is met: an import from within the registry's own import
would wait for a thread that is importing `kronbert.hf`, which waits for the registry."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

METHOD = "kronecker"
REGISTRY = "transformers.quantizers.auto"


def register(registry: Any) -> None:
    """Tell transformers about quant_method "kronecker"; once."""
    if METHOD in registry.AUTO_QUANTIZATION_CONFIG_MAPPING:
        return

    class LazyConfig(registry.QuantizationConfigMixin):
        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            from .hf import KroneckerQuantizationConfig

            return KroneckerQuantizationConfig.from_dict(*args, **kwargs)

    class LazyQuantizer(registry.HfQuantizer):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            from .hf import KroneckerQuantizer

            return KroneckerQuantizer(*args, **kwargs)

    registry.register_quantization_config(METHOD)(LazyConfig)
    registry.register_quantizer(METHOD)(LazyQuantizer)


class _RegisterAfter(importlib.abc.Loader):
    """The registry's own loader, followed by our registration."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps no trace of us: its source and data come from its own loader.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        register(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: asks the other finders, whoever they are, and wraps their answer.

    It stays: a module that was only looked up, or is reloaded, must be registered with later."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != REGISTRY:
            return None
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _RegisterAfter(spec.loader)
                return spec
        return None


def install() -> None:
    """Register at once if the registry is loaded, and whenever it is loaded."""
    # By name: after importlib.reload the class is another one, and two would ask each other.
    ours = (_Finder.__module__, _Finder.__qualname__)
    if not any((type(f).__module__, type(f).__qualname__) == ours for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if REGISTRY in sys.modules:
        # Waits for another thread that is executing it.
        register(importlib.import_module(REGISTRY))

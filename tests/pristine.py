"""megatron-core's modules as their files have them, beside the patched ones."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


def pristine(name: str) -> ModuleType:
    """A second copy of a module, as its file has it; the patched one stays where it is."""
    spec = importlib.util.spec_from_file_location(name, importlib.import_module(name).__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""Names of a model's parts in profiles: Nsight Systems' and the traces of torch's profiler."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import nn

_NAMES = {"vision_model": "ViT", "embedding": "embedding", "output_layer": "output layer and loss"}


def name_of_module(path: str, module: nn.Module) -> str | None:
    """What a module's time is listed under: the whole, and parts of it that lie side by side.

    Args:
        path: its qualified name in a (wrapped) `MultimodalModel`.

    Returns:
        None where it is a part of something named, or too small.
    """
    parts = path.split(".")
    if parts[-1] in _NAMES:
        return _NAMES[parts[-1]]
    if "language_model" in parts and parts[-1] in ("self_attention", "mlp"):
        return type(module).__name__
    return "the model" if path == "" else None


class ProfileRanges:
    """With `--profile`, on the profiled ranks: a range around forward of each part.

    In backward both profilers tie an operator to its forward one. Under recomputation ranges come again, in backward.

    Args:
        args: Megatron's resolved arguments.
    """

    def __init__(self, args: Namespace) -> None:
        self._wanted = args.profile and (not args.profile_ranks or args.rank in args.profile_ranks)
        self._open: dict[int, torch.autograd.profiler.record_function] = {}

    def attach(self, chunks: list[nn.Module]) -> list[nn.Module]:
        """Add hooks to the wrapped stages."""
        for chunk in chunks if self._wanted else ():
            for path, module in chunk.named_modules():
                if (name := name_of_module(path, module)) is not None:
                    module.register_forward_pre_hook(self._start_as(name))
                    module.register_forward_hook(self._stop)
        return chunks

    def _start_as(self, name: str) -> Any:
        def start(module: nn.Module, _: Any) -> None:
            # Nsight sees it too: Megatron runs profiled steps under torch.autograd.profiler.emit_nvtx.
            self._open[id(module)] = torch.autograd.profiler.record_function(name)
            self._open[id(module)].__enter__()

        return start

    def _stop(self, module: nn.Module, _: Any, output: Any) -> None:
        self._open.pop(id(module)).__exit__(None, None, None)

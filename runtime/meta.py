"""Build a Megatron model without memory for its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def meta_device() -> Iterator[None]:
    """Make every tensor created or moved inside the block a meta tensor: shape and dtype, no memory.

    `torch.device("meta")` alone gives way to an explicit device, and megatron-core's layers name one
    (tensor_parallel/layers.py:305, :1000, :1041; ssm/gated_delta_net/common.py:230). This includes buffers and
    plain attributes: what must hold numbers is computed in forward().
    """
    with torch.device("meta"), _NamedDevices():
        yield


class _NamedDevices(TorchFunctionMode):
    """Calls that name a device get the meta device."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.cpu):
            return args[0].to("meta")
        if func is torch.Tensor.to:
            args = tuple("meta" if _is_device(arg) else arg for arg in args)
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
            kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


def _is_device(argument: Any) -> bool:
    return isinstance(argument, (torch.device, str)) or type(argument) is int

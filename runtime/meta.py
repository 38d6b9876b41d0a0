"""Build a Megatron model without memory for its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors


def build_on_meta[Model: nn.Module](build: Callable[[], Model]) -> Model:
    """Call `build`; its parameters are meta tensors, its buffers hold their values on the current device."""
    with meta_device():
        model = build()
    # As Module.cuda() would, which meta parameters forbid.
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(torch.cuda.current_device())
    return model


@contextmanager
def meta_device() -> Iterator[None]:
    """Make every tensor that is created without values a meta tensor: shape and dtype, no memory.

    Parameters are created so, with `torch.empty`, and initialised later. What is created with its values (zeros,
    ranges, the order of experts in MoE dispatchers) keeps them. `torch.device("meta")`, under which Megatron's
    `get_model` builds, would take them away, and gives way to an explicit device, which megatron-core's layers name
    (tensor_parallel/layers.py:305, :1000, :1041; ssm/gated_delta_net/common.py:230).
    """
    with _ParametersOnMeta():
        yield


_WITHOUT_VALUES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class _ParametersOnMeta(TorchFunctionMode):
    """Tensors without values are created on the meta device, and stay there."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        # By name: runtime/cpu.py puts functions of its own in the place of torch's.
        if getattr(func, "__name__", "") in _WITHOUT_VALUES:
            kwargs["device"] = "meta"
            kwargs.pop("pin_memory", None)
        elif func in _device_constructors():
            kwargs.setdefault("device", "cpu")  # torch's own default, which an outer torch.device("meta") changes
        elif func in (torch.Tensor.cuda, torch.Tensor.cpu) and args[0].is_meta:
            return args[0]
        elif func is torch.Tensor.to and args[0].is_meta:
            args = tuple("meta" if _is_device(arg) else arg for arg in args)
            if kwargs.get("device") is not None:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _is_device(argument: Any) -> bool:
    return isinstance(argument, (torch.device, str)) or type(argument) is int

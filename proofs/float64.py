"""Run code that hard-codes float32 in float64, so that an error of meaning can't hide behind rounding.

    with float64():
        model = build().double()
        loss = model(...)
        loss.backward()

Inside the block torch.float32 means torch.float64 wherever it is passed to a torch function, `.float()` means
`.double()`, `.type()` gives float32's name, and the default dtype is float64, in the backward pass and in recomputation
as well. Integer and 16-bit types are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Float64Mode(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = {name: _widen(value) for name, value in (kwargs or {}).items()}
        if func is Tensor.float:
            return args[0].double(**kwargs)
        if func is Tensor.backward:
            return _backward(*args, **kwargs)
        if func is Tensor.type and len(args) == 1:
            # By this name megatron-core's optimizers tell parameters that need no 16-bit copy.
            return func(*args, **kwargs).replace("DoubleTensor", "FloatTensor")
        return func(*(_widen(value) for value in args), **kwargs)


def _backward(
    loss: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    # A mode is off inside its own handler, and so it would be off in the Python functions that autograd calls.
    with _Float64Mode():
        torch.autograd.backward(loss, gradient, retain_graph, create_graph, inputs=inputs)


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def float64() -> Iterator[None]:
    """Make float32 mean float64 for the torch calls inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        # torch.autograd.backward and grad would leave the mode while they run, as any redirected function does.
        with _Float64Mode(), mock.patch.object(torch.autograd, "has_torch_function", lambda _: False):
            yield
    finally:
        torch.set_default_dtype(before)

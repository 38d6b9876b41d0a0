"""Which lines of this repository make the host wait for the device.

On the CPU nothing waits, so the torch calls that would on CUDA are counted, by name: it is the call that matters, since
whatever a model computes with is on the device. On a GPU torch itself reports them.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent
# Frames that stand between a caller and torch: torch's own, the redirection of CUDA, the counting, torch's warnings.
BETWEEN = (str(TORCH), str(ROOT / "runtime/cpu.py"), str(ROOT / "tests"), warnings.__file__)
OWN = tuple(str(ROOT / name) for name in ("models", "runtime", "data", "forward_step.py"))

# Methods of Tensor and functions of torch that read a tensor's values on the host.
READS = (
    *("item", "tolist", "__bool__", "__int__", "__float__", "__complex__", "__index__", "is_nonzero", "__contains__"),
    *("__format__", "__repr__", "__array__", "numpy", "cpu", "equal", "allclose", "nonzero", "argwhere", "bincount"),
    *("masked_select", "unique", "unique_consecutive"),
)
# Their sizes and numbers are host numbers: a tensor among the arguments is read.
FACTORIES = ("arange", "zeros", "ones", "empty", "full", "linspace", "eye", "tril_indices", "triu_indices")


def own_caller() -> str | None:
    """Which line of the harness called torch, as "models/base.py:42"; None when it was somebody else's."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(BETWEEN):
        frame = frame.f_back
    if frame is None or not frame.f_code.co_filename.startswith(OWN):
        return None
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"


def would_sync(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call makes the host wait when its tensors are on a CUDA device."""
    name = func.__name__
    if name in READS:
        return True
    if name in FACTORIES:
        return any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
    if name in ("tensor", "as_tensor", "asarray", "new_tensor"):
        # From host numbers onto a device: a copy from pageable memory. From a tensor: its values are read.
        return kwargs.get("device") is not None or isinstance(args[0], Tensor)
    if name == "repeat_interleave":
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats", args[0])
        return isinstance(repeats, Tensor) and kwargs.get("output_size") is None
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(_reads_index(entry) for entry in index)
    if name == "to":
        moves = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, (str, torch.device))]
        return bool(moves) and not kwargs.get("non_blocking", False)
    if name == "cuda":
        return not kwargs.get("non_blocking", False)
    return False


def _reads_index(entry: Any) -> bool:
    if isinstance(entry, slice):
        return any(isinstance(bound, Tensor) for bound in (entry.start, entry.stop, entry.step))
    return isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8)


class _Counting(TorchFunctionMode):
    def __init__(self, counts: Counter[tuple[str, str]]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            # A mode is off inside its own handler, and so it would be off in the Python functions that autograd calls.
            with self:
                return torch.autograd.backward(args, kwargs.pop("gradient"), **kwargs)
        if would_sync(func, args, kwargs) and (caller := own_caller()):
            self.counts[caller, func.__name__] += 1
        return func(*args, **kwargs)


@contextmanager
def counted_on_cpu() -> Iterator[Counter[tuple[str, str]]]:
    """Count the calls of our own files inside the block that would wait for a CUDA device, by line and name.

    In backward too, and in recomputation: on the CPU autograd runs in the thread that called it.
    """
    counts: Counter[tuple[str, str]] = Counter()
    # torch.autograd.backward would leave the mode while it runs, as any redirected function does.
    with _Counting(counts), mock.patch.object(torch.autograd, "has_torch_function", lambda _: False):
        yield counts


@contextmanager
def counted_on_gpu() -> Iterator[Counter[str]]:
    """Count the operations inside the block for which torch says that the host waited: by line of ours, "" for others.

    Functions that autograd runs in its own threads have no Python caller when they are torch's: "".
    """
    counts: Counter[str] = Counter()

    def show(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            counts[own_caller() or ""] += 1

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode(before)

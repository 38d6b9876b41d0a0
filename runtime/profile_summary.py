"""Where a training step's time goes: kernels of the device by class, and the host's time in modules.

Kernels are told apart by their names, which belong to the libraries that launch them; what no pattern knows is "other",
and is listed by name so that a pattern can be added.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

# In this order: the first pattern that a kernel's name contains decides.
CLASSES: dict[str, str] = {
    "communication": r"nccl",
    "loss": r"_add_chunk|_logits_to_grads|cross_entropy|softmax|nll_loss",
    "attention": r"flash|fmha|sdpa|attention|cudnn_generated|mha_",
    "gated delta net": (
        r"chunk_|gated_delta|delta_rule|causal_conv|conv1d|recompute_w_u|prepare_wy|solve_tril|merge_16x16|l2norm"
        r"|cumsum|_fwd_kernel_h|wy_|layer_norm_gated"
    ),
    "optimizer": r"adam|multi_tensor|l2_norm_kernel",
    "norm": r"norm|rms|ln_fwd|ln_bwd|layernorm",
    "experts": r"permute|topk|sort|histogram|routing|router|scatter_gather|radix|bincount",
    "GEMM": r"gemm|nvjet|cutlass|cublas|xmma|wgmma|splitk|s16816|gemv|matmul|ampere_|sm90_|mm_kernel",
    "copy": r"memcpy|copy_|_copy|catarray|memset|fill|transpose|cat_",
    "elementwise": r"elementwise|vectorized|triton_|fused|reduce|index|gather|scatter|swiglu|gelu|silu|foreach|cast",
}
_PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in CLASSES.items()}


def class_of(kernel: str) -> str:
    """Which of `CLASSES` a kernel belongs to, or "other"."""
    return next((name for name, pattern in _PATTERNS.items() if pattern.search(kernel)), "other")


@dataclass(frozen=True)
class Kernel:
    """One kernel or copy of a device, or an operator of the host; nanoseconds.

    own: the part of the duration in which nothing that it called ran; None: all of it.
    """

    name: str
    start: int
    duration: int
    own: int | None = None


@dataclass
class KernelSummary:
    """Kernels of one step.

    busy_seconds: during which at least one kernel ran.
    launches: kernels, copies and fills.
    seconds, counts: of each class; streams may overlap, so the sum may exceed busy_seconds.
    longest: the kernels that took longest in all, name -> (class, seconds, count).
    """

    busy_seconds: float = 0.0
    launches: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    longest: dict[str, tuple[str, float, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, kernels: Iterable[Kernel], *, keep: int = 40) -> KernelSummary:
        """Sum kernels up; `keep` names at most are listed one by one."""
        ordered = sorted(kernels, key=lambda kernel: kernel.start)
        by_name: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        busy, end = 0, 0
        for kernel in ordered:
            stop = kernel.start + kernel.duration
            busy += max(0, stop - max(kernel.start, end))
            end = max(end, stop)
            spent, count = by_name[kernel.name]
            own = kernel.duration if kernel.own is None else kernel.own
            by_name[kernel.name] = (spent + own * 1e-9, count + 1)
        summary = cls(busy_seconds=busy * 1e-9, launches=len(ordered))
        seconds: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        for name, (spent, count) in by_name.items():
            seconds[class_of(name)] += spent
            counts[class_of(name)] += count
        summary.seconds, summary.counts = dict(seconds), dict(counts)
        longest = sorted(by_name.items(), key=lambda item: -item[1][0])[:keep]
        summary.longest = {name[:160]: (class_of(name), spent, count) for name, (spent, count) in longest}
        return summary

    def lines(self) -> list[str]:
        """For people: classes by their time, then the longest kernels, in milliseconds."""
        found = [f"device busy {self.busy_seconds * 1e3:.1f} ms in {self.launches} kernels and copies"]
        for name, spent in sorted(self.seconds.items(), key=lambda item: -item[1]):
            found.append(f"  {name:16} {spent * 1e3:9.1f} ms {self.counts[name]:7}")
        found.append("  longest:")
        for name, (kind, spent, count) in self.longest.items():
            found.append(f"  {spent * 1e3:9.2f} ms {count:6} {kind:16} {name[:100]}")
        return found


def with_own_times(operators: Iterable[Kernel]) -> list[Kernel]:
    """Operators of one thread of the host, where one calls others: each with the time that it spent itself."""
    # An operator comes before those that it calls, which begin no earlier and end no later.
    ordered = sorted(operators, key=lambda operator: (operator.start, -operator.duration))
    own = [operator.duration for operator in ordered]
    calling: list[int] = []
    for index, operator in enumerate(ordered):
        while calling and ordered[calling[-1]].start + ordered[calling[-1]].duration <= operator.start:
            calling.pop()
        if calling:
            own[calling[-1]] -= operator.duration
        calling.append(index)
    return [replace(operator, own=spent) for operator, spent in zip(ordered, own, strict=True)]


@contextmanager
def profiled(summary: KernelSummary) -> Iterator[None]:
    """Profile the block and write what ran into `summary`; on a machine without CUDA, torch's operators on the host."""
    cuda = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        yield
        if cuda:
            torch.cuda.synchronize()
    # The events themselves: torch's own tables take minutes for tens of thousands of them.
    events = profiler.profiler.kineto_results.events()
    wanted = torch.profiler.DeviceType.CUDA if cuda else torch.profiler.DeviceType.CPU
    by_thread: dict[int, list[Kernel]] = defaultdict(list)
    for e in events:
        if e.device_type() == wanted:
            by_thread[0 if cuda else e.start_thread_id()].append(Kernel(e.name(), e.start_ns(), e.duration_ns()))
    kernels = by_thread[0] if cuda else [each for thread in by_thread.values() for each in with_own_times(thread)]
    vars(summary).update(vars(KernelSummary.of(kernels)))


class HostTimes:
    """The host's seconds in forward of chosen modules, children included: launching kernels, not running them.

    Args:
        model: its modules are watched by forward hooks.
        name_of: qualified name and module -> the name to count it under, None to leave it alone. What is counted
            should lie side by side, or times count twice.

    Attributes:
        seconds: by name, since the last `clear`.
    """

    def __init__(self, model: nn.Module, name_of: Callable[[str, nn.Module], str | None]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._handles = []
        self._started: dict[int, float] = {}
        for path, module in model.named_modules():
            name = name_of(path, module)
            if name is not None:
                self._handles.append(module.register_forward_pre_hook(self._start))
                self._handles.append(module.register_forward_hook(self._stop_as(name)))

    def clear(self) -> None:
        self.seconds.clear()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self, module: nn.Module, _: Any) -> None:
        self._started[id(module)] = time.perf_counter()

    def _stop_as(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def stop(module: nn.Module, _: Any, output: Any) -> None:
            self.seconds[name] += time.perf_counter() - self._started.pop(id(module))

        return stop


def host_lines(seconds: Mapping[str, float]) -> list[str]:
    """For people, in milliseconds."""
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return [f"  host in {name:28} {spent * 1e3:9.1f} ms" for name, spent in ordered]

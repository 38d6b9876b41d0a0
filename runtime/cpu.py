"""Megatron on a machine without a GPU: the CUDA API, redirected to the CPU.

Megatron-core speaks CUDA throughout: `device="cuda"`, `torch.cuda.current_device()`, streams, CUDA's random generators,
NCCL. Where no CUDA device exists, `enable()` points each of these at its counterpart on the CPU, or at a stand-in where
the CPU has none, so that `megatron.training.pretrain()` and all that it calls run unchanged over gloo. `REDIRECTS` is
the whole of it. Where a CUDA device exists, nothing is touched.

Functions that make tensors are replaced rather than watched by a `TorchFunctionMode`: a mode costs 1.6 us in every
operation and 1.2 us in every attribute read, and is off in the Python that autograd runs and in other threads.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

Function = Callable[..., Any]


def enable() -> bool:
    """Redirect the CUDA API to the CPU if this machine has no CUDA device; otherwise do nothing.

    Call it before `megatron` is imported: its fused functions then aren't wrapped in torch.compile, which halves the
    import. Afterwards works too. Calling it again changes nothing.

    Returns:
        Whether the CUDA API is redirected. `torch.cuda.is_available()` stays False.
    """
    if torch.cuda.is_available():
        return False
    _install()
    return True


@functools.cache
def _install() -> None:
    # `with torch.device(...)` compares with the tensor factories as they are when it is first used.
    with torch.device("cpu"):
        torch.empty(0)
    if "torch._dynamo" in sys.modules:
        torch.compiler.set_stance("force_eager")  # for what is wrapped already
    # The tracker warns when the CPU's generator moves while CUDA's is forked; here they are one.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    for redirect in REDIRECTS:
        for path in redirect.targets.split():
            owner, name = _resolve(path)
            setattr(owner, name, redirect.replace(getattr(owner, name)))


def _resolve(path: str) -> tuple[Any, str]:
    """The object that holds the last name of a dotted path, importing modules on the way, and that name."""
    *parents, name = path.split(".")
    owner = importlib.import_module(parents[0])
    for depth, parent in enumerate(parents[1:], 2):
        if not hasattr(owner, parent):
            importlib.import_module(".".join(parents[:depth]))
        owner = getattr(owner, parent)
    return owner, name


@dataclass(frozen=True)
class Redirect:
    """`targets` (dotted paths, separated by blanks) become `replace(what was there)`; `reason` says why Megatron
    needs it."""

    targets: str
    replace: Callable[[Any], Any]
    reason: str


# --- Stand-ins -------------------------------------------------------------------------------------------------------


def _constant(value: Any) -> Callable[[Function], Function]:
    """A function that takes anything and returns `value`."""
    return lambda original: functools.wraps(original)(lambda *args, **kwargs: value)


def _instead(stand_in: Any) -> Callable[[Any], Any]:
    """`stand_in` itself, whatever was there."""
    return lambda original: stand_in


def _cpu(device: Any) -> Any:
    """The CPU for any name of a CUDA device: 0, "cuda", "cuda:0", torch.device("cuda"); anything else as it is."""
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    if isinstance(device, str):
        return "cpu" if device.startswith("cuda") else device
    return "cpu" if type(device) is int else device


def _on_cpu(original: Function) -> Function:
    """A function that makes tensors: `device` mapped, `pin_memory` dropped."""

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return factory


def _to(original: Function) -> Function:
    """`Tensor.to`, whose first argument may be a device."""

    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (_cpu(args[0]), *args[1:])
        elif "device" in kwargs:
            kwargs["device"] = _cpu(kwargs["device"])
        return original(self, *args, **kwargs)

    return to


def _type(original: Function) -> Function:
    """`Tensor.type`: reads "torch.cuda.FloatTensor" where the CPU's says "torch.FloatTensor"; takes both."""

    @functools.wraps(original)
    def tensor_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            # A TorchFunctionMode calls this again from inside `original`.
            return original(self).replace("torch.cuda.", "torch.").replace("torch.", "torch.cuda.")
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original(self, dtype, *args, **kwargs)

    return tensor_type


def _over_gloo(original: Function) -> Function:
    """A function that makes a process group: gloo for NCCL, bound to no device."""

    @functools.wraps(original)
    def make_group(*args: Any, **kwargs: Any) -> Any:
        args = tuple("gloo" if arg == "nccl" else arg for arg in args)
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        kwargs.pop("device_id", None)
        return original(*args, **kwargs)

    return make_group


def _mesh_on_cpu(original: Function) -> Function:
    @functools.wraps(original)
    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, _cpu(device_type), *args, **kwargs)

    return init


def _uneven_gather(original: Function) -> Function:
    """`all_gather` of shares of different sizes too, which NCCL takes and gloo doesn't; its all-to-all does."""

    @functools.wraps(original)
    def all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        sizes = [share.numel() for share in tensor_list]
        if async_op or len(set(sizes)) == 1:
            return original(tensor_list, tensor, group=group, async_op=async_op)
        gathered = tensor.new_empty(sum(sizes))
        copies = tensor.detach().flatten().repeat(len(sizes))
        torch.distributed.all_to_all_single(gathered, copies, sizes, [tensor.numel()] * len(sizes), group=group)
        for share, own in zip(tensor_list, gathered.split(sizes), strict=True):
            share.copy_(own.view_as(share))

    return all_gather


def _uneven_scatter(original: Function) -> Function:
    """`reduce_scatter` (sum) into shares of different sizes too; the counterpart."""

    @functools.wraps(original)
    def reduce_scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = torch.distributed.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        sizes = [share.numel() for share in input_list]
        if async_op or op != torch.distributed.ReduceOp.SUM or len(set(sizes)) == 1:
            return original(output, input_list, op=op, group=group, async_op=async_op)
        parts = output.new_empty(len(sizes), output.numel())
        shares = torch.cat([share.detach().flatten() for share in input_list])
        torch.distributed.all_to_all_single(parts.view(-1), shares, [output.numel()] * len(sizes), sizes, group=group)
        output.copy_(parts.sum(0).view_as(output))

    return reduce_scatter


def _coalesced_by_dtype(original: Function) -> Function:
    """The context manager that makes one collective of several: one for each dtype, since gloo packs them as one."""
    waiting = torch.distributed.distributed_c10d._world.pg_coalesce_state  # group -> collectives under way

    @contextmanager
    @functools.wraps(original)
    def manager(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
        key = group or torch.distributed.distributed_c10d._get_default_group()
        others: list[list[Any]] = []
        with original(group, device, async_ops) as works:
            yield works
            by_dtype: dict[torch.dtype, list[Any]] = {}
            for collective in waiting[key]:
                by_dtype.setdefault(collective.tensor.dtype, []).append(collective)
            if by_dtype:
                waiting[key], *others = by_dtype.values()
        for collectives in others:
            with original(group, device, async_ops) as more:
                waiting[key].extend(collectives)
            works.works.extend(more.works)

    return manager


def _without_cuda(original: Function) -> Function:
    return functools.partial(original, allow_no_cuda=True)


def _not_compiled(original: Function) -> Function:
    @functools.wraps(original)
    def compile_nothing(model: Function | None = None, **options: Any) -> Function:
        return (lambda function: function) if model is None else model

    return compile_nothing


def _forking_caller(original: Function) -> Function:
    from megatron.core.dist_checkpointing.strategies.async_utils import TemporalAsyncCaller

    def next_caller(queue: Any) -> TemporalAsyncCaller:
        # One at a time, as that process writes: all saves hand their results to one queue, in order.
        if queue.async_calls and (writing := queue.async_calls[-1].async_caller.process):
            writing.join()
        return TemporalAsyncCaller()

    return next_caller


def _on_host(tensor: torch.Tensor | None, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and tensor is not None else tensor


class _Stream:
    """A stream on which all is done at once."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: _Stream) -> None: ...

    def wait_event(self, event: _Event) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event


class _Event:
    """A point in time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: _Stream | None = None) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds from this event to `end`."""
        return 1e3 * (end._seconds - self._seconds)

    def synchronize(self) -> None: ...

    def wait(self, stream: _Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True


_STREAM = _Stream()


def _resident_bytes(device: Any = None) -> int:
    """Resident memory of this process, in bytes."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_resident_bytes(device: Any = None) -> int:
    """Highest resident memory of this process so far, in bytes."""
    # The kernel updates its peak late.
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, _resident_bytes())


def _memory_stats(device: Any = None) -> Counter[str]:
    """The process's resident memory under the names of the CUDA allocator's statistics; 0 for the others."""
    stats = {"current": _resident_bytes(), "peak": _peak_resident_bytes()}
    return Counter({f"{pool}_bytes.all.{when}": n for pool in ("allocated", "reserved") for when, n in stats.items()})


_DEVICE_PROPERTIES = SimpleNamespace(
    name="cpu",
    major=0,
    minor=0,
    multi_processor_count=os.cpu_count(),
    total_memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
)

# --- What is redirected ----------------------------------------------------------------------------------------------

REDIRECTS = (
    # Tensors and devices
    Redirect(
        "torch.empty torch.empty_like torch.empty_strided torch.zeros torch.zeros_like torch.ones torch.ones_like"
        " torch.full torch.full_like torch.rand torch.rand_like torch.randn torch.randn_like torch.randint"
        " torch.randint_like torch.randperm torch.arange torch.linspace torch.eye torch.tensor torch.as_tensor"
        " torch.asarray torch.scalar_tensor torch.tril_indices torch.triu_indices torch.Tensor.new_empty"
        " torch.Tensor.new_empty_strided torch.Tensor.new_zeros torch.Tensor.new_ones torch.Tensor.new_full"
        " torch.Tensor.new_tensor",
        _on_cpu,
        "layers, optimizer and schedules make tensors on 'cuda' or current_device(), some of them pinned",
    ),
    Redirect("torch.Tensor.to", _to, "tensors and, through it, modules are moved to 'cuda' or current_device()"),
    Redirect(
        "torch.Tensor.cuda torch.Tensor.pin_memory",
        _instead(lambda self, *args, **kwargs: self),
        "get_model() moves the model to the GPU by Module.cuda(), which calls Tensor.cuda; pinning needs a GPU",
    ),
    Redirect("torch.Tensor.record_stream", _constant(None), "tells the CUDA allocator about a stream"),
    Redirect(
        "torch.Tensor.type",
        _type,
        "clip_grads.py:174 asserts 'torch.cuda.FloatTensor'; the 16-bit optimizers sort parameters by such names",
    ),
    Redirect("torch.cuda.device_count", _constant(1), "initialize.py makes process groups and seeds only with a GPU"),
    Redirect("torch.cuda.current_device", _constant(0), "the device of nearly every tensor; 0 is mapped as 'cuda' is"),
    Redirect("torch.cuda.set_device", _constant(None), "initialize.py binds each rank to a GPU"),
    Redirect("torch.cuda.device", _instead(nullcontext), "selects a device for a while"),
    Redirect(
        "torch.cuda.is_initialized", _constant(True), "what is queued until CUDA starts (RNG states) runs at once"
    ),
    Redirect("torch.cuda.get_device_properties", _constant(_DEVICE_PROPERTIES), "memory and processor counts"),
    Redirect(
        "torch.cuda.get_device_capability",
        _constant((8, 0)),
        "training/arguments.py:1339 wants 8.0 for --moe-grouped-gemm, which torch computes on a CPU too",
    ),
    Redirect("torch.cuda.get_device_name", _constant("cpu"), "printed in reports"),
    # Streams and events: all is done at once
    Redirect("torch.cuda.Stream torch.cuda.ExternalStream", _instead(_Stream), "DDP and schedules make side streams"),
    Redirect("torch.cuda.Event", _instead(_Event), "orders streams, measures times"),
    Redirect("torch.cuda.current_stream torch.cuda.default_stream", _constant(_STREAM), "waited for and recorded"),
    Redirect("torch.cuda.stream", _instead(nullcontext), "selects a stream for a while"),
    Redirect("torch.cuda.set_stream torch.cuda.synchronize", _constant(None), "Megatron's timers synchronize"),
    Redirect("torch.cuda.is_current_stream_capturing", _constant(False), "there are no CUDA graphs"),
    # Random numbers: one generator, the CPU's
    Redirect(
        "torch.cuda.get_rng_state torch.cuda.random.get_rng_state",
        _instead(lambda device=None: torch.default_generator.get_state()),
        "the model-parallel RNG tracker, recomputation and checkpoints save it",
    ),
    Redirect(
        "torch.cuda.set_rng_state torch.cuda.random.set_rng_state",
        _instead(lambda new_state, device=None: torch.default_generator.set_state(new_state)),
        "the counterpart",
    ),
    Redirect(
        "torch.cuda.manual_seed torch.cuda.manual_seed_all torch.cuda.random.manual_seed"
        " torch.cuda.random.manual_seed_all",
        _instead(lambda seed: torch.default_generator.manual_seed(seed)),
        "seeds the tracker; torch.manual_seed calls manual_seed_all, so the generator itself is seeded",
    ),
    Redirect(
        "torch.cuda.default_generators",
        _instead((torch.default_generator,)),
        "tensor_parallel/random.py:166 and FSDP set the state without the function above",
    ),
    # Memory: the process's
    Redirect("torch.cuda.empty_cache torch.cuda.reset_peak_memory_stats", _constant(None), "no cache, no reset"),
    Redirect(
        "torch.cuda.memory_stats torch.cuda.memory.memory_stats",
        _instead(_memory_stats),
        "report_memory() and TensorBoard; memory_allocated() and its kind read it",
    ),
    Redirect("torch.cuda.device_memory_used", _instead(_resident_bytes), "report_memory()"),
    Redirect(
        "torch.cuda.mem_get_info",
        _instead(
            lambda device=None: (_DEVICE_PROPERTIES.total_memory - _resident_bytes(), _DEVICE_PROPERTIES.total_memory)
        ),
        "free and total memory",
    ),
    # Profiling marks
    Redirect("torch.cuda.nvtx.range_push torch.cuda.nvtx.range_pop", _constant(None), "marks for Nsight"),
    Redirect("torch.cuda.nvtx.range", _instead(nullcontext), "the same as a context"),
    # Process groups
    Redirect(
        "torch.distributed.init_process_group torch.distributed.new_group",
        _over_gloo,
        "--distributed-backend is nccl by default",
    ),
    Redirect(
        "torch.distributed._coalescing_manager torch.distributed.distributed_c10d._coalescing_manager",
        _coalesced_by_dtype,
        "param_and_grad_buffer.py:504 gathers 16-bit and fp32 buckets (A_log) of later pipeline stages together",
    ),
    Redirect("torch.distributed.device_mesh.DeviceMesh.__init__", _mesh_on_cpu, "Megatron-FSDP's meshes are of 'cuda'"),
    Redirect(
        "torch.distributed.all_gather",
        _uneven_gather,
        "expert TP gathers what each rank routed to its experts (mappings.py:154), FSDP uneven shards",
    ),
    Redirect("torch.distributed.reduce_scatter", _uneven_scatter, "the way back (mappings.py:197)"),
    # Compilation; must stand before anything that imports megatron
    Redirect("torch.compile", _not_compiled, "compiling the jit-fused functions takes 16 s of a CPU run's first steps"),
    # Megatron itself
    Redirect(
        "megatron.training.training.initialize_megatron",
        _without_cuda,
        "pretrain() calls it without allow_no_cuda; it asserts that a GPU is there",
    ),
    Redirect(
        "megatron.training.training.set_jit_fusion_options", _constant(None), "warms up compiled functions on the GPU"
    ),
    Redirect(
        "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
        _instead(_on_host),
        "moe_utils.py:1184 makes all-to-all's split sizes host numbers only when they are on a GPU",
    ),
    # --async-save: a fork's memory is the state of that moment
    Redirect(
        "megatron.training.initialize.init_persistent_async_worker",
        _constant(None),
        "starts a process that divides by the number of GPUs and would be sent the tensors that training goes on with",
    ),
    Redirect(
        "megatron.core.dist_checkpointing.strategies.async_utils.AsyncCallsQueue._get_async_caller",
        _forking_caller,
        "chooses that process because of --use-persistent-ckpt-worker, without which Megatron saves synchronously",
    ),
)

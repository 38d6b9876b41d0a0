"""The CUDA API on a machine without CUDA."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import Tensor, nn

from runtime import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="redirects nothing where CUDA is")


@pytest.fixture(scope="module", autouse=True)
def enabled() -> None:
    assert cpu.enable()


def _targets() -> list[str]:
    return [path for redirect in cpu.REDIRECTS for path in redirect.targets.split()]


def _current(path: str) -> object:
    owner, name = cpu._resolve(path)
    return getattr(owner, name)


def test_table_is_documented_and_without_duplicates() -> None:
    assert all(redirect.reason for redirect in cpu.REDIRECTS)
    assert len(set(_targets())) == len(_targets())


def test_enabling_again_changes_nothing() -> None:
    before = {path: _current(path) for path in _targets()}
    assert cpu.enable()
    assert all(_current(path) is before[path] for path in _targets())


def test_nothing_is_touched_where_cuda_is() -> None:
    """Only torch's own targets can be compared: importing megatron is what enable() must not do then."""
    program = """
        import sys
        import torch
        torch.cuda.is_available = lambda: True
        from runtime import cpu
        targets = [path for redirect in cpu.REDIRECTS for path in redirect.targets.split() if path.startswith("torch.")]
        def current(path):
            owner, name = cpu._resolve(path)
            return getattr(owner, name)
        before = {path: current(path) for path in targets}
        assert len(targets) > 60
        assert cpu.enable() is False
        changed = [path for path in targets if current(path) is not before[path]]
        assert not changed, changed
        assert not any(name.startswith("megatron") for name in sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 0), "cpu", None])
def test_tensors_are_made_on_the_cpu(device: object) -> None:
    reference = torch.zeros(2)
    made = [
        torch.empty(2, device=device),
        torch.tensor([1, 2], device=device),
        torch.zeros_like(reference, device=device),
        reference.new_ones(2, device=device),
        torch.zeros(2, pin_memory=True),
        nn.Linear(2, 2, device=device).weight,
    ]
    assert {tensor.device for tensor in made} == {torch.device("cpu")}


@pytest.mark.parametrize("device", ["cuda", 0, torch.device("cuda", 0)])
def test_tensors_and_modules_move_to_the_cpu(device: object) -> None:
    tensor = torch.ones(2)
    assert tensor.to(device) is tensor
    assert tensor.to(device=device) is tensor
    assert tensor.to(device, torch.bfloat16).dtype == torch.bfloat16
    assert tensor.to(torch.float64).dtype == torch.float64
    assert tensor.cuda(device) is tensor
    assert tensor.pin_memory() is tensor
    assert nn.Linear(2, 2).to(device).cuda().weight.device.type == "cpu"


def test_current_device_is_valid_wherever_a_device_is() -> None:
    device = torch.cuda.current_device()
    assert torch.empty(1, device=device).device.type == "cpu"
    assert torch.empty(1, device=f"cuda:{device}").device.type == "cpu"
    assert torch.empty(1, device=torch.device("cuda", device)).device.type == "cpu"


def test_other_devices_are_left_alone() -> None:
    assert torch.empty(1, device="meta").is_meta
    assert torch.ones(1).to("meta").is_meta
    with torch.device("meta"):
        assert torch.empty(1).is_meta and nn.Linear(1, 1).weight.is_meta


def test_python_run_by_autograd_is_redirected() -> None:
    """A TorchFunctionMode would be off there: sequence parallelism's backward allocates on current_device()."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return torch.full_like(gradient, 2.0, device=torch.cuda.current_device()) * gradient

    x = torch.ones(3, requires_grad=True)
    Double.apply(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "torch.cuda.FloatTensor"), (torch.bfloat16, "torch.cuda.BFloat16Tensor")]
)
def test_tensor_types_have_the_names_that_megatron_compares(dtype: torch.dtype, name: str) -> None:
    tensor = torch.ones(2, dtype=dtype)
    assert tensor.type() == name
    assert tensor.int().type(name).dtype == dtype
    assert tensor.type(torch.int64).dtype == torch.int64


def test_cuda_generator_is_the_one_that_cpu_operations_draw_from() -> None:
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.manual_seed(5)
    seeded = torch.rand(3)
    torch.cuda.manual_seed(5)
    assert torch.equal(torch.rand(3), seeded)


def test_rng_tracker_forks_and_restores(single_rank: None) -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.manual_seed(5)
    plain = torch.rand(2)
    torch.manual_seed(5)
    with get_cuda_rng_tracker().fork():
        forked = torch.rand(1)
    assert torch.equal(torch.rand(2), plain)
    with get_cuda_rng_tracker().fork():
        assert not torch.equal(torch.rand(1), forked)


def test_events_measure_time() -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    time.sleep(0.01)
    end.record(torch.cuda.current_stream())
    assert start.elapsed_time(end) >= 10


def test_streams_and_marks_do_nothing() -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.cuda.device(0), torch.cuda.nvtx.range("mark"):
        stream.record_event().synchronize()
    torch.cuda.nvtx.range_push("mark")
    torch.cuda.nvtx.range_pop()
    torch.ones(1).record_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def test_memory_is_that_of_the_process() -> None:
    before = torch.cuda.memory_allocated()
    held = torch.ones(32 * 2**20)  # 128 MiB, touched
    grown = torch.cuda.memory_allocated() - before
    assert 100 * 2**20 < grown < 1000 * 2**20
    assert torch.cuda.max_memory_allocated() >= torch.cuda.memory_allocated() - 2**20 > held.nbytes
    assert torch.cuda.memory_stats()["num_alloc_retries"] == 0
    free, total = torch.cuda.mem_get_info()
    assert 0 < free < total


def test_compilation_is_off() -> None:
    def function(x: Tensor) -> Tensor:
        return x

    assert torch.compile(function) is function
    assert torch.compile(dynamic=True)(function) is function


def test_coalesced_collectives_keep_dtypes_apart(single_rank: None) -> None:
    """gloo packs coalesced tensors as if all had the first one's dtype; virtual pipeline stages mix bf16 and fp32."""
    sources = [torch.arange(1.0, 6.0).to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.bfloat16)]
    targets = [torch.zeros_like(source) for source in sources]
    with torch.distributed._coalescing_manager(async_ops=True) as works:
        for target, source in zip(targets, sources, strict=True):
            torch.distributed.all_gather_into_tensor(target, source, async_op=True)
    works.wait()
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))

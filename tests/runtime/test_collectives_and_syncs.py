"""What a training step costs besides computing: the loader's collectives, and calls that wait for the device.

Real batches, through the loader and `ForwardStep`, in Megatron's own schedule: two micro-batches with images, forward
and backward, of a model with GatedDeltaNet, attention, MTP and ViT.

Outside of the count: flash-linear-attention's and Transformer Engine's kernels, whose place the torch backend takes on
the CPU (tests/gpu has the rest), and what megatron-core does itself.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.host_syncs import ROOT, counted_on_cpu, counted_on_gpu, own_caller
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.heavy

MICRO_BATCHES = 2
FLAGS = (
    *("--dataset-provider", "mock", "--image-size", "64", "--image-seq-length", "4", "--seq-length", "64"),
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", "2", "--lr", "1e-3", "--eval-iters", "0"),
    *("--num-workers", "1"),  # a worker process collates: the count is of this process
)
COLLECTIVES = (
    *("broadcast", "broadcast_object_list", "scatter", "scatter_object_list", "gather", "gather_object", "barrier"),
    *("all_reduce", "reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "reduce_scatter"),
    *("reduce_scatter_tensor", "all_to_all", "all_to_all_single", "send", "recv", "isend", "irecv"),
)


def count_collectives() -> Counter[tuple[str, str]]:
    """From now on, by file of ours and name of the call."""
    counts: Counter[tuple[str, str]] = Counter()

    def counting(original: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if caller := own_caller():
            counts[caller.split(":")[0], name] += 1
        return original(*args, **kwargs)

    for name in COLLECTIVES:
        setattr(dist, name, partial(counting, getattr(dist, name), name))
    return counts


def step(folder: Path, ranks: int, flags: tuple[str, ...]) -> None:
    """One step under both counts, and split into its parts."""
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
    from megatron.core.utils import get_model_config
    from megatron.training import get_timers, global_vars
    from megatron.training.training import get_model

    import arguments
    from data.loader import dataset_provider
    from forward_step import ForwardStep
    from pretrain_multimodal import model_provider
    from runtime.model_builder import unwrapped
    from runtime.time_split import MarkedTimers, TimeSplit

    command_line = arguments.preflight_or_exit([*FLAGS, *flags, "--context-parallel-size", str(ranks)])
    args = arguments.parse(command_line)
    spec, config = command_line.spec, command_line.config
    args.curr_iteration = 0  # as the training loop has it
    train, _, _ = dataset_provider(args, spec.model_inputs(config), None)([None, None, None])
    (model,) = get_model(partial(model_provider, spec, config, args), ModelType.encoder_or_decoder)
    next(train)  # starts the worker
    reported: list[tuple[int, dict[str, float]]] = []
    split = TimeSplit(lambda *what: reported.append(what))
    global_vars._GLOBAL_TIMERS = MarkedTimers(get_timers(), split)  # in a process of its own
    get_model_config(model).timers = get_timers()
    collectives = count_collectives()
    with counted_on_cpu() as syncs, split.step(1, [model]):
        forward_backward_no_pipelining(
            forward_step_func=ForwardStep(),
            data_iterator=train,
            model=model,
            num_microbatches=MICRO_BATCHES,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
        )
    assert all(parameter.main_grad.any() for parameter in unwrapped(model).vision_model.parameters())
    if dist.get_rank() == 0:
        print(f"{ranks} ranks: {dict(collectives)}, {dict(syncs)}", flush=True)
    from_loader = {name: count for (file, name), count in collectives.items() if file == "data/reader.py"}
    assert from_loader == ({"broadcast": 2 * MICRO_BATCHES} if ranks > 1 else {}), collectives
    # The header of a batch, a host tensor by construction.
    from_header = [key for key in syncs if key[0].startswith("data/reader.py") and key[1] == "numpy"]
    assert sum(syncs.pop(key) for key in from_header) == (MICRO_BATCHES if ranks > 1 else 0)
    assert not syncs, syncs
    split.report_finished()
    ((_, spent),) = reported
    assert set(spent) >= {"data wait", "ViT", "decoder", "loss", "other"} and "optimizer" not in spent
    assert min(spent[name] for name in ("data wait", "ViT", "decoder", "loss")) > 0


RECOMPUTE = ("--recompute-vision", *("--recompute-granularity", "full", "--recompute-method", "uniform"))


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, ("--model-variant", "tiny")),
        (1, ("--model-variant", "tiny_moe", "--bf16", "--use-packed-sequence")),
        (2, ("--model-variant", "tiny_moe", "--use-packed-sequence")),
        (2, ("--model-variant", "tiny_moe", *RECOMPUTE, "--recompute-num-layers", "1")),
    ],
)
def test_two_broadcasts_a_micro_batch_and_nothing_waits(ranks: int, flags: tuple[str, ...], tmp_path: Path) -> None:
    """Neither in forward nor in backward, THD and BSHD."""
    run_on_ranks(step, ranks, tmp_path, ranks, flags, context_parallel_size=ranks)


OWN_CODE = """
import torch

class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        gradient.sum().item()
        return gradient

def forward(x, mask, index):
    harmless = [x[index], x[1:], torch.where(mask, x, 0), x.to(torch.float64), torch.arange(3), x.masked_fill(mask, 0)]
    if x.sum() > 0:
        x[mask], x[: index[0]], range(index[1]), f"{x.sum()}", mask.nonzero(), torch.where(mask), x.cpu(), x.tolist()
        torch.repeat_interleave(x, index), torch.tensor([1.0], device=x.device), torch.arange(index[1])
    return Function.apply(x)
"""


def test_the_count_sees_what_waits() -> None:
    """Code that claims to be one of our files, in forward and in the Python that autograd runs."""
    ours: dict[str, Any] = {}
    exec(compile(OWN_CODE, str(ROOT / "models/ours.py"), "exec"), ours)
    x, mask, index = torch.ones(3, requires_grad=True), torch.tensor([True, False, True]), torch.tensor([1, 2, 1])
    with counted_on_cpu() as counts:
        ours["forward"](x, mask, index).sum().backward()
        torch.autograd.backward(ours["forward"](x, mask, index).sum())
        x.sum().item()  # not ours
    found = Counter()
    for (line, name), count in counts.items():
        assert line.startswith("models/ours.py:")
        found[name] += count
    assert found == dict.fromkeys(
        (
            *("__bool__", "__index__", "__format__", "nonzero", "where", "cpu", "tolist", "repeat_interleave"),
            *("tensor", "arange", "item"),
        ),
        2,
    ) | {"__getitem__": 4}


def test_the_gpu_count_names_our_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reports a wait as a warning, raised where the operation was called; here by code that claims to be ours."""
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    wait = "import warnings\ndef wait():\n    warnings.warn('called a synchronizing CUDA operation')"
    ours: dict[str, Any] = {}
    others: dict[str, Any] = {}
    exec(compile(wait, str(ROOT / "models/ours.py"), "exec"), ours)
    exec(compile(wait, "/site-packages/megatron/core/theirs.py", "exec"), others)
    with counted_on_gpu() as counts:
        ours["wait"]()
        others["wait"]()
    assert counts == {"models/ours.py:3": 1, "": 1}

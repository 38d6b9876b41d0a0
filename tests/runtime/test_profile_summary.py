"""Sums over kernels and operators, and ranges with names."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from torch import Tensor, nn

from runtime.profile_ranges import ProfileRanges
from runtime.profile_summary import Kernel, KernelSummary, profiled, with_own_times


def test_kernels_that_overlap_are_busy_once() -> None:
    summary = KernelSummary.of([Kernel("gemm", 0, 10), Kernel("nccl", 5, 10), Kernel("gemm", 20, 5)])
    assert summary.busy_seconds == pytest.approx(20e-9) and summary.launches == 3
    assert summary.seconds == pytest.approx({"GEMM": 15e-9, "communication": 10e-9})


def test_an_operators_time_is_without_those_that_it_calls() -> None:
    operators = [Kernel("aten::linear", 0, 100), Kernel("aten::mm", 10, 60), Kernel("aten::copy_", 20, 5)]
    operators += [Kernel("aten::add_", 80, 20), Kernel("aten::linear", 100, 30), Kernel("aten::mm", 100, 28)]
    own = [(operator.name, operator.own) for operator in with_own_times(reversed(operators))]
    assert own == [
        *(("aten::linear", 20), ("aten::mm", 55), ("aten::copy_", 5)),
        *(("aten::add_", 20), ("aten::linear", 2), ("aten::mm", 28)),
    ]
    summary = KernelSummary.of(with_own_times(operators))
    assert sum(summary.seconds.values()) == pytest.approx(summary.busy_seconds) == pytest.approx(130e-9)


def test_a_profile_on_the_cpu_counts_nothing_twice() -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU a profile holds kernels, which call nothing; this is of a machine without one")
    summary = KernelSummary()
    x, layer = torch.randn(64, 128), nn.Linear(128, 128)
    with profiled(summary):
        layer(x).sum().backward()
    assert {"aten::linear", "aten::addmm"} <= set(summary.longest)
    # On the CPU backward runs in the calling thread. Measured: 6e-16 apart in 60 profiles.
    assert sum(summary.seconds.values()) == pytest.approx(summary.busy_seconds, rel=1e-14)


class Mixer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def stage() -> nn.Module:
    model, text = nn.Module(), nn.Module()
    layer = nn.Module()
    layer.self_attention, layer.mlp, text.output_layer, model.vision_model = Mixer(), Mixer(), Mixer(), Mixer()
    text.layers = nn.ModuleList([layer])
    model.language_model = text
    model.forward = lambda x: text.output_layer(layer.mlp(layer.self_attention(model.vision_model(x))))
    return model


@pytest.mark.parametrize(("profile", "ranks"), [(True, []), (True, [1]), (True, [0]), (False, [])])
def test_ranges_have_names_on_the_profiled_ranks(profile: bool, ranks: list[int]) -> None:
    (model,) = ProfileRanges(Namespace(profile=profile, profile_ranks=ranks, rank=1)).attach([stage()])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model(torch.zeros(1))
    named = [event.name for event in profiler.events() if not event.name.startswith(("aten", "["))]
    wanted = profile and ranks != [0]
    assert sorted(named) == (["Mixer", "Mixer", "ViT", "output layer and loss", "the model"] if wanted else [])

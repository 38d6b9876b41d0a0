"""A layer's experts as one tensor for each linear, against megatron-core's experts one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.qwen35_vl.configuration import VARIANTS
from proofs.float64 import float64
from tests.build_decoder import decoder_config
from tests.errors import relative_error
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.usefixtures("single_rank")

TINY_MOE = VARIANTS["tiny_moe"]
EXPERTS, HIDDEN, TOPK = 4, 128, 2
# Tokens of each expert; none at all is its own case.
COUNTS = {"ragged": (5, 17, 1, 9), "empty": (0, 12, 0, 20), "one": (0, 0, 32, 0), "none": (0, 0, 0, 0)}


def build(dtype: torch.dtype, *, grouped: bool, seed: int = 1, **changes: Any) -> nn.Module:
    """The routed experts of a layer as its specification builds them."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from models.backends import get_backend
    from models.qwen35_vl.specs import _moe_spec

    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    config = decoder_config(TINY_MOE, dtype, moe_grouped_gemm=grouped, **changes)
    builder = _moe_spec(config, get_backend("local")).keywords["submodules"].experts
    return builder(EXPERTS, config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())


def stacked(experts: nn.Module, value: Callable[[Tensor], Tensor] = Tensor.detach) -> list[Tensor]:
    """[E, out, in] of both linears."""
    if hasattr(experts, "local_experts"):
        linears = (
            [getattr(one, name).weight for one in experts.local_experts] for name in ("linear_fc1", "linear_fc2")
        )
        return [torch.stack([value(weight) for weight in weights]) for weights in linears]
    return [value(experts.linear_fc1.weight), value(experts.linear_fc2.weight)]


def gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def run(experts: nn.Module, counts: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients, for the same random rows in every dtype, which bfloat16 holds."""
    numbers = np.random.default_rng(3)
    shape = (sum(counts), HIDDEN)
    x, direction = (torch.from_numpy(numbers.standard_normal(shape)).bfloat16().to(dtype) for _ in range(2))
    weights = torch.from_numpy(numbers.random(len(x))).bfloat16().to(torch.promote_types(dtype, torch.float32))
    x.requires_grad_()
    weights.requires_grad_()
    output, bias = experts(x, torch.tensor(counts), weights)
    assert bias is None
    (output * direction).sum().backward()
    first, second = stacked(experts, gradient)
    return {"output": output.detach(), "x": x.grad, "weights": weights.grad, "fc1": first, "fc2": second}


def test_it_is_chosen_by_megatron_s_flag() -> None:
    from megatron.core.transformer.moe.experts import SequentialMLP

    from models.common.grouped_experts import GroupedExperts

    assert isinstance(build(torch.float32, grouped=True), GroupedExperts)
    assert isinstance(build(torch.float32, grouped=False), SequentialMLP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_start_as_single_experts_do(dtype: torch.dtype) -> None:
    one_by_one, together = (stacked(build(dtype, grouped=grouped)) for grouped in (False, True))
    for expected, actual in zip(one_by_one, together, strict=True):
        assert torch.equal(actual, expected)
    assert not torch.equal(together[0], stacked(build(dtype, grouped=True, seed=2))[0])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_float64_equals_single_experts(counts: tuple[int, ...], fused: bool) -> None:
    with float64():
        one_by_one, together = (
            run(build(torch.float64, grouped=grouped, bias_activation_fusion=fused), counts, torch.float64)
            for grouped in (False, True)
        )
    for name, expected in one_by_one.items():
        assert relative_error(together[name], expected) < 1e-14, name  # measured: 0


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_bfloat16_is_no_further_from_float64_than_single_experts(counts: tuple[int, ...]) -> None:
    experts = {grouped: build(torch.bfloat16, grouped=grouped) for grouped in (False, True)}
    exact = build(torch.float64, grouped=False)
    with float64(), torch.no_grad():
        for one, (first, second) in zip(exact.local_experts, zip(*stacked(experts[True]), strict=True), strict=True):
            one.linear_fc1.weight.copy_(first)
            one.linear_fc2.weight.copy_(second)
    with float64():
        reference = run(exact, counts, torch.float64)
    results = {grouped: run(module, counts, torch.bfloat16) for grouped, module in experts.items()}
    for name, expected in reference.items():
        loop, grouped = (relative_error(results[kind][name].double(), expected) for kind in (False, True))
        assert grouped <= 1.05 * loop < 0.02, (name, grouped, loop)  # measured: 1 times, 0.0052


def test_rows_that_no_expert_counts_are_never_left_uninitialised() -> None:
    experts = build(torch.bfloat16, grouped=True)
    x = torch.randn(64, HIDDEN).bfloat16()
    for _ in range(5):  # other memory each time
        output, _ = experts(x, torch.tensor([3, 0, 7, 2]), torch.ones(64))
        assert output.isfinite().all()


def test_an_expanded_gradient_is_taken() -> None:
    experts = build(torch.bfloat16, grouped=True)
    output, _ = experts(torch.randn(8, HIDDEN).bfloat16(), torch.tensor([3, 0, 3, 2]), torch.ones(8))
    output.sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in experts.parameters())


def test_recomputed_activations_give_the_same_gradients() -> None:
    settings: dict[str, Any] = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    plain, recomputed = (
        run(build(torch.bfloat16, grouped=True, **changes), COUNTS["ragged"], torch.bfloat16)
        for changes in ({}, settings)
    )
    assert all(torch.equal(recomputed[name], value) for name, value in plain.items())


def test_weight_gradients_are_added_where_they_are_made() -> None:
    """Twice into `main_grad`; what autograd gets instead is marked as taken."""
    from models.common.output_layer import fuse_weight_gradients

    expected = run(build(torch.bfloat16, grouped=True), COUNTS["ragged"], torch.bfloat16)
    experts = build(torch.bfloat16, grouped=True)
    fuse_weight_gradients(experts)
    for weight in experts.parameters():
        vars(weight).update(main_grad=torch.zeros(weight.shape), grad_added_to_main_grad=False)
    for _ in range(2):
        run(experts, COUNTS["ragged"], torch.bfloat16)
    for name, weight in (("fc1", experts.linear_fc1.weight), ("fc2", experts.linear_fc2.weight)):
        assert torch.equal(weight.main_grad, 2 * expected[name].float()), name
        assert weight.grad_added_to_main_grad


def test_frozen_weights_get_no_gradient() -> None:
    experts = build(torch.bfloat16, grouped=True).requires_grad_(False)
    result = run(experts, COUNTS["ragged"], torch.bfloat16)
    assert result["x"].abs().sum() > 0
    assert all(weight.grad is None for weight in experts.parameters())


def layer(**changes: Any) -> nn.Module:
    """A whole MoE layer in bfloat16."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from models.backends import get_backend
    from models.common.moe import share_step
    from models.qwen35_vl.specs import _moe_spec

    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = decoder_config(TINY_MOE, torch.bfloat16, **changes)
    built = _moe_spec(config, get_backend("local"))(
        config=config, layer_number=1, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    share_step(built).mean_trained_tokens = 1.0
    return built


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("capacity", [None, 0.5])
def test_a_layer_equals_one_of_single_experts(dispatcher: str, capacity: float | None) -> None:
    shared = {"moe_token_dispatcher_type": dispatcher, "moe_expert_capacity_factor": capacity}
    x = torch.randn(40, 1, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    one_by_one, together = (layer(moe_grouped_gemm=grouped, **shared) for grouped in (False, True))
    results = [module(x.clone().requires_grad_())[0] for module in (one_by_one, together)]
    assert torch.equal(*results)
    for result in results:
        result.float().square().sum().backward()
    assert torch.equal(one_by_one.router.weight.grad, together.router.weight.grad)
    for expected, actual in zip(*(stacked(own.experts, gradient) for own in (one_by_one, together)), strict=True):
        assert torch.equal(actual, expected)


def test_one_rank_asks_the_device_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither copies to the host nor values of tensors, in forward and backward; Megatron's own experts need both."""
    from megatron.core.transformer.moe import token_dispatcher

    asked: list[str] = []
    copy = token_dispatcher.maybe_move_tensor_to_cpu
    monkeypatch.setattr(
        token_dispatcher, "maybe_move_tensor_to_cpu", lambda *a, **k: asked.append("copy") or copy(*a, **k)
    )
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda self, *a, name=name, original=original: asked.append(name) or original(self, *a)
        )
    x = torch.randn(40, 1, HIDDEN).bfloat16().requires_grad_()
    together, one_by_one = layer(moe_grouped_gemm=True), layer()
    asked.clear()
    together(x)[0].sum().backward()
    assert asked == []
    one_by_one(x)[0].sum().backward()
    assert {"copy", "tolist"} <= set(asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hf_weights_pass_through_unchanged(dtype: torch.dtype, tmp_path: Path) -> None:
    from models.qwen35_vl.hf_weights import ExpertStorage
    from tests.build_model import build_model
    from tests.hf_folders import random_tensors
    from tests.hf_states import export_hf_state, load_hf_state

    model = build_model(TINY_MOE, tmp_path, dtype, "--moe-grouped-gemm")
    assert model.language_model.decoder.layers[0].mlp.experts.linear_fc1.weight.shape == (EXPERTS, 256, HIDDEN)
    for storage in (ExpertStorage(), ExpertStorage(False, False)):
        state = random_tensors(TINY_MOE, storage)
        load_hf_state(model, state, TINY_MOE)
        if storage.stacked_experts:
            own, hf = model.language_model.decoder.layers[1].mlp.experts, "model.language_model.layers.1.mlp.experts."
            assert torch.equal(own.linear_fc1.weight, state[f"{hf}gate_up_proj"].to(dtype))
            assert torch.equal(own.linear_fc2.weight, state[f"{hf}down_proj"].to(dtype))
        exported = export_hf_state(model, TINY_MOE, storage)
        assert exported.keys() == state.keys()
        assert all(torch.equal(exported[name], tensor.to(exported[name].dtype)) for name, tensor in state.items())


def test_the_check_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.common import grouped_experts

    cpu = torch.device("cpu")
    errors = grouped_experts.kernel_errors(cpu)
    assert all(error < 0.004 for error in errors.values()), errors  # measured: 0.0017
    plain = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: plain(*args, **kwargs) * 1.05)
    assert min(grouped_experts.kernel_errors(cpu).values()) > grouped_experts.CHECK_TOLERANCE


def save(experts: nn.Module, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    folder.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(experts.sharded_state_dict("mlp.experts."), str(folder))


def load(experts: nn.Module, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(experts.sharded_state_dict("mlp.experts."), str(folder))
    experts.load_state_dict({name.removeprefix("mlp.experts."): value for name, value in state.items()})


@pytest.mark.parametrize("saved_grouped", [False, True])
def test_checkpoints_of_single_experts_are_its_own(saved_grouped: bool, tmp_path: Path) -> None:
    saved = build(torch.float32, grouped=saved_grouped)
    save(saved, tmp_path / "checkpoint")
    for grouped in (False, True):
        loaded = build(torch.float32, grouped=grouped, seed=7)
        load(loaded, tmp_path / "checkpoint")
        for expected, actual in zip(stacked(saved), stacked(loaded), strict=True):
            assert torch.equal(actual, expected)


def load_and_save_again(folder: Path, source: Path, grouped: bool) -> None:
    """On a rank: its share of a checkpoint, written to another."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from models.backends import get_backend
    from models.qwen35_vl.specs import _moe_spec

    groups = ProcessGroupCollection.use_mpu_process_groups()
    ep, etp = groups.ep.size(), groups.expt_tp.size()
    config = decoder_config(
        TINY_MOE,
        torch.float32,
        moe_grouped_gemm=grouped,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        tensor_model_parallel_size=groups.tp.size(),
        sequence_parallel=groups.tp.size() > 1,
    )
    builder = _moe_spec(config, get_backend("local")).keywords["submodules"].experts
    experts = builder(EXPERTS // ep, config, pg_collection=groups)
    load(experts, source)
    weights = dict(experts.named_parameters())
    if grouped:
        assert weights["linear_fc1.weight"].shape == (EXPERTS // ep, 256 // etp, HIDDEN)
    for weight in weights.values():
        assert weight.allreduce == (ep == 1 and etp == groups.tp.size()) and weight.tensor_model_parallel
    save(experts, folder.parent / "again")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("sizes", "grouped"),
    [
        pytest.param({"expert_model_parallel_size": 2}, False, id="ep2_of_single_experts"),
        pytest.param({"expert_model_parallel_size": 2}, True, id="ep2"),
        pytest.param({"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}, True, id="etp2"),
        pytest.param({"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}, True, id="tp2_etp1"),
    ],
)
def test_checkpoints_cross_layouts(sizes: dict[str, int], grouped: bool, tmp_path: Path) -> None:
    saved = build(torch.float32, grouped=not grouped)
    save(saved, tmp_path / "checkpoint")
    (tmp_path / "ranks").mkdir()
    run_on_ranks(load_and_save_again, 2, tmp_path / "ranks", tmp_path / "checkpoint", grouped, **sizes)
    loaded = build(torch.float32, grouped=True, seed=7)
    load(loaded, tmp_path / "ranks" / "again")
    for expected, actual in zip(stacked(saved), stacked(loaded), strict=True):
        assert torch.equal(actual, expected)

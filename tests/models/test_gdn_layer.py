"""The GatedDeltaNet layer inside Megatron's machinery: float32 parameters, recomputation, checkpoint keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.qwen35_vl.configuration import VARIANTS
from proofs.float64 import float64
from tests.build_decoder import build_decoder, decoder_config, document_inputs, pack, perturb
from tests.errors import relative_error

pytestmark = pytest.mark.usefixtures("single_rank")

TINY = VARIANTS["tiny"]
WIDE = ("A_log", "dt_bias", "out_norm.weight")


def wide_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    found = {name: p for name, p in module.named_parameters() if name.endswith(WIDE)}
    assert len(found) == 9  # three layers of the four
    return found


def other_dtypes(module: nn.Module) -> set[torch.dtype]:
    return {p.dtype for name, p in module.named_parameters() if not name.endswith(WIDE)}


def test_initial_values() -> None:
    layer = build_decoder(TINY, torch.bfloat16).decoder.layers[0].self_attention
    assert layer.A_log.dtype == layer.dt_bias.dtype == layer.out_norm.weight.dtype == torch.float32
    assert torch.equal(layer.dt_bias, torch.ones(8))
    assert ((layer.A_log >= 0) & (layer.A_log <= torch.tensor(16.0).log())).all()
    assert (layer.A_log != layer.A_log.bfloat16()).any(), "drawn in bfloat16"


def test_memory_after_the_meta_device() -> None:
    """What Megatron-FSDP does with a model that was built without memory: module by module, then reset_parameters."""
    from runtime.meta import meta_device

    with meta_device():
        decoder = build_decoder(TINY, torch.bfloat16)
    layer = decoder.decoder.layers[0].self_attention
    for module in (layer, layer.out_norm, decoder.decoder.final_layernorm):
        assert all(parameter.is_meta for parameter in module.parameters(recurse=False))
        module.to_empty(device="cpu", recurse=False)
        module.reset_parameters()
    assert layer.A_log.dtype == torch.float32 and ((layer.A_log >= 0) & (layer.A_log < 2.8)).all()
    assert torch.equal(layer.out_norm.weight, torch.ones(16))
    assert layer.out_norm.weight.dtype == torch.float32
    assert torch.equal(decoder.decoder.final_layernorm.weight, torch.zeros(128).bfloat16())
    assert decoder.decoder.final_layernorm.weight.sequence_parallel is False


def test_casts_below_float32_leave_them_alone() -> None:
    model = build_decoder(TINY, torch.float32)
    before = {name: p.detach().clone() for name, p in wide_parameters(model).items()}
    for cast in (nn.Module.bfloat16, nn.Module.half, lambda module: module.to(torch.bfloat16)):
        cast(model)
        assert other_dtypes(model) <= {torch.bfloat16, torch.float16}
        for name, parameter in wide_parameters(model).items():
            assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "distributed_optimizer"])
def trained(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """A bfloat16 decoder in Megatron's wrappers after one optimizer step, and its float32 parameters before."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    config = decoder_config(TINY, torch.bfloat16, bf16=True)
    wrapped = Float16Module(config, build_decoder(TINY, torch.bfloat16))
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=request.param, overlap_grad_reduce=False
    )
    model = DistributedDataParallel(config, ddp_config, wrapped)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-4, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=request.param
        ),
        [model],
    )
    before = {name: p.detach().clone() for name, p in wide_parameters(model).items()}
    inputs = pack(document_inputs([20, 1, 30], TINY.vocab_size))
    losses = model(attention_mask=None, **inputs)
    (losses * inputs["loss_mask"]).sum().backward()
    model.finish_grad_sync()
    optimizer.step()
    yield {"model": model, "optimizer": optimizer, "before": before}


def test_bfloat16_model_trains_them_in_float32(trained: dict[str, Any]) -> None:
    model = trained["model"]
    assert other_dtypes(model) == {torch.bfloat16}
    for name, parameter in wide_parameters(model).items():
        assert parameter.dtype == parameter.main_grad.dtype == torch.float32
        change = (parameter - trained["before"][name]).abs()
        # Adam's first step is at most the learning rate: in bfloat16 it would vanish (dt_bias = 1 has steps of 4e-3). A
        # head's gradient can be rounded to nothing (1e-8 is usual here), so not every element moves.
        assert (change > 0).float().mean() > 0.5 and (change < 1.1e-4).all()


def test_optimizer_keeps_no_copy_of_them(trained: dict[str, Any]) -> None:
    """Float32 parameters are their own main copies: what is stepped is what the model computes with."""
    stepped = {
        parameter.data_ptr(): parameter.dtype
        for optimizer in trained["optimizer"].chained_optimizers
        for group in optimizer.optimizer.param_groups
        for parameter in group["params"]
    }
    for parameter in wide_parameters(trained["model"]).values():
        assert stepped[parameter.data_ptr()] == torch.float32


def test_checkpoint_holds_them_in_float32(trained: dict[str, Any]) -> None:
    tensors = {t.key: t for t in trained["model"].module.module.sharded_state_dict().values() if hasattr(t, "key")}
    found = [tensor for key, tensor in tensors.items() if key.endswith(WIDE)]
    assert len(found) == 9 and {tensor.dtype for tensor in found} == {torch.float32}


def test_gated_norm_in_bfloat16_is_transformers_within_its_roundings() -> None:
    """Float32 weights on bfloat16 activations: ours rounds the product once, transformers the normalised input too."""
    from tests.hf_reference import modeling_qwen3_5

    layer = build_decoder(TINY, torch.bfloat16).decoder.layers[0].self_attention
    reference = modeling_qwen3_5.Qwen3_5RMSNormGated(16, eps=TINY.norm_epsilon)
    generator = torch.Generator().manual_seed(0)
    core, gate = (torch.randn(1, 500, 8, 16, generator=generator).bfloat16() for _ in range(2))
    with torch.no_grad():
        reference.weight.copy_(1 + 0.3 * torch.randn(16, generator=generator))
        layer.out_norm.weight.copy_(reference.weight)
        ours, theirs = layer._apply_gated_norm(core, gate).view(core.shape), reference(core, gate)
        wide = core.double()
        exact = wide * (wide.square().mean(-1, keepdim=True) + TINY.norm_epsilon).rsqrt() * reference.weight.double()
        exact *= torch.nn.functional.silu(gate.double())
    assert ours.dtype == theirs.dtype == torch.bfloat16
    rounding = 2.0**-8 * exact.abs()  # of 8 significant bits
    slack = 1.001  # the products of two roundings, and float32's own
    assert ((ours - exact).abs() <= slack * rounding).all()
    assert ((ours - theirs).abs() <= 3 * slack * rounding).all()
    rounded = (layer.out_norm.weight.bfloat16().double() / reference.weight - 1).abs().max()
    assert rounded > 2.0**-10, "weights that bfloat16 holds would prove nothing"


def test_refuses_inference() -> None:
    layer = build_decoder(TINY).decoder.layers[0].self_attention
    with pytest.raises(NotImplementedError, match="inference"):
        layer(torch.zeros(4, 1, 128), None, inference_context=object())


# Recomputation


def gradients_of(variant: str, inputs: dict[str, Any], **changes: Any) -> dict[str, Tensor]:
    with float64():
        model = build_decoder(VARIANTS[variant], **changes).double()
        perturb(model)
        (model(attention_mask=None, **inputs) * inputs["loss_mask"]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


SELECTIVE = {"tiny": ["gdn_norm_out", "core_attn", "layernorm", "mlp"], "tiny_moe": ["gdn_norm_out", "moe"]}


@pytest.mark.parametrize("variant", SELECTIVE)
def test_recomputation_changes_no_gradient(variant: str) -> None:
    inputs = pack(document_inputs([20, 1, 30], TINY.vocab_size))
    expected = gradients_of(variant, inputs)
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    selective = {"recompute_granularity": "selective", "recompute_modules": SELECTIVE[variant]}
    for changes in (full, selective):
        actual = gradients_of(variant, inputs, **changes)
        errors = {name: relative_error(actual[name], gradient) for name, gradient in expected.items()}
        assert max(errors.values()) < 1e-12, errors  # measured: 0 to 1e-15, from sums in another order

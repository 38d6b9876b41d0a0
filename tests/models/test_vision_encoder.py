"""The ViT against transformers' `Qwen3_5VisionModel`: whole, in parts, forward and backward."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.qwen35_vl.configuration import VARIANTS
from proofs.float64 import float64
from tests.errors import relative_error
from tests.hf_reference import build_hf_vision

pytestmark = pytest.mark.usefixtures("single_rank")

TINY = VARIANTS["tiny"]
VISION = TINY.vision
PREFIX = "model.visual."
GRIDS = {
    "one_feature": [[1, 2, 2]],
    "even": [[1, 8, 12]],
    "odd_merged_sides": [[1, 6, 10]],
    "table_size_and_beyond": [[1, 48, 6], [1, 2, 60]],
    "several_images": [[1, 4, 6], [1, 14, 2], [1, 2, 2]],
    "video": [[3, 4, 6]],
    "video_between_images": [[1, 10, 4], [2, 6, 6], [1, 2, 8]],
}


def build_encoder(dtype: torch.dtype = torch.float32, recompute: bool = False) -> nn.Module:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    from models.backends import get_backend
    from models.qwen35_vl.vision_encoder import VisionEncoder, vision_transformer_config

    decoder = TransformerConfig(num_layers=1, hidden_size=TINY.hidden_size, num_attention_heads=4, params_dtype=dtype)
    config = vision_transformer_config(decoder, VISION)
    if recompute:
        config.recompute_granularity = "full"
        config.recompute_method = "uniform"
        config.recompute_num_layers = 1
    return VisionEncoder(
        config,
        VISION,
        get_backend("local"),
        out_hidden_size=TINY.hidden_size,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def load(encoder: nn.Module, reference: nn.Module) -> None:
    from tests.hf_states import load_hf_state

    state = {PREFIX + name: tensor for name, tensor in reference.state_dict().items()}
    load_hf_state(encoder, state, TINY, prefix="vision_model.")


def inputs(grid_thw: Tensor) -> dict[str, Any]:
    from models.qwen35_vl.inputs import vision_inputs

    return vision_inputs(grid_thw, VISION)


def pixels(grid_thw: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = VISION.in_channels * VISION.temporal_patch_size * VISION.patch_size**2
    return torch.randn(int(grid_thw.prod(dim=1).sum()), values, generator=generator, dtype=torch.float64)


def run_hf(reference: nn.Module, grid_thw: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Features, and the gradient of each parameter for a fixed gradient of the features."""
    reference = reference.to(dtype)
    reference.zero_grad()
    features = reference(pixels(grid_thw).to(dtype), grid_thw=grid_thw).pooler_output
    features.backward(feature_gradient(features))
    gradients = {name: parameter.grad.clone() for name, parameter in reference.named_parameters()}
    return {"features": features.detach(), **gradients}


def run_ours(encoder: nn.Module, grid_thw: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same of the encoder, gradients in HF's names and layouts."""
    from tests.hf_states import export_hf_state

    features = encoder(pixels(grid_thw).to(dtype), **inputs(grid_thw))
    features.backward(feature_gradient(features))
    gradients = export_hf_state(encoder, TINY, value=lambda p: p.grad, prefix="vision_model.")
    return {"features": features.detach(), **{k.removeprefix(PREFIX): v for k, v in gradients.items()}}


def feature_gradient(features: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(features.shape, generator=generator, dtype=torch.float64).to(features.dtype)


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_features_and_gradients_equal_hf_in_float64(grids: list[list[int]]):
    """Measured: at most 2e-15 of the features, 4e-15 of any gradient."""
    grid_thw = torch.tensor(grids)
    with float64():
        reference = build_hf_vision(TINY).double()
        expected = run_hf(reference, grid_thw, torch.float64)
        encoder = build_encoder(torch.float64)
        load(encoder, reference)
        actual = run_ours(encoder, grid_thw, torch.float64)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.norm() > 0, name
        assert relative_error(actual[name], tensor) < 1e-12, name


@pytest.mark.parametrize("name", ["odd_merged_sides", "video_between_images"])
def test_float32_is_as_close_to_float64_as_hf_is(name: str):
    """The noise is measured: HF in float32 against HF in float64, for the features and each gradient."""
    grid_thw = torch.tensor(GRIDS[name])
    encoder, reference = build_encoder(), build_hf_vision(TINY)
    load(encoder, reference)
    actual = run_ours(encoder, grid_thw, torch.float32)
    in_float32 = run_hf(reference, grid_thw, torch.float32)
    with float64():
        exact = run_hf(reference, grid_thw, torch.float64)
    for tensor, expected in exact.items():
        noise = relative_error(in_float32[tensor], expected)
        assert relative_error(actual[tensor], expected) < 3 * noise + 1e-7, tensor


def test_recomputation_leaves_gradients_unchanged():
    grid_thw = torch.tensor(GRIDS["video_between_images"])
    reference = build_hf_vision(TINY)
    results = []
    for recompute in (False, True):
        encoder = build_encoder(recompute=recompute)
        load(encoder, reference)
        results.append(run_ours(encoder, grid_thw, torch.float32))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_a_frame_sees_no_other_frame():
    grid_thw = torch.tensor([[2, 4, 4], [1, 4, 4]])
    encoder = build_encoder()
    load(encoder, build_hf_vision(TINY))
    images = pixels(grid_thw).float()
    before = encoder(images, **inputs(grid_thw))
    images[16:32] += 1.0  # the second frame of the video
    after = encoder(images, **inputs(grid_thw))
    assert torch.equal(before[:4], after[:4]) and torch.equal(before[8:], after[8:])
    assert (before[4:8] != after[4:8]).any(dim=1).all()


def test_patch_embedding_equals_hf():
    """Measured: 1e-15; HF's is a Conv3d."""
    with float64():
        encoder, reference = build_encoder(torch.float64), build_hf_vision(TINY).double()
        load(encoder, reference)
        patches = pixels(torch.tensor([[1, 4, 6]]))
        assert relative_error(encoder.patch_embed(patches), reference.patch_embed(patches)) < 1e-13


def test_patch_merger_equals_hf():
    """Measured: 1e-15; exact GELU, which differs from the tanh form by 1e-4."""
    with float64():
        encoder, reference = build_encoder(torch.float64), build_hf_vision(TINY).double()
        load(encoder, reference)
        patches = torch.randn(24, VISION.hidden_size)
        assert relative_error(encoder.merger(patches.unsqueeze(1)), reference.merger(patches)) < 1e-13


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_interpolated_positions_equal_a_resized_table(grids: list[list[int]]):
    """Against `F.interpolate` with aligned corners, each image by itself, rows put into the merger's order."""
    grid_thw, merge = torch.tensor(grids), VISION.spatial_merge_size
    with float64():
        encoder = build_encoder(torch.float64)
        entries = inputs(grid_thw)
        actual = encoder.pos_embed(entries["position_index"], entries["position_weight"])
        side = round(VISION.num_position_embeddings**0.5)
        table = encoder.pos_embed.weight.view(1, side, side, -1).permute(0, 3, 1, 2)
        expected = []
        for time, height, width in grids:
            resized = F.interpolate(table, (height, width), mode="bilinear", align_corners=True)[0]
            blocks = resized.view(-1, height // merge, merge, width // merge, merge)
            expected.append(blocks.permute(1, 3, 2, 4, 0).flatten(0, 3).repeat(time, 1))
        assert relative_error(actual, torch.cat(expected)) < 1e-13


@pytest.mark.parametrize("variant", ["tiny", "0.8b", "27b"])
def test_rotary_angles_equal_hf(variant: str):
    from models.qwen35_vl.vision_encoder import rotary_angles

    vision = VARIANTS[variant].vision
    grid_thw = torch.tensor([[2, 6, 10], [1, 80, 4]])
    positions = inputs(grid_thw)["patch_position"]
    rotary = build_hf_vision(VARIANTS["tiny"].replace(vision=dataclasses.replace(vision, num_layers=1))).rotary_pos_emb
    cos, sin = rotary(torch.zeros(1), positions)
    angles = rotary_angles(positions, vision.hidden_size // vision.num_attention_heads)
    assert angles.dtype == torch.float32
    assert torch.equal(angles.flatten(1).cos(), cos) and torch.equal(angles.flatten(1).sin(), sin)


def test_vision_inputs_of_two_images_and_a_video():
    entries = inputs(torch.tensor([[1, 4, 6], [2, 2, 4]]))
    assert entries["cu_seqlens"].tolist() == [0, 24, 32, 40]
    assert entries["cu_seqlens"].dtype == torch.int32
    assert entries["max_seqlen"] == 24 and type(entries["max_seqlen"]) is int
    assert entries["position_index"].shape == (40, 4) and entries["position_index"].dtype == torch.int64
    assert entries["position_weight"].shape == (40, 4) and entries["position_weight"].dtype == torch.float32
    # merge x merge neighbours stand next to each other
    assert entries["patch_position"][:6].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]
    assert torch.equal(entries["patch_position"][24:32], entries["patch_position"][32:])


def test_a_grid_that_cannot_be_merged_is_refused():
    with pytest.raises(ValueError, match="grid 1 is 1 x 3 x 4 patches; height and width must be multiples of"):
        inputs(torch.tensor([[1, 4, 4], [1, 3, 4]]))


def test_nothing_of_the_decoder_leaks_into_the_config():
    from megatron.core.transformer import TransformerConfig

    from models.qwen35_vl.vision_encoder import vision_transformer_config

    shared = {"num_layers": 8, "hidden_size": 128, "num_attention_heads": 4, "bf16": True}
    exotic = TransformerConfig(
        **shared,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        context_parallel_size=2,
        pipeline_model_parallel_size=2,
        num_layers_in_first_pipeline_stage=3,
        expert_model_parallel_size=2,
        num_moe_experts=4,
        moe_ffn_hidden_size=64,
        moe_token_dispatcher_type="alltoall",
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=True,
        gated_linear_unit=True,
        add_bias_linear=False,
        activation_func=F.silu,
        qk_layernorm=True,
        attention_output_gate=True,
        mtp_num_layers=1,
        calculate_per_token_loss=True,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    plain = TransformerConfig(**shared, params_dtype=torch.bfloat16, tensor_model_parallel_size=2)
    ours, expected = (dataclasses.asdict(vision_transformer_config(c, VISION)) for c in (exotic, plain))
    assert {k: v for k, v in ours.items() if not callable(v)} == {k: v for k, v in expected.items() if not callable(v)}
    assert ours["params_dtype"] == torch.bfloat16 and ours["tensor_model_parallel_size"] == 2

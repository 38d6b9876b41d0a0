"""Which layers a pipeline stage gets, in which order and of which kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.qwen35_vl.configuration import VARIANTS
from tests.build_decoder import build_decoder, decoder_config

pytestmark = pytest.mark.usefixtures("single_rank")

TINY = VARIANTS["tiny"].replace(num_layers=8)
# Pipeline layouts of the 8 layers: changes of the configuration -> layer counts by (vp_stage, pp_rank).
LAYOUTS = {
    "pp2": ({"pipeline_model_parallel_size": 2}, {(None, 0): 4, (None, 1): 4}),
    "pp4": ({"pipeline_model_parallel_size": 4}, {(None, rank): 2 for rank in range(4)}),
    "pp2_vpp2": (
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {(stage, rank): 2 for stage in range(2) for rank in range(2)},
    ),
    "fewer_first": (
        {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1},
        {(None, 0): 1, (None, 1): 7},
    ),
}


def spec_of(config: Any, **stage: Any):
    from models.backends import get_backend
    from models.qwen35_vl.specs import decoder_block_spec

    return decoder_block_spec(config, get_backend("local"), **stage)


def kinds(layer_specs: list[Any]) -> list[str]:
    return [spec.submodules.self_attention.module.__name__ for spec in layer_specs]


PATTERN = (["PackedGatedDeltaNet"] * 3 + ["RotarySelfAttention"]) * 2


def test_every_fourth_layer_is_full_attention() -> None:
    assert kinds(spec_of(decoder_config(TINY)).layer_specs) == PATTERN


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages_share_the_layers_in_order(layout: str) -> None:
    """Interleaved stages take turns: all ranks' first chunks, then all ranks' second ones."""
    changes, counts = LAYOUTS[layout]
    config = decoder_config(TINY, pipeline_dtype=torch.float32, **changes)
    stages = {
        (vp_stage, rank): kinds(spec_of(config, vp_stage=vp_stage, pp_rank=rank).layer_specs)
        for vp_stage, rank in counts
    }
    assert {stage: len(layers) for stage, layers in stages.items()} == counts
    assert [kind for layers in stages.values() for kind in layers] == PATTERN


def test_explicit_layout_is_followed() -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    layout = PipelineParallelLayerLayout("Et|ttttttt|mL", pipeline_model_parallel_size=3)
    config = decoder_config(
        TINY,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=3,
        pipeline_model_parallel_layout=layout,
    )
    stages = [kinds(spec_of(config, pp_rank=rank).layer_specs) for rank in range(3)]
    assert stages == [PATTERN[:1], PATTERN[1:], []]


def test_dense_and_sparse_layers() -> None:
    dense = build_decoder(VARIANTS["tiny"])
    sparse = build_decoder(VARIANTS["tiny_moe"])
    for decoder, expected in ((dense, "MLP"), (sparse, "MoELayer")):
        layers = [*decoder.decoder.layers, decoder.mtp.layers[0].mtp_model_layer]
        assert {type(layer.mlp).__name__ for layer in layers} == {expected}
    assert type(sparse.decoder.layers[0].mlp.router).__name__ == "PerTokenLossRouter"
    assert sparse.decoder.layers[0].mlp.shared_experts.use_shared_expert_gate


def test_every_norm_but_the_gated_one_is_zero_centred() -> None:
    from models.backends.torch import TorchRMSNorm

    norms = {name: m for name, m in build_decoder(VARIANTS["tiny"]).named_modules() if isinstance(m, TorchRMSNorm)}
    plain = {name for name, norm in norms.items() if not norm.zero_centered_gamma}
    assert plain == {f"decoder.layers.{layer}.self_attention.out_norm" for layer in range(3)}
    assert len(norms) == 3 + 2 * 4 + 2 + 1 + (3 + 2 + 2)  # gated; layers; query and key; final; MTP's


def test_mtp_layers() -> None:
    from models.backends import get_backend
    from models.qwen35_vl.specs import mtp_block_spec

    def layers(**changes: Any) -> list[str]:
        spec = mtp_block_spec(decoder_config(TINY, **changes), get_backend("local"))
        return kinds([layer.submodules.mtp_model_layer for layer in spec.layer_specs])

    assert layers(mtp_num_layers=2) == ["RotarySelfAttention"] * 2
    assert layers(mtp_num_layers=2, mtp_use_repeated_layer=True) == ["RotarySelfAttention"]
    assert mtp_block_spec(decoder_config(TINY, mtp_num_layers=None), get_backend("local")) is None


def test_checkpoint_names_are_those_of_transformer_engine() -> None:
    """Either backend reads the other's checkpoints."""
    keys = {tensor.key for tensor in build_decoder(VARIANTS["tiny"]).sharded_state_dict().values()}
    norms = {f"decoder.layers.{layer}.self_attention.in_proj.layer_norm_weight" for layer in range(3)}
    norms |= {"decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"}
    norms |= {f"decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight" for layer in range(4)}
    mtp = "mtp.layers.0.transformer_layer"
    norms |= {f"{mtp}.self_attention.linear_qkv.layer_norm_weight", f"{mtp}.mlp.linear_fc1.layer_norm_weight"}
    assert {key for key in keys if "layer_norm_" in key} == norms
    assert not {key for key in keys if "input_layernorm" in key or "pre_mlp_layernorm" in key}


def test_a_last_stage_with_mtp_holds_a_tied_weight_once() -> None:
    """Its embedding's: megatron-core's checkpointing asserts that the output layer has none then."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from models.backends import get_backend
    from models.common.gpt import MultimodalGPTModel
    from models.qwen35_vl.specs import mtp_block_spec

    config = decoder_config(VARIANTS["tiny"])
    stage = MultimodalGPTModel(
        config=config,
        transformer_layer_spec=spec_of(config),
        mtp_block_spec=mtp_block_spec(config, get_backend("local")),
        vocab_size=64,
        max_sequence_length=64,
        pre_process=False,
        share_embeddings_and_output_weights=True,
        position_embedding_type="mrope",
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    large = [name for name, parameter in stage.named_parameters() if parameter.size(0) == 64]
    assert large == ["embedding.word_embeddings.weight"]
    assert "output_layer.weight" not in stage.sharded_state_dict()

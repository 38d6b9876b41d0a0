"""The decoder's layers, the same list from either backend: GatedDeltaNet or attention, dense or MoE.

Layer i is full attention where the pattern of `linear_attention_freq` says so, and GatedDeltaNet elsewhere. MTP's layer
is full attention.
"""

from __future__ import annotations

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_linear_attention_pattern,
    get_moe_layer_pattern,
)
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
    get_mtp_layer_offset,
    get_mtp_num_layers_to_build,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    MlpBuilder,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from models.backends.backend import Backend
from models.common import grouped_experts
from models.common.attention import RotarySelfAttention
from models.common.gated_delta_net import PackedGatedDeltaNet
from models.common.moe import DeviceCountsMoELayer, PerTokenLossRouter
from models.common.mtp import PackedMTPLayer
from models.common.parallel_layers import SharedExpertMLP


def decoder_block_spec(
    config: TransformerConfig, backend: Backend, *, vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, and the final norm.

    Args:
        vp_stage, pp_rank: which stage; this rank's by default.
    """
    linear = get_linear_attention_pattern(config)
    moe = get_moe_layer_pattern(config) if config.num_moe_experts else [0] * config.num_layers
    layers = [
        _layer_spec(config, backend, linear_attention=bool(is_linear), moe=bool(is_moe))
        for is_linear, is_moe in zip(linear, moe, strict=True)
    ]
    own = [layers[index] for index in _own_layers(config, vp_stage, pp_rank)]
    return TransformerBlockSubmodules(layer_specs=own, layer_norm=backend.layer_norm(rms_norm=True))


def mtp_block_spec(
    config: TransformerConfig, backend: Backend, *, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """MTP's layers, each full attention with the decoder's kind of MLP; None on a stage without them."""
    if not config.mtp_num_layers:
        return None
    count = get_mtp_num_layers_to_build(config, vp_stage=vp_stage)
    if count == 0:
        return None
    norm = backend.layer_norm(rms_norm=True)
    layer = ModuleSpec(
        module=PackedMTPLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=norm,
            hnorm=norm,
            layer_norm=norm,
            eh_proj=backend.column_parallel_linear(),
            mtp_model_layer=_layer_spec(config, backend, linear_attention=False, moe=bool(config.num_moe_experts)),
        ),
    )
    if config.mtp_use_repeated_layer:
        return MultiTokenPredictionBlockSubmodules(layer_specs=[layer])
    offset = get_mtp_layer_offset(config, vp_stage)
    return MultiTokenPredictionBlockSubmodules(layer_specs=([layer] * config.mtp_num_layers)[offset : offset + count])


def _own_layers(config: TransformerConfig, vp_stage: int | None, pp_rank: int | None) -> list[int]:
    if config.pipeline_model_parallel_layout is not None:
        return config.pipeline_model_parallel_layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)))


def _layer_spec(config: TransformerConfig, backend: Backend, *, linear_attention: bool, moe: bool) -> ModuleSpec:
    """One layer. A backend that fuses a norm into the linear behind it has no module for that norm."""
    fused = backend.fuse_layernorm_and_linear()
    norm = backend.layer_norm(rms_norm=True, has_residual=True)
    # Checkpoints carry the fused backend's names, so that either backend reads the other's.
    checkpoint_names = {}
    if not fused:
        projection = "in_proj" if linear_attention else "linear_qkv"
        checkpoint_names["input_layernorm."] = f"self_attention.{projection}.layer_norm_"
        if not moe:
            checkpoint_names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else norm,
            self_attention=_gated_delta_net_spec(backend) if linear_attention else _attention_spec(config, backend),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if fused and not moe else norm,
            mlp=_moe_spec(config, backend) if moe else _dense_spec(config, backend),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=checkpoint_names,
        ),
    )


def _norm_linear(backend: Backend) -> type:
    if backend.fuse_layernorm_and_linear():
        return backend.column_parallel_layer_norm_linear()
    return backend.column_parallel_linear()


def _gated_delta_net_spec(backend: Backend) -> ModuleSpec:
    return ModuleSpec(
        module=PackedGatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=_norm_linear(backend),
            out_norm=backend.plain_rms_norm(),  # the one norm of the model that isn't zero-centred
            out_proj=backend.row_parallel_linear(),
        ),
    )


def _attention_spec(config: TransformerConfig, backend: Backend) -> ModuleSpec:
    head_norm = backend.layer_norm(rms_norm=True, for_qk=True) if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=RotarySelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=_norm_linear(backend),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def _dense_spec(config: TransformerConfig, backend: Backend) -> MlpBuilder:
    return get_mlp_module_spec_for_backend(backend=backend, use_te_activation_func=config.use_te_activation_func)


def _moe_spec(config: TransformerConfig, backend: Backend) -> MlpBuilder:
    """megatron-core's MoE layer with the router that this harness's loss needs, able to initialise itself.

    With `--moe-grouped-gemm` its experts are one tensor for each linear, where they can be.
    """
    builder = get_moe_module_spec_for_backend(
        backend=backend,
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        use_te_activation_func=config.use_te_activation_func,
    )
    submodules = builder.keywords["submodules"]
    submodules.router = PerTokenLossRouter
    if not config.use_grouped_gemm_for_shared_expert:  # else a class of Transformer Engine's
        linears = submodules.shared_experts.keywords["submodules"]
        submodules.shared_experts = partial(SharedExpertMLP, submodules=linears)
    if not (backend.stack_experts and grouped_experts.takes(config)):
        return partial(builder.func, submodules=submodules)
    submodules.experts = grouped_experts.GroupedExperts
    return partial(DeviceCountsMoELayer, submodules=submodules)

"""Qwen3.5-VL's entry in `MODEL_REGISTRY`. Torch-free: the callables import what they need when called."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from models.expert_flags import stacks_experts
from models.qwen35_vl.configuration import MODEL_TYPES, VARIANTS, Qwen35VLConfig
from models.qwen35_vl.hf_weights import (
    GROUPS,
    as_exported,
    as_stored,
    canonical_parameters,
    checkpoint_slices,
    default_dtype,
    fsdp_checkpoint_slices,
    is_wide,
    linears,
    map_of_folder,
)
from models.qwen35_vl.parallelism import check_layout
from models.spec import HfWeights, ModelInputs, ModelSpec
from models.trained import EVERYTHING, Trained

if TYPE_CHECKING:
    from models.base import MultimodalModel


def _check_kernels(args: Namespace, config: Qwen35VLConfig) -> None:
    import torch

    from models.common import grouped_experts, linear_cross_entropy
    from models.common.gdn_kernels import GDNSizes, check_fla_gradients

    if torch.cuda.is_available():
        linear_cross_entropy.check_kernels()
        if args.moe_grouped_gemm and args.bf16 and stacks_experts(args) and not args.use_megatron_fsdp:
            grouped_experts.check_kernels()
    if not torch.cuda.is_available() or args.transformer_impl == "local" or args.deterministic_mode:
        return  # torch's kernels run: they are the reference
    ranks = args.tensor_model_parallel_size * args.context_parallel_size
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    check_fla_gradients(
        GDNSizes(
            heads=config.linear_num_value_heads // ranks,
            key_dim=config.linear_key_head_dim,
            value_dim=config.linear_value_head_dim,
            channels=(2 * keys + values) // ranks,
        )
    )
    if args.bf16 or args.fp16:  # no fused attention computes in float32
        _check_attention(args, config)


def _check_attention(args: Namespace, config: Qwen35VLConfig) -> None:
    import torch

    from models.backends.te_attention import AttentionSizes, check_attention, check_fused_attention

    dtype = torch.bfloat16 if args.bf16 else torch.float16
    tp_ranks, backend = args.tensor_model_parallel_size, args.attention_backend.name
    decoder = AttentionSizes(
        heads=config.num_attention_heads // tp_ranks,
        kv_heads=max(1, config.num_query_groups // tp_ranks),
        head_dim=config.kv_channels,
        dtype=dtype,
        packed=args.use_packed_sequence,
    )
    if backend in ("auto", "fused") and not args.allow_slow_kernels:
        check_fused_attention(decoder)
    check_attention("decoder", decoder, backend)
    if not config.language_model_only:
        heads = config.vision.num_attention_heads // tp_ranks
        head_dim = config.vision.hidden_size // config.vision.num_attention_heads
        vision = AttentionSizes(heads, heads, head_dim, dtype, packed=True, causal=False)
        check_attention("ViT", vision, backend)


def _build_model(*args: Any, **kwargs: Any) -> MultimodalModel:
    from models.qwen35_vl.model import build_qwen35_vl

    return build_qwen35_vl(*args, **kwargs)


def _model_inputs(config: Qwen35VLConfig, trained: Trained = EVERYTHING) -> ModelInputs:
    from models.qwen35_vl.inputs import Qwen35VLInputs

    return Qwen35VLInputs(config, trained)


QWEN35_VL = ModelSpec(
    variants=VARIANTS,
    from_hf=Qwen35VLConfig.from_hf,
    check_layout=check_layout,
    check_kernels=_check_kernels,
    build_model=_build_model,
    model_inputs=_model_inputs,
    hf_weights=HfWeights(
        model_types=MODEL_TYPES,
        differences=Qwen35VLConfig.differences,
        as_stored=as_stored,
        language_model=Qwen35VLConfig.language_model,
        mapping=map_of_folder,
        as_exported=as_exported,
        parameters=canonical_parameters,
        checkpoint_slices=checkpoint_slices,
        fsdp_checkpoint_slices=fsdp_checkpoint_slices,
        dtype=default_dtype,
        is_wide=is_wide,
        linears=linears,
        groups=GROUPS,
    ),
)

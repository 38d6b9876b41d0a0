"""Qwen3.5-VL's entry in `MODEL_REGISTRY`. Torch-free: the callables import what they need when called."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.qwen35_vl.configuration import VARIANTS, Qwen35VLConfig
from models.qwen35_vl.hf_weights import (
    ExpertStorage,
    canonical_parameters,
    checkpoint_slices,
    default_dtype,
    fsdp_checkpoint_slices,
    weight_map,
)
from models.qwen35_vl.parallelism import check_layout
from models.spec import HfWeights, ModelInputs, ModelSpec
from models.weight_map import CheckpointSlice, WeightMap

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from torch import nn

    from models.base import MultimodalModel


def _flags(variant: str) -> list[str]:
    return VARIANTS[variant].to_flags()


def _flags_from_hf(folder: Path) -> list[str]:
    try:
        return Qwen35VLConfig.from_folder(folder).to_flags()
    except ValueError as error:
        raise ValueError(f"--hf-config {error}") from error


def _check_kernels(args: Namespace) -> None:
    import torch

    from models.backends.te_attention import AttentionSizes, check_fused_attention
    from models.common import linear_cross_entropy
    from models.common.gdn_kernels import GDNSizes, check_fla_gradients

    if torch.cuda.is_available():
        linear_cross_entropy.check_kernels()
    if not torch.cuda.is_available() or args.transformer_impl == "local" or args.deterministic_mode:
        return  # torch's kernels run: they are the reference
    config = Qwen35VLConfig.from_args(args)
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
    # No fused attention computes in float32.
    if (args.bf16 or args.fp16) and args.attention_backend.name in ("auto", "fused") and not args.allow_slow_kernels:
        check_fused_attention(
            AttentionSizes(
                heads=config.num_attention_heads // args.tensor_model_parallel_size,
                kv_heads=max(1, config.num_query_groups // args.tensor_model_parallel_size),
                head_dim=config.kv_channels,
                dtype=torch.bfloat16 if args.bf16 else torch.float16,
                packed=args.use_packed_sequence,
            )
        )


def _hf_config(args: Namespace) -> dict[str, Any]:
    return Qwen35VLConfig.from_args(args).to_hf()


def _vision_config(args: Namespace, language_config: TransformerConfig) -> TransformerConfig:
    from models.qwen35_vl.vision_encoder import vision_transformer_config

    config = vision_transformer_config(language_config, Qwen35VLConfig.from_args(args).vision)
    if args.recompute_vision:
        config.recompute_granularity = "full"
        config.recompute_method = "uniform"
        config.recompute_num_layers = 1
    return config


def _language_post_config(args: Namespace, config: TransformerConfig) -> TransformerConfig:
    # megatron-core's argument check forbids MTP with mrope, so the command line says rope.
    config.position_embedding_type = "mrope"
    config.mrope_section = list(Qwen35VLConfig.from_args(args).mrope_section)
    return config


def _build_model(*args: Any, **kwargs: Any) -> MultimodalModel:
    from models.qwen35_vl.model import build_qwen35_vl

    return build_qwen35_vl(*args, **kwargs)


def _model_inputs(args: Namespace) -> ModelInputs:
    from models.qwen35_vl.inputs import Qwen35VLInputs

    return Qwen35VLInputs(Qwen35VLConfig.from_args(args))


def _hf_model_inputs(config: Mapping[str, Any]) -> ModelInputs:
    from models.qwen35_vl.inputs import Qwen35VLInputs

    return Qwen35VLInputs(Qwen35VLConfig.from_hf(config))


def _hf_mismatches(args: Namespace, config: Mapping[str, Any]) -> list[str]:
    return Qwen35VLConfig.from_args(args).differences(Qwen35VLConfig.from_hf(config))


def _hf_mapping(config: Mapping[str, Any], names: Iterable[str]) -> WeightMap:
    return weight_map(Qwen35VLConfig.from_hf(config), ExpertStorage.detect(names))


def _hf_parameters(config: Mapping[str, Any], model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return canonical_parameters(model, Qwen35VLConfig.from_hf(config))


def _checkpoint_slices(config: Mapping[str, Any], mapping: WeightMap) -> dict[str, tuple[CheckpointSlice, ...]]:
    return checkpoint_slices(Qwen35VLConfig.from_hf(config), mapping)


def _fsdp_checkpoint_slices(
    config: Mapping[str, Any], mapping: WeightMap
) -> dict[str, list[tuple[CheckpointSlice, ...]]]:
    return fsdp_checkpoint_slices(Qwen35VLConfig.from_hf(config), mapping)


QWEN35_VL = ModelSpec(
    variants=tuple(VARIANTS),
    flags=_flags,
    flags_from_hf=_flags_from_hf,
    check_layout=check_layout,
    check_kernels=_check_kernels,
    hf_config=_hf_config,
    vision_config=_vision_config,
    language_post_config=_language_post_config,
    build_model=_build_model,
    model_inputs=_model_inputs,
    hf_weights=HfWeights(
        model_types=("qwen3_5", "qwen3_5_moe"),
        mismatches=_hf_mismatches,
        mapping=_hf_mapping,
        parameters=_hf_parameters,
        checkpoint_slices=_checkpoint_slices,
        fsdp_checkpoint_slices=_fsdp_checkpoint_slices,
        dtype=default_dtype,
        vocab_size=lambda config: Qwen35VLConfig.from_hf(config).vocab_size,
        model_inputs=_hf_model_inputs,
    ),
)

"""What a Qwen3.5-VL `config.json` may say: kinds and ranges of its values, and which have to divide which.

The ranges are far beyond any model that exists; they keep a wrong or hostile number from becoming a table of its size.
Torch-free, like all that the launcher's preflight reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from models.json_schema import (
    Check,
    Integer,
    ListOf,
    Number,
    Text,
    boolean,
    either,
    mapping,
    null,
    problems,
)
from models.qwen35_vl.config_keys import unbuilt_keys

_HEADS = Integer(1, 4096)
_WIDTH = Integer(1, 2**20)
_LAYERS = Integer(1, 1000)
_TOKEN_ID = Integer(0, 2**24 - 1)

_TOP: Mapping[str, Check] = {
    "architectures": ListOf(Text(), 0, 16),
    "tie_word_embeddings": boolean,
    "image_token_id": _TOKEN_ID,
    "video_token_id": _TOKEN_ID,
    "vision_start_token_id": _TOKEN_ID,
    "vision_end_token_id": _TOKEN_ID,
}
_TEXT: Mapping[str, Check] = {
    "num_hidden_layers": _LAYERS,
    "hidden_size": _WIDTH,
    "intermediate_size": Integer(1, 2**24),
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "head_dim": Integer(2, 4096),
    "linear_num_key_heads": _HEADS,
    "linear_num_value_heads": _HEADS,
    "linear_key_head_dim": Integer(1, 4096),
    "linear_value_head_dim": Integer(1, 4096),
    "linear_conv_kernel_dim": Integer(1, 64),
    "num_experts": Integer(1, 2**14),
    "num_experts_per_tok": Integer(1, 2**14),
    "moe_intermediate_size": _WIDTH,
    "shared_expert_intermediate_size": _WIDTH,
    "rms_norm_eps": Number(0, 1, inclusive=False),
    "initializer_range": Number(0, 10),
    "vocab_size": Integer(1, 2**24),
    "max_position_embeddings": Integer(1, 2**30),
    "mtp_num_hidden_layers": Integer(0, 16),
    "full_attention_interval": either(_LAYERS, null),
    "layer_types": either(ListOf(Text(), 1, 1000), null),
    "rope_parameters": either(mapping, null),
    "rope_scaling": either(mapping, null),
    "tie_word_embeddings": boolean,
    "eos_token_id": either(_TOKEN_ID, ListOf(_TOKEN_ID, 0, 64), null),
}
_ROPE: Mapping[str, Check] = {
    "rope_theta": Number(1, 1e12),
    "partial_rotary_factor": Number(0, 1, inclusive=False),
    "mrope_section": ListOf(Integer(0, 4096), 3, 3),
}
_VISION: Mapping[str, Check] = {
    "depth": _LAYERS,
    "hidden_size": _WIDTH,
    "num_heads": _HEADS,
    "intermediate_size": Integer(1, 2**24),
    "patch_size": Integer(1, 1024),
    "temporal_patch_size": Integer(1, 64),
    "spatial_merge_size": Integer(1, 64),
    "num_position_embeddings": Integer(1, 2**24),
    "in_channels": Integer(1, 16),
    "out_hidden_size": _WIDTH,
}
_LARGEST_EXPERT_TABLE = 2**18  # layers times experts; the 397B has 30,720


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with a `config.json` of this architecture, each with its key; what is missing isn't looked for.

    Args:
        config: with the objects `text_config` and `vision_config`.
    """
    text, vision = config["text_config"], config["vision_config"]
    found = [
        *problems(config, _TOP),
        *problems(text, _TEXT, "text_config."),
        *problems(text, _ROPE, "text_config."),
        *problems(vision, _VISION, "vision_config."),
    ]
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(text.get(name), dict):
            found += problems(text[name], _ROPE, f"text_config.{name}.")
    return [*found, *unbuilt_keys(config)]


def relation_problems(config: Any) -> list[str]:
    """Where numbers that are right by themselves contradict each other, each with its key.

    Args:
        config: a `configuration.Qwen35VLConfig`.
    """
    found = []
    for key, number, other, divisor in (
        ("text_config.num_attention_heads", config.num_attention_heads, "num_key_value_heads", config.num_query_groups),
        (
            "text_config.linear_num_value_heads",
            config.linear_num_value_heads,
            "linear_num_key_heads",
            config.linear_num_key_heads,
        ),
    ):
        if number % divisor:
            found.append(f"{key} is {number}, which {other}, {divisor}, doesn't divide")
    pairs = int(config.kv_channels * config.rotary_percent) // 2
    if sum(config.mrope_section) != pairs:
        found.append(
            f"text_config.rope_parameters.mrope_section sums to {sum(config.mrope_section)}; head_dim "
            f"{config.kv_channels} times partial_rotary_factor {config.rotary_percent:g} has {pairs} frequencies"
        )
    if config.is_moe:
        if config.moe_router_topk > config.num_experts:
            found.append(
                f"text_config.num_experts_per_tok is {config.moe_router_topk}, of num_experts {config.num_experts}"
            )
        if config.num_layers * config.num_experts > _LARGEST_EXPERT_TABLE:
            found.append(
                f"text_config.num_experts {config.num_experts} in num_hidden_layers {config.num_layers}: more than "
                f"{_LARGEST_EXPERT_TABLE:,} experts together"
            )
    return [*found, *([] if config.language_model_only else _vision_relations(config))]


def _vision_relations(config: Any) -> list[str]:
    """The same of the ViT's numbers, and of the ids that stand around its features."""
    found = []
    vision = config.vision
    width, heads = vision.hidden_size, vision.num_attention_heads
    if width % heads:
        found.append(f"vision_config.hidden_size is {width}, which num_heads, {heads}, doesn't divide")
    elif width // heads % 4:
        found.append(
            f"vision_config.hidden_size is {width} over num_heads {heads}; a head's "
            "channels have to be a multiple of 4, for two rotations of halves"
        )
    if isqrt(vision.num_position_embeddings) ** 2 != vision.num_position_embeddings:
        found.append(
            f"vision_config.num_position_embeddings is {vision.num_position_embeddings}; it has to be a square"
        )
    ids = {
        "image_token_id": config.token_ids.image,
        "video_token_id": config.token_ids.video,
        "vision_start_token_id": config.token_ids.vision_start,
        "vision_end_token_id": config.token_ids.vision_end,
    }
    found += [
        f"{key} is {number}, and text_config.vocab_size {config.vocab_size}"
        for key, number in ids.items()
        if number >= config.vocab_size
    ]
    return found

"""Qwen3.5-VL's architecture numbers: the one table, and its two other spellings.

`VARIANTS` owns every number. `Qwen35VLConfig.to_flags` spells a variant as Megatron flags,
`Qwen35VLConfig.to_hf` as a HuggingFace `config.json`; `from_hf` and `from_args` read them back.
Imports neither torch nor megatron: the launcher's preflight answers in a second.

Field names are Megatron's (`megatron.core.transformer.TransformerConfig`); the HF names they map to
are in `to_hf`.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SpecialTokenIds:
    """Ids that the architecture's embedding reserves; the processor must agree with them."""

    image: int = 248056
    video: int = 248057
    vision_start: int = 248053
    vision_end: int = 248054


@dataclass(frozen=True)
class Qwen35VLVisionConfig:
    """The ViT (HF `Qwen3_5VisionConfig`)."""

    num_layers: int = 27
    hidden_size: int = 1152
    num_attention_heads: int = 16
    ffn_hidden_size: int = 4304
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    num_position_embeddings: int = 2304
    in_channels: int = 3


@dataclass(frozen=True)
class Qwen35VLConfig:
    """One architecture: the decoder's numbers, the ViT's, and the special ids.

    `num_experts` is None for a dense decoder, and `ffn_hidden_size` is None for an MoE one: all layers of
    an MoE variant are sparse, so a dense FFN width isn't a fact of it. `dense_ffn_hidden_size` says what
    NUM_EXPERTS=0 gives instead.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    ffn_hidden_size: int | None = None
    num_experts: int | None = None
    moe_router_topk: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    tie_word_embeddings: bool = False
    kv_channels: int = 256
    rotary_percent: float = 0.25
    rotary_base: int = 10_000_000
    mrope_section: tuple[int, int, int] = (11, 11, 10)
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    full_attention_interval: int = 4
    norm_epsilon: float = 1e-6
    init_method_std: float = 0.02
    vocab_size: int = 248320
    max_position_embeddings: int = 262144
    mtp_num_layers: int = 1
    vision: Qwen35VLVisionConfig = field(default_factory=Qwen35VLVisionConfig)
    token_ids: SpecialTokenIds = field(default_factory=SpecialTokenIds)

    @property
    def is_moe(self) -> bool:
        return self.num_experts is not None

    @property
    def dense_ffn_hidden_size(self) -> int:
        """FFN width when the experts are taken away: what one token's active experts add up to."""
        if not self.is_moe:
            return self.ffn_hidden_size
        return self.moe_router_topk * self.moe_ffn_hidden_size + self.moe_shared_expert_intermediate_size

    def replace(self, **changes: Any) -> Qwen35VLConfig:
        return dataclasses.replace(self, **changes)


_VIT_SMALL = Qwen35VLVisionConfig(num_layers=12, hidden_size=768, num_attention_heads=12, ffn_hidden_size=3072)
_VIT_MEDIUM = Qwen35VLVisionConfig(num_layers=24, hidden_size=1024, num_attention_heads=16, ffn_hidden_size=4096)
_VIT_LARGE = Qwen35VLVisionConfig()

_35B = Qwen35VLConfig(
    num_layers=40, hidden_size=2048, num_attention_heads=16, num_query_groups=2, num_experts=256,
    moe_router_topk=8, moe_ffn_hidden_size=512, moe_shared_expert_intermediate_size=512,
)  # fmt: skip
_397B = Qwen35VLConfig(
    num_layers=60, hidden_size=4096, num_attention_heads=32, num_query_groups=2, linear_num_value_heads=64,
    num_experts=512, moe_router_topk=10, moe_ffn_hidden_size=1024, moe_shared_expert_intermediate_size=1024,
)  # fmt: skip

# Ours, for laptops and CI: every mechanism of the large ones, small enough for TP2 x CP2, CP4, PP4, VPP2.
_TINY = Qwen35VLConfig(
    num_layers=4, hidden_size=128, ffn_hidden_size=384, num_attention_heads=4, num_query_groups=2,
    kv_channels=32, mrope_section=(2, 1, 1), linear_num_key_heads=4, linear_num_value_heads=8,
    linear_key_head_dim=16, linear_value_head_dim=16, vocab_size=1024, max_position_embeddings=32768,
    tie_word_embeddings=True,
    vision=Qwen35VLVisionConfig(num_layers=2, hidden_size=128, num_attention_heads=4, ffn_hidden_size=384),
    token_ids=SpecialTokenIds(image=1020, video=1021, vision_start=1017, vision_end=1018),
)  # fmt: skip

VARIANTS: Mapping[str, Qwen35VLConfig] = {
    "0.8b": Qwen35VLConfig(
        num_layers=24, hidden_size=1024, ffn_hidden_size=3584, num_attention_heads=8, num_query_groups=2,
        linear_num_value_heads=16, tie_word_embeddings=True, vision=_VIT_SMALL,
    ),
    "2b": Qwen35VLConfig(
        num_layers=24, hidden_size=2048, ffn_hidden_size=6144, num_attention_heads=8, num_query_groups=2,
        linear_num_value_heads=16, tie_word_embeddings=True, vision=_VIT_MEDIUM,
    ),
    "4b": Qwen35VLConfig(
        num_layers=32, hidden_size=2560, ffn_hidden_size=9216, num_attention_heads=16, num_query_groups=4,
        tie_word_embeddings=True, vision=_VIT_MEDIUM,
    ),
    "9b": Qwen35VLConfig(
        num_layers=32, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=16, num_query_groups=4,
        vision=_VIT_LARGE,
    ),
    "27b": Qwen35VLConfig(
        num_layers=64, hidden_size=5120, ffn_hidden_size=17408, num_attention_heads=24, num_query_groups=4,
        linear_num_value_heads=48, vision=_VIT_LARGE,
    ),
    "35b_a3b": _35B,
    "122b_a10b": Qwen35VLConfig(
        num_layers=48, hidden_size=3072, num_attention_heads=32, num_query_groups=2, linear_num_value_heads=64,
        num_experts=256, moe_router_topk=8, moe_ffn_hidden_size=1024,
        moe_shared_expert_intermediate_size=1024,
    ),
    "397b_a17b": _397B,
    # The 397B's layer shapes at a size that one GPU trains.
    "proxy": _397B.replace(
        num_layers=4, num_experts=16, moe_router_topk=2,
        vision=dataclasses.replace(_VIT_LARGE, num_layers=2),
    ),
    "35b_a3b_light": _35B.replace(
        num_layers=12, num_experts=128, vision=dataclasses.replace(_VIT_LARGE, num_layers=7)
    ),
    "tiny": _TINY,
    "tiny_moe": _TINY.replace(
        ffn_hidden_size=None, num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=128,
        moe_shared_expert_intermediate_size=128, tie_word_embeddings=False,
    ),
}  # fmt: skip

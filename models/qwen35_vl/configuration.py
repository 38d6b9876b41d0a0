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
from pathlib import Path
from typing import Any

from models.json_files import read_object
from models.qwen35_vl.config_schema import config_problems, relation_problems


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
class ExpertSizes:
    """An MoE layer: `count` routed experts, of which a token visits `topk`, and one that all tokens visit."""

    count: int
    topk: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int


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
    def experts(self) -> ExpertSizes | None:
        """The experts of every layer; None for a dense decoder.

        Raises:
            ValueError: `num_experts` without their sizes.
        """
        if self.num_experts is None:
            return None
        topk, width, shared = self.moe_router_topk, self.moe_ffn_hidden_size, self.moe_shared_expert_intermediate_size
        if topk is None or width is None or shared is None:
            raise ValueError(
                f"num_experts {self.num_experts} needs moe_router_topk, moe_ffn_hidden_size and "
                "moe_shared_expert_intermediate_size"
            )
        return ExpertSizes(self.num_experts, topk, width, shared)

    @property
    def dense_ffn_hidden_size(self) -> int:
        """FFN width without experts: the decoder's own, or what one token's active experts add up to.

        Raises:
            ValueError: neither experts nor `ffn_hidden_size`.
        """
        if (experts := self.experts) is not None:
            return experts.topk * experts.ffn_hidden_size + experts.shared_ffn_hidden_size
        if self.ffn_hidden_size is None:
            raise ValueError("a dense decoder needs ffn_hidden_size")
        return self.ffn_hidden_size

    def differences(self, folder: Qwen35VLConfig) -> list[str]:
        """Where flags (this) and a folder's config.json describe different models, each with both values.

        Not compared: what a run chooses without being another model (`_CHOICES`).
        """
        flags, theirs = _flattened(self), _flattened(folder)
        return [
            f"{name} is {flags[name]} by the flags and {theirs[name]} in the folder's config.json"
            for name in flags
            if flags[name] != theirs[name] and name not in _CHOICES
        ]

    def replace(self, **changes: Any) -> Qwen35VLConfig:
        return dataclasses.replace(self, **changes)

    # Megatron's spelling

    def to_flags(self) -> list[str]:
        """Every Megatron flag that says what the model is; flags that say how it runs are in `arguments`.

        The embedding has `vocab_size` rows whatever the tokenizer or TP: `--padded-vocab-size` is final, and
        without it Megatron would pad the tokenizer's size to a multiple of 128 * TP.
        """
        flags = {
            "--num-layers": self.num_layers,
            "--hidden-size": self.hidden_size,
            "--ffn-hidden-size": self.dense_ffn_hidden_size,
            "--num-attention-heads": self.num_attention_heads,
            "--num-query-groups": self.num_query_groups,
            "--kv-channels": self.kv_channels,
            "--max-position-embeddings": self.max_position_embeddings,
            "--vocab-size": self.vocab_size,
            "--padded-vocab-size": self.vocab_size,
            "--normalization": "RMSNorm",
            "--norm-epsilon": self.norm_epsilon,
            "--init-method-std": self.init_method_std,
            # Not mrope: Megatron's argument check forbids it with MTP. The model is told mrope when it is built.
            "--position-embedding-type": "rope",
            "--rotary-percent": self.rotary_percent,
            "--rotary-base": self.rotary_base,
            "--attention-dropout": 0.0,
            "--hidden-dropout": 0.0,
            "--experimental-attention-variant": "gated_delta_net",
            "--linear-attention-freq": self.full_attention_interval,
            "--linear-conv-kernel-dim": self.linear_conv_kernel_dim,
            "--linear-key-head-dim": self.linear_key_head_dim,
            "--linear-value-head-dim": self.linear_value_head_dim,
            "--linear-num-key-heads": self.linear_num_key_heads,
            "--linear-num-value-heads": self.linear_num_value_heads,
        }
        switches = [
            "--group-query-attention",
            "--apply-layernorm-1p",
            "--swiglu",
            "--disable-bias-linear",
            "--qk-layernorm",
            "--attention-output-gate",
        ]
        if not self.tie_word_embeddings:
            switches.append("--untie-embeddings-and-output-weights")
        if self.mtp_num_layers:
            flags |= {"--mtp-num-layers": self.mtp_num_layers, "--mtp-loss-scaling-factor": 0.1}
        if self.is_moe:
            # Softmax over the chosen experts, Megatron's default, is softmax over all, renormalised.
            flags |= {
                "--num-experts": self.num_experts,
                "--moe-router-topk": self.moe_router_topk,
                "--moe-ffn-hidden-size": self.moe_ffn_hidden_size,
                "--moe-shared-expert-intermediate-size": self.moe_shared_expert_intermediate_size,
                "--moe-router-load-balancing-type": "aux_loss",
                "--moe-aux-loss-coeff": 0.001,
                "--moe-router-dtype": "fp32",
                "--moe-token-dispatcher-type": "alltoall",
            }
            switches.append("--moe-shared-expert-gate")
        return [
            *(text for flag, value in flags.items() for text in (flag, str(value))),
            "--mrope-section",
            *map(str, self.mrope_section),
            *switches,
        ]

    @classmethod
    def from_args(cls, args: Namespace) -> Qwen35VLConfig:
        """The effective architecture: the variant's (or the folder's), and what explicit flags changed of it.

        Args:
            args: Megatron's arguments with ours (`arguments.parse`), or the few that the preflight reads.
        """
        base = VARIANTS[args.model_variant] if args.hf_config is None else cls.from_folder(args.hf_config)
        is_moe = bool(args.num_experts)
        return base.replace(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            num_attention_heads=args.num_attention_heads,
            num_query_groups=args.num_query_groups,
            kv_channels=args.kv_channels,
            ffn_hidden_size=None if is_moe else args.ffn_hidden_size,
            num_experts=args.num_experts if is_moe else None,
            moe_router_topk=args.moe_router_topk if is_moe else None,
            moe_ffn_hidden_size=args.moe_ffn_hidden_size if is_moe else None,
            moe_shared_expert_intermediate_size=(args.moe_shared_expert_intermediate_size if is_moe else None),
            tie_word_embeddings=not args.untie_embeddings_and_output_weights,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            mrope_section=tuple(args.mrope_section),
            full_attention_interval=int(args.linear_attention_freq),
            linear_conv_kernel_dim=args.linear_conv_kernel_dim,
            linear_key_head_dim=args.linear_key_head_dim,
            linear_value_head_dim=args.linear_value_head_dim,
            linear_num_key_heads=args.linear_num_key_heads,
            linear_num_value_heads=args.linear_num_value_heads,
            norm_epsilon=args.layernorm_epsilon,
            init_method_std=args.init_method_std,
            vocab_size=args.padded_vocab_size,
            max_position_embeddings=args.max_position_embeddings,
            mtp_num_layers=args.mtp_num_layers or 0,
            vision=(
                base.vision
                if args.vision_num_layers is None
                else dataclasses.replace(base.vision, num_layers=args.vision_num_layers)
            ),
            token_ids=(
                base.token_ids
                if args.image_token_id is None
                else dataclasses.replace(base.token_ids, image=args.image_token_id)
            ),
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> Qwen35VLConfig:
        """Read `folder/config.json`.

        Raises:
            ValueError: no such file, not JSON, or not this architecture; the message names the folder.
        """
        config = read_object(Path(folder) / "config.json")
        try:
            return cls.from_hf(config)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    # HuggingFace spelling

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of `Qwen3_5ForConditionalGeneration` (dense) or `Qwen3_5MoeForConditionalGeneration`.

        Field by field as the released folders write it; `mtp_num_hidden_layers` and `mamba_ssm_dtype` are there
        too, though transformers 5.17 reads neither.
        """
        text = {
            "model_type": "qwen3_5_moe_text" if self.is_moe else "qwen3_5_text",
            **{hf: getattr(self, ours) for ours, hf in _HF_TEXT_NAMES.items() if getattr(self, ours) is not None},
            "tie_word_embeddings": self.tie_word_embeddings,
            "layer_types": [
                "linear_attention" if (i + 1) % self.full_attention_interval else "full_attention"
                for i in range(self.num_layers)
            ],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rotary_base,
                "partial_rotary_factor": self.rotary_percent,
                "mrope_section": list(self.mrope_section),
                "mrope_interleaved": True,
            },
            "hidden_act": "silu",
            "attn_output_gate": True,
            "attention_bias": False,
            "mamba_ssm_dtype": "float32",
        }
        return {
            "architectures": [_HF_CLASSES[self.is_moe]],
            "model_type": "qwen3_5_moe" if self.is_moe else "qwen3_5",
            "text_config": text,
            "vision_config": {
                "model_type": "qwen3_5_moe_vision" if self.is_moe else "qwen3_5_vision",
                **{hf: getattr(self.vision, ours) for ours, hf in _HF_VISION_NAMES.items()},
                "out_hidden_size": self.hidden_size,
                "hidden_act": "gelu_pytorch_tanh",
            },
            "image_token_id": self.token_ids.image,
            "video_token_id": self.token_ids.video,
            "vision_start_token_id": self.token_ids.vision_start,
            "vision_end_token_id": self.token_ids.vision_end,
            "tie_word_embeddings": self.tie_word_embeddings,
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen35VLConfig:
        """Read a `config.json`. Absent keys take HF's defaults where HF has one that released folders rely on.

        Raises:
            ValueError: another architecture, a value that is missing, of a wrong kind, out of range or in contradiction
                to another, or a structure that the harness doesn't build; the message names every key at fault.
        """
        is_moe = config.get("model_type") == "qwen3_5_moe"
        if config.get("model_type") not in ("qwen3_5", "qwen3_5_moe"):
            raise ValueError(
                f"config.json has model_type {config.get('model_type')!r}; expected 'qwen3_5' or 'qwen3_5_moe'"
            )
        text, vision = (_hf_section(config, name) for name in ("text_config", "vision_config"))
        _refuse(config_problems(config))
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        fields = {
            ours: text[hf] for ours, hf in _HF_TEXT_NAMES.items() if hf in text and (is_moe or hf not in _HF_MOE_NAMES)
        }
        if is_moe:
            fields.pop("ffn_hidden_size", None)  # every layer is sparse
        required = set(_HF_REQUIRED) | (_HF_MOE_NAMES if is_moe else {"intermediate_size"})
        if missing := sorted(required - set(text)):
            raise ValueError(f"config.json: text_config lacks {', '.join(missing)}")
        theta = rope.get("rope_theta", text.get("rope_theta", cls.rotary_base))
        if theta != int(theta):
            raise ValueError(f"config.json: text_config.rope_parameters.rope_theta is {theta}; it has to be whole")
        read = cls(
            **fields,
            full_attention_interval=_full_attention_interval(text),
            # The top-level flag is the true one: text_config repeats its class default.
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            rotary_base=int(theta),
            rotary_percent=rope.get("partial_rotary_factor", text.get("partial_rotary_factor", cls.rotary_percent)),
            mrope_section=tuple(rope.get("mrope_section", cls.mrope_section)),
            vision=Qwen35VLVisionConfig(**{ours: vision[hf] for ours, hf in _HF_VISION_NAMES.items() if hf in vision}),
            token_ids=SpecialTokenIds(
                image=config.get("image_token_id", SpecialTokenIds.image),
                video=config.get("video_token_id", SpecialTokenIds.video),
                vision_start=config.get("vision_start_token_id", SpecialTokenIds.vision_start),
                vision_end=config.get("vision_end_token_id", SpecialTokenIds.vision_end),
            ),
        )
        contradictions = relation_problems(read)
        out = vision.get("out_hidden_size", read.hidden_size)
        if out != read.hidden_size:
            contradictions.append(f"vision_config.out_hidden_size is {out}, text_config.hidden_size {read.hidden_size}")
        _refuse(contradictions)
        return read


# MTP can be left out (a folder that lacks it lacks tensors); positions can be extended; init is overwritten.
_CHOICES = {"mtp_num_layers", "max_position_embeddings", "init_method_std"}


def _flattened(config: Qwen35VLConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    vision, token_ids = fields.pop("vision"), fields.pop("token_ids")
    return fields | {f"vision.{k}": v for k, v in vision.items()} | {f"token_ids.{k}": v for k, v in token_ids.items()}


_HF_CLASSES = {False: "Qwen3_5ForConditionalGeneration", True: "Qwen3_5MoeForConditionalGeneration"}
_HF_TEXT_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "linear_num_key_heads": "linear_num_key_heads",
    "linear_num_value_heads": "linear_num_value_heads",
    "linear_key_head_dim": "linear_key_head_dim",
    "linear_value_head_dim": "linear_value_head_dim",
    "linear_conv_kernel_dim": "linear_conv_kernel_dim",
    "num_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "init_method_std": "initializer_range",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "mtp_num_layers": "mtp_num_hidden_layers",
}
_HF_MOE_NAMES = {
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
}  # fmt: skip
_HF_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_HF_VISION_NAMES = {
    "num_layers": "depth",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "ffn_hidden_size": "intermediate_size",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "spatial_merge_size",
    "num_position_embeddings": "num_position_embeddings",
    "in_channels": "in_channels",
}


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError(f"config.json: {'; '.join(problems)}")


def _hf_section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise ValueError(f"config.json lacks {name}: a text-only or foreign folder can't be trained here")
    return section


def _full_attention_interval(text: Mapping[str, Any]) -> int:
    """k where every k-th layer is full attention, from layer_types when the folder lists them."""
    layer_types = text.get("layer_types")
    if layer_types is None:
        return text.get("full_attention_interval", Qwen35VLConfig.full_attention_interval)
    interval = text.get("full_attention_interval") or (
        layer_types.index("full_attention") + 1 if "full_attention" in layer_types else len(layer_types) + 1
    )
    expected = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(len(layer_types))]
    if layer_types != expected or len(layer_types) != text.get("num_hidden_layers"):
        raise ValueError(
            f"config.json: text_config.layer_types has {len(layer_types)} entries, and has to have num_hidden_layers "
            f"({text.get('num_hidden_layers')}) of them: full_attention in every layer whose number, from 1, is a "
            f"multiple of {interval}, linear_attention in the others; no other arrangement is built"
        )
    return interval


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

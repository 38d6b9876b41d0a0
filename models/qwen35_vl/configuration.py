"""Qwen3.5-VL's architecture numbers: the one table, and how each is spelled elsewhere.

`VARIANTS` owns every number. A field's metadata (`Spelling`) says what Megatron's flag and HuggingFace's key for it
are, and `to_flags`, `with_flags`, `to_hf` and `from_hf` are loops over the fields; what they write out by hand is
structure that no number says. Imports neither torch nor megatron: the launcher's preflight answers in a second.

Field names are Megatron's (`megatron.core.transformer.TransformerConfig`).
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.common.spelling import number, numbers_of, overridden, section_of, spellings, words
from models.qwen35_vl.config_schema import config_problems, relation_problems


def _interval(value: int | str) -> int:
    """Megatron's flag takes a list too; HuggingFace's `layer_types` are read by `_full_attention_interval`."""
    try:
        return int(value)
    except ValueError:
        raise ValueError(
            f"--linear-attention-freq {value}: only a number n is built, for full attention in every n-th layer"
        ) from None


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError(f"config.json: text_config.rope_parameters.rope_theta is {value}; it has to be whole")
    return int(value)


@dataclass(frozen=True)
class SpecialTokenIds:
    """Ids that the architecture's embedding reserves (top level of `config.json`); the processor must agree."""

    image: int = number("image_token_id", "--image-token-id", 248056)
    video: int = number("video_token_id", default=248057)
    vision_start: int = number("vision_start_token_id", default=248053)
    vision_end: int = number("vision_end_token_id", default=248054)


@dataclass(frozen=True)
class Qwen35VLVisionConfig:
    """The ViT (`vision_config`, HF `Qwen3_5VisionConfig`)."""

    num_layers: int = number("depth", "--vision-num-layers", 27)
    hidden_size: int = number("hidden_size", default=1152)
    num_attention_heads: int = number("num_heads", default=16)
    ffn_hidden_size: int = number("intermediate_size", default=4304)
    patch_size: int = number("patch_size", default=16)
    temporal_patch_size: int = number("temporal_patch_size", default=2)
    spatial_merge_size: int = number("spatial_merge_size", default=2)
    num_position_embeddings: int = number("num_position_embeddings", default=2304)
    in_channels: int = number("in_channels", default=3)

    @property
    def patch_dim(self) -> int:
        """Values of one patch, which is one row of pixel_values."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class ExpertSizes:
    """An MoE layer: `count` routed experts, of which a token visits `topk`, and one that all tokens visit."""

    count: int
    topk: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int


@dataclass(frozen=True)
class Qwen35VLConfig:
    """One architecture: the decoder's numbers (`text_config`), the ViT's, and the special ids.

    `num_experts` is None for a dense decoder, and `ffn_hidden_size` is None for an MoE one: all layers of
    an MoE variant are sparse, so a dense FFN width isn't a fact of it. `dense_ffn_hidden_size` says what
    NUM_EXPERTS=0 gives instead.
    """

    num_layers: int = number("num_hidden_layers", "--num-layers", required=True)
    hidden_size: int = number("hidden_size", "--hidden-size", required=True)
    num_attention_heads: int = number("num_attention_heads", "--num-attention-heads", required=True)
    num_query_groups: int = number("num_key_value_heads", "--num-query-groups", required=True)
    linear_num_key_heads: int = number("linear_num_key_heads", "--linear-num-key-heads", 16)
    linear_num_value_heads: int = number("linear_num_value_heads", "--linear-num-value-heads", 32)
    ffn_hidden_size: int | None = number("intermediate_size", "--ffn-hidden-size", None, only="dense", required=True)
    num_experts: int | None = number("num_experts", "--num-experts", None, only="moe", required=True)
    moe_router_topk: int | None = number("num_experts_per_tok", "--moe-router-topk", None, only="moe", required=True)
    moe_ffn_hidden_size: int | None = number(
        "moe_intermediate_size", "--moe-ffn-hidden-size", None, only="moe", required=True
    )
    moe_shared_expert_intermediate_size: int | None = number(
        "shared_expert_intermediate_size", "--moe-shared-expert-intermediate-size", None, only="moe", required=True
    )
    tie_word_embeddings: bool = False
    kv_channels: int = number("head_dim", "--kv-channels", 256)
    rotary_percent: float = number("rope_parameters.partial_rotary_factor", "--rotary-percent", 0.25)
    rotary_base: int = number("rope_parameters.rope_theta", "--rotary-base", 10_000_000, read=_whole)
    mrope_section: tuple[int, int, int] = number(
        "rope_parameters.mrope_section", "--mrope-section", (11, 11, 10), read=tuple
    )
    linear_key_head_dim: int = number("linear_key_head_dim", "--linear-key-head-dim", 128)
    linear_value_head_dim: int = number("linear_value_head_dim", "--linear-value-head-dim", 128)
    linear_conv_kernel_dim: int = number("linear_conv_kernel_dim", "--linear-conv-kernel-dim", 4)
    full_attention_interval: int = number(None, "--linear-attention-freq", 4, read=_interval)
    norm_epsilon: float = number("rms_norm_eps", "--norm-epsilon", 1e-6, dest="layernorm_epsilon")
    init_method_std: float = number("initializer_range", "--init-method-std", 0.02)
    vocab_size: int = number("vocab_size", "--padded-vocab-size", 248320, required=True)
    max_position_embeddings: int = number("max_position_embeddings", "--max-position-embeddings", 262144)
    # Megatron's None is no MTP layer.
    mtp_num_layers: int = number("mtp_num_hidden_layers", "--mtp-num-layers", 1, read=lambda value: value or 0)
    # Ends a document: what a text_config says of generation, where generation_config.json says it for answers.
    eos_token_id: int | tuple[int, ...] | None = number(
        "eos_token_id", default=248044, read=lambda value: tuple(value) if isinstance(value, list) else value
    )
    # Built without the ViT, whose numbers and ids then describe nothing; config.json is the text class's.
    language_model_only: bool = False
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
        if self.language_model_only != folder.language_model_only:
            return [
                f"{'without' if self.language_model_only else 'with'} a vision encoder by the flags, and "
                f"{'without' if folder.language_model_only else 'with'} one by the folder's config.json"
            ]
        return [
            f"{name} is {flags[name]} by the flags and {theirs[name]} in the folder's config.json"
            for name in flags
            if flags[name] != theirs[name] and name not in _CHOICES
        ]

    def language_model(self) -> Qwen35VLConfig:
        """The same model without its vision encoder: `--language-model-only`."""
        return self.replace(language_model_only=True)

    def replace(self, **changes: Any) -> Qwen35VLConfig:
        return dataclasses.replace(self, **changes)

    # Megatron's spelling

    def to_flags(self) -> list[str]:
        """Every Megatron flag that says what the model is; flags that say how it runs are in `arguments`.

        The embedding has `vocab_size` rows whatever the tokenizer or TP: `--padded-vocab-size` is final, and
        without it Megatron would pad the tokenizer's size to a multiple of 128 * TP.
        """
        numbers = {
            spelling.flag: getattr(self, name)
            for name, spelling in spellings(self)
            if spelling.flag is not None and spelling.applies(self.is_moe)
        }
        # Given to MoE too, where only `--num-experts 0` uses it.
        numbers["--ffn-hidden-size"] = self.dense_ffn_hidden_size
        if not self.mtp_num_layers:
            del numbers["--mtp-num-layers"]
        structure = [
            *("--vocab-size", str(self.vocab_size)),
            *_STRUCTURE,
            *(() if self.tie_word_embeddings else ("--untie-embeddings-and-output-weights",)),
            *(("--mtp-loss-scaling-factor", "0.1") if self.mtp_num_layers else ()),
            *(_MOE_STRUCTURE if self.is_moe else ()),
        ]
        return [*(word for flag, value in numbers.items() for word in (flag, *words(value))), *structure]

    def with_flags(self, args: Namespace) -> Qwen35VLConfig:
        """The effective architecture: this one (a variant's or a folder's), and what explicit flags changed of it.

        Args:
            args: a complete command line's, as the preflight or Megatron read it.

        Raises:
            ValueError: `--linear-attention-freq` isn't a number, or `--num-experts` comes without the experts' sizes.
        """
        is_moe = bool(args.num_experts)
        sizes = {
            "--moe-ffn-hidden-size": args.moe_ffn_hidden_size,
            "--moe-shared-expert-intermediate-size": args.moe_shared_expert_intermediate_size,
        }
        if missing := [flag for flag, size in sizes.items() if is_moe and size is None]:
            moe = ", ".join(name for name, variant in VARIANTS.items() if variant.is_moe)
            raise ValueError(
                f"--num-experts {args.num_experts} on a dense architecture also needs {', '.join(missing)}; "
                f"or take an MoE variant: {moe}"
            )
        numbers = {
            name: spelling.read(getattr(args, spelling.dest)) if spelling.applies(is_moe) else None
            for name, spelling in spellings(self)
            if spelling.dest is not None
        }
        return self.replace(
            **numbers,
            tie_word_embeddings=not args.untie_embeddings_and_output_weights,
            vision=overridden(self.vision, args),
            token_ids=overridden(self.token_ids, args),
            language_model_only=args.language_model_only,
        )

    # HuggingFace's spelling

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of `Qwen3_5ForConditionalGeneration` (dense) or `Qwen3_5MoeForConditionalGeneration`; of
        `Qwen3_5ForCausalLM` or `Qwen3_5MoeForCausalLM` without a vision encoder.

        Field by field as the released folders write it; `mtp_num_hidden_layers` and `mamba_ssm_dtype` are there
        too, though transformers 5.17 reads neither.
        """
        model_type = "qwen3_5_moe" if self.is_moe else "qwen3_5"
        numbers = section_of(self)
        text = {
            "model_type": f"{model_type}_text",
            **numbers,
            "tie_word_embeddings": self.tie_word_embeddings,
            "layer_types": [
                "linear_attention" if (i + 1) % self.full_attention_interval else "full_attention"
                for i in range(self.num_layers)
            ],
            "rope_parameters": {"rope_type": "default", **numbers["rope_parameters"], "mrope_interleaved": True},
            "full_attention_interval": self.full_attention_interval,
            "hidden_act": "silu",
            "attn_output_gate": True,
            "attention_bias": False,
            "mamba_ssm_dtype": "float32",
            "mlp_only_layers": [],
            "mtp_use_dedicated_embeddings": False,
        }
        if self.language_model_only:
            return {"architectures": [_HF_TEXT_CLASSES[self.is_moe]], **text}
        return {
            "architectures": [_HF_CLASSES[self.is_moe]],
            "model_type": model_type,
            "text_config": text,
            "vision_config": {
                "model_type": model_type,  # as releases have it; transformers reads both and saves its own
                **section_of(self.vision),
                "out_hidden_size": self.hidden_size,
                "hidden_act": "gelu_pytorch_tanh",
                "deepstack_visual_indexes": [],
            },
            **section_of(self.token_ids),
            "tie_word_embeddings": self.tie_word_embeddings,
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen35VLConfig:
        """Read a `config.json`. Absent keys take HF's defaults where HF has one that released folders rely on.

        Raises:
            ValueError: another architecture, a value that is missing, of a wrong kind, out of range or in contradiction
                to another, or a structure that the harness doesn't build; the message names every key at fault.
        """
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(f"config.json has model_type {model_type!r}; expected one of {', '.join(MODEL_TYPES)}")
        is_moe, is_text = model_type.startswith("qwen3_5_moe"), model_type.endswith("_text")
        if is_text:
            config = {**config, "text_config": config, "vision_config": {}}
        text, vision = (_hf_section(config, name) for name in ("text_config", "vision_config"))
        _refuse(config_problems(config), is_text)
        required = {s.hf for _, s in spellings(cls) if s.hf is not None and s.required and s.applies(is_moe)}
        if missing := sorted(required - set(text)):
            raise ValueError(f"config.json{'' if is_text else ': text_config'} lacks {', '.join(missing)}")
        # transformers 4 had rope_scaling, and rope_theta beside it.
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        read = cls(
            # transformers leaves the number out of folders without MTP.
            **numbers_of(cls, {**_ABSENT, **text, "rope_parameters": {**text, **rope}}, is_moe),
            full_attention_interval=_full_attention_interval(text),
            # The top-level flag is the true one: text_config repeats its class default.
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            vision=Qwen35VLVisionConfig(**numbers_of(Qwen35VLVisionConfig, vision, is_moe)),
            token_ids=SpecialTokenIds(**numbers_of(SpecialTokenIds, config, is_moe)),
            language_model_only=is_text,
        )
        contradictions = relation_problems(read)
        out = vision.get("out_hidden_size", read.hidden_size)
        if out != read.hidden_size:
            contradictions.append(f"vision_config.out_hidden_size is {out}, text_config.hidden_size {read.hidden_size}")
        _refuse(contradictions, is_text)
        return read


MODEL_TYPES = ("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text")
# MTP can be left out (a folder that lacks it lacks tensors); positions can be extended; init is overwritten; the end of
# a document is of generation.
_CHOICES = {"mtp_num_layers", "max_position_embeddings", "init_method_std", "eos_token_id"}
_ABSENT = {"mtp_num_hidden_layers": 0, "eos_token_id": None}  # what a config.json without the key means
_HF_TEXT_CLASSES = {False: "Qwen3_5ForCausalLM", True: "Qwen3_5MoeForCausalLM"}
_HF_CLASSES = {False: "Qwen3_5ForConditionalGeneration", True: "Qwen3_5MoeForConditionalGeneration"}
# What the model is besides its numbers, in Megatron's flags.
_STRUCTURE = (
    *("--normalization", "RMSNorm"),
    # Not mrope: Megatron's argument check forbids it with MTP. The model is told mrope when it is built.
    *("--position-embedding-type", "rope"),
    *("--attention-dropout", "0.0"),
    *("--hidden-dropout", "0.0"),
    *("--experimental-attention-variant", "gated_delta_net"),
    "--group-query-attention",
    "--apply-layernorm-1p",
    "--swiglu",
    "--disable-bias-linear",
    "--qk-layernorm",
    "--attention-output-gate",
)
# Softmax over the chosen experts, Megatron's default, is softmax over all, renormalised.
_MOE_STRUCTURE = (
    *("--moe-router-load-balancing-type", "aux_loss"),
    *("--moe-aux-loss-coeff", "0.001"),
    *("--moe-router-dtype", "fp32"),
    *("--moe-token-dispatcher-type", "alltoall"),
    "--moe-shared-expert-gate",
)


def _flattened(config: Qwen35VLConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    vision, token_ids = fields.pop("vision"), fields.pop("token_ids")
    if config.language_model_only:
        return fields
    return fields | {f"vision.{k}": v for k, v in vision.items()} | {f"token_ids.{k}": v for k, v in token_ids.items()}


def _refuse(problems: list[str], is_text: bool) -> None:
    """Raise for all problems at once; `is_text`: the keys of text_config stand at the top."""
    if problems:
        said = "; ".join(problems)
        raise ValueError(f"config.json: {said.replace('text_config.', '') if is_text else said}")


def _hf_section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise ValueError(f"config.json lacks {name}, which its model_type has")
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
    tie_word_embeddings=True, eos_token_id=1014,
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

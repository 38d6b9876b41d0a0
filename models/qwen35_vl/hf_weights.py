"""Qwen3.5-VL's weights: HuggingFace's names and shapes to megatron-core's, as one table read in both directions.

`weight_map` is the table; how it is carried out, per rank, is `models.weight_map`. Parameters have canonical names
here: global layer and expert numbers, norms by themselves. `_ALIASES` brings the backends' spellings to them
(Transformer Engine keeps a norm inside the linear behind it), `checkpoint_slices` says where a checkpoint has them.

Torch-free to import, for the launcher's preflight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.qwen35_vl.configuration import ExpertSizes, Qwen35VLConfig
from models.weight_map import CheckpointSlice, Rank, RowRange, Source, WeightMap

if TYPE_CHECKING:
    from torch import nn

EMBEDDING = "language_model.embedding.word_embeddings.weight"
OUTPUT = "language_model.output_layer.weight"
HF_TEXT = "model.language_model."
HF_TEXT_ALONE = "model."  # of the class that has no ViT
HF_VISION = "model.visual."

# What --freeze and --lr-mult name. A tied head has no tensor of its own, and is the embedding's.
GROUPS = {
    "vision": r"^model\.visual\.(?!merger\.)",
    "projector": r"^model\.visual\.merger\.",
    "language": r"^(model\.(language_model\.)?(layers|norm)|mtp|lm_head)\.",
    "embeddings": r"^model\.(language_model\.)?embed_tokens\.",
}
_LINEAR = re.compile(r"\.(linear_(qkv|proj|fc1|fc2)|in_proj|out_proj|eh_proj)\.weight$|\.gate_weight$")
# A backend's name -> the canonical one.
_ALIASES = (
    (r"self_attention\.(?:linear_qkv|in_proj)\.layer_norm_(weight|bias)$", r"input_layernorm.\1"),
    (r"mlp\.linear_fc1\.layer_norm_(weight|bias)$", r"pre_mlp_layernorm.\1"),
    (r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.", r"mlp.experts.\1.\2."),
    (r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$", r"mlp.experts.\2.\1.weight"),
)


@dataclass(frozen=True)
class ExpertStorage:
    """How a folder stores experts: one stacked tensor per layer, or one tensor per expert."""

    stacked_experts: bool = True
    stacked_mtp_experts: bool = True

    @classmethod
    def detect(cls, names: Iterable[str]) -> ExpertStorage:
        """Read the storage off a folder's tensor names."""
        single = {name.startswith("mtp.") for name in names if re.search(r"\.mlp\.experts\.\d+\.", name)}
        return cls(stacked_experts=False not in single, stacked_mtp_experts=True not in single)


def weight_map(config: Qwen35VLConfig, storage: ExpertStorage | None = None, text: str | None = None) -> WeightMap:
    """The mapping of one architecture to one way of storing it; experts are stacked if `storage` is None.

    Args:
        text: what the decoder's names begin with; None: as the class in `config.json` has them.

    Raises:
        ValueError: more than one MTP layer, for which HF has no names.
    """
    storage = storage or ExpertStorage()
    text = text or _own_prefix(config)
    if config.mtp_num_layers > 1:
        raise ValueError(f"HF's names hold one MTP layer, and the model has {config.mtp_num_layers}")
    sources = _decoder(config, storage, text)
    ignored = [(r"(.*\.)?rotary(_pos)?_emb\.(original_)?inv_freq", "computed, not learned")]
    copies = {}
    if config.language_model_only:
        ignored.append((rf"{re.escape(HF_VISION)}.*", "the model is built without the vision encoder"))
    else:
        sources = {**_vision(config), **sources}
    if config.tie_word_embeddings:
        ignored.append((r"lm_head\.weight", "tied to the embedding"))
        copies[f"{text}embed_tokens.weight"] = "lm_head.weight"
    if config.mtp_num_layers:
        sources |= _mtp(config, storage)
    else:
        ignored.append((r"mtp\..*", "the model is built without MTP"))
    return WeightMap(sources, ignored, copies)


def _own_prefix(config: Qwen35VLConfig) -> str:
    return HF_TEXT_ALONE if config.language_model_only else HF_TEXT


def map_of_folder(config: Qwen35VLConfig, names: Iterable[str]) -> WeightMap:
    """The mapping of a folder with these tensors; without names, of the folder that an export makes.

    A model without a ViT may come from a folder that has one.
    """
    names = list(names)
    with_vision = any(name.startswith(HF_TEXT) for name in names)
    return weight_map(config, ExpertStorage.detect(names), HF_TEXT if with_vision else None)


def as_exported(config: Qwen35VLConfig, dtypes: Mapping[str, str]) -> dict[str, str]:
    """What is known of a folder's tensors by name, by the names of a model's export that comes from it."""
    if not config.language_model_only:
        return dict(dtypes)
    kept = {name: dtype for name, dtype in dtypes.items() if not name.startswith(HF_VISION)}
    return {re.sub(rf"^{re.escape(HF_TEXT)}", HF_TEXT_ALONE, name): dtype for name, dtype in kept.items()}


def as_stored(config: Qwen35VLConfig, names: Iterable[str]) -> tuple[Qwen35VLConfig, list[str]]:
    """A model as a folder's tensors bear it out, and what to tell the user about the difference.

    transformers drops MTP's tensors and keeps their number of layers in config.json.
    """
    if not config.mtp_num_layers or any(name.startswith("mtp.") for name in names):
        return config, []
    notice = (
        "no MTP: there are no mtp.* tensors, as transformers leaves a folder, though config.json says "
        f"mtp_num_hidden_layers {config.mtp_num_layers}; exports will say 0"
    )
    return config.replace(mtp_num_layers=0), [notice]


def canonical_parameters(
    config: Qwen35VLConfig, model: nn.Module, prefix: str = ""
) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters under their canonical names; one that stacks experts comes once under each one's.

    Args:
        model: a `MultimodalModel` (one pipeline stage), or with `prefix` one of its parts.
        prefix: "language_model." or "vision_model." for a part by itself.
    """
    from megatron.core.transformer.transformer_layer import TransformerLayer

    layers = {
        path: module.layer_number - 1
        for path, module in model.named_modules()
        if isinstance(module, TransformerLayer) and re.search(r"(^|\.)decoder\.layers\.\d+$", path)
    }
    rank = Rank.of(model.pg_collection)
    first_expert = rank.ep * (config.num_experts or 0) // rank.ep_size
    own_experts = (config.num_experts or 0) // rank.ep_size
    for name, parameter in model.named_parameters():
        if layer := re.match(r"((?:.*\.)?decoder\.layers)\.\d+(?=\.)", name):
            name = f"{layer[1]}.{layers[layer[0]]}{name[layer.end() :]}"
        for pattern, canonical in _ALIASES:
            name = re.sub(pattern, canonical, name)
        if stacked := re.search(r"(?<=\.mlp\.experts\.)(?=linear_fc[12]\.weight$)", prefix + name):
            head, tail = (prefix + name)[: stacked.start()], (prefix + name)[stacked.start() :]
            for expert in range(first_expert, first_expert + own_experts):
                yield f"{head}{expert}.{tail}", parameter
            continue
        name = re.sub(r"(?<=\.mlp\.experts\.)\d+", lambda match: str(int(match[0]) + first_expert), prefix + name)
        if name == OUTPUT and config.tie_word_embeddings:
            name = EMBEDDING  # the last pipeline stage's copy
        yield name, parameter


def linears(mapping: WeightMap) -> list[str]:
    """Canonical names of the weights that transformers has as `nn.Linear`, MTP's, which it lacks, included."""
    return [name for name, source in mapping.sources.items() if _LINEAR.search(name) and not source.is_expert]


def default_dtype(name: str) -> str:
    """In which dtype, as safetensors spells it, Qwen3.5's folders store this HF tensor; 3.6's and 3.8's have BF16."""
    return "F32" if name.endswith((".linear_attn.A_log", ".linear_attn.norm.weight")) else "BF16"


def is_wide(name: str) -> bool:
    """Whether the model holds this HF tensor in float32 in 16-bit runs too (`models.common.gated_delta_net`)."""
    return name.endswith((".linear_attn.A_log", ".linear_attn.dt_bias", ".linear_attn.norm.weight"))


# A checkpoint keeps the rows of these by what they project to, in the order of their parts.
_GDN_PARTS = {
    "in_proj.weight": ("query", "key", "value", "z", "beta", "alpha"),
    "conv1d.weight": ("query", "key", "value"),
}


def checkpoint_slices(config: Qwen35VLConfig, mapping: WeightMap) -> dict[str, tuple[CheckpointSlice, ...]]:
    """Where a `torch_dist` checkpoint has each parameter, whichever backend and layout wrote it.

    The names are those of `sharded_state_dict()`: norms by the fused backend's spelling (`models.qwen35_vl.specs`), the
    ViT's layers and a layer's experts stacked in one tensor, GatedDeltaNet's projections one by one.
    """
    slices: dict[str, tuple[CheckpointSlice, ...]] = {}
    for name, source in mapping.sources.items():
        layer: int | None = None
        layers = 0
        key = name.replace("mtp_model_layer", "transformer_layer")
        if vit := re.match(r"vision_model\.decoder\.layers\.(\d+)\.", key):
            key = f"vision_model.decoder.layers.{key[vit.end() :]}"
            layer, layers = int(vit[1]), config.vision.num_layers
        elif expert := re.search(r"(?<=\.mlp\.experts\.)(\d+)\.", key):
            key = f"{key[: expert.start()]}experts.{key[expert.end() :]}"
            layer, layers = int(expert[1]), config.num_experts or 0
        gated_delta_net = f"{name.partition('input_layernorm')[0]}self_attention.A_log" in mapping.sources
        projection = "in_proj" if gated_delta_net else "linear_qkv"
        key = re.sub(r"\.input_layernorm\.", f".self_attention.{projection}.layer_norm_", key)
        if vit or not config.is_moe:
            key = re.sub(r"\.pre_mlp_layernorm\.", ".mlp.linear_fc1.layer_norm_", key)
        parts = next((parts for suffix, parts in _GDN_PARTS.items() if key.endswith(f"self_attention.{suffix}")), None)
        if parts is None:
            slices[name] = (CheckpointSlice(key, 0, source.shape[source.dim], layer, layers),)
            continue
        counts = [sum(run.count for run in part) for part in source.parts]
        slices[name] = tuple(
            CheckpointSlice(f"{key}.{part}", sum(counts[:i]), count)
            for i, (part, count) in enumerate(zip(parts, counts, strict=True))
        )
    return slices


def fsdp_checkpoint_slices(config: Qwen35VLConfig, mapping: WeightMap) -> dict[str, list[tuple[CheckpointSlice, ...]]]:
    """Where an `fsdp_dtensor` checkpoint has each parameter: one alternative for each spelling.

    Names are those of modules, of either backend, with and without the wrapper of 16-bit models. A gated FFN's halves
    are two tensors (megatron-core's `handle_swiglu_in_state_dict`).
    """
    slices = {}
    for name, source in mapping.sources.items():
        size = source.shape[source.dim]
        gated = name.endswith("linear_fc1.weight") and len(source.parts) == 2
        halves = (("_w", 0, size // 2), ("_v", size // 2, size // 2)) if gated else (("", 0, size),)
        slices[name] = [
            tuple(CheckpointSlice(f"{level}{spelling}{half}", start, count) for half, start, count in halves)
            for level in ("model.module.", "model.")
            for spelling in _module_names(name, mapping)
        ]
    return slices


def _module_names(name: str, mapping: WeightMap) -> list[str]:
    """`_ALIASES` the other way round: every backend's spelling of a canonical name."""
    if expert := re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(linear_fc[12])\.(weight|adapter\..*)", name):
        layer, number, linear, parameter = expert.groups()
        stacked = [f"{layer}.{linear}.weight{number}"] if parameter == "weight" else []
        return [f"{layer}.local_experts.{number}.{linear}.{parameter}", *stacked]
    names = [name]
    for norm, projections in (
        (".input_layernorm.", (".self_attention.in_proj", ".self_attention.linear_qkv")),
        (".pre_mlp_layernorm.", (".mlp.linear_fc1",)),
    ):
        if norm in name:
            layer, kind = name.split(norm)
            there = (layer + behind for behind in projections if f"{layer}{behind}.weight" in mapping.sources)
            names += [f"{projection}.layer_norm_{kind}" for projection in there]
    return names


# The table


def _whole(hf_name: str, *shape: int, foreign_tail: tuple[int, ...] | None = None) -> Source:
    """The same on every rank."""
    return Source(shape, ((RowRange(hf_name, 0, shape[0]),),), sharded=False, foreign_tail=foreign_tail)


def _by_rows(
    *parts: RowRange | Iterable[RowRange], tail: tuple[int, ...] = (), expert: tuple[int, int] | None = None
) -> Source:
    """Parts one below the other, each cut by TP."""
    runs = tuple((part,) if isinstance(part, RowRange) else tuple(part) for part in parts)
    rows = sum(run.count for part in runs for run in part)
    return Source((rows, *tail), runs, is_expert=expert is not None, expert=expert)


def _by_columns(run: RowRange, rows: int, expert: tuple[int, int] | None = None) -> Source:
    """A row-parallel linear's weight: cut by columns."""
    return Source((rows, run.count), ((run,),), dim=1, is_expert=expert is not None, expert=expert)


def _cut(hf_name: str, *counts: int, expert: int | None = None) -> list[RowRange]:
    """One HF tensor as consecutive runs."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [RowRange(hf_name, start, count, expert) for start, count in zip(starts, counts, strict=True)]


def _vision(config: Qwen35VLConfig) -> dict[str, Source]:
    vit = config.vision
    width, ffn = vit.hidden_size, vit.ffn_hidden_size
    merged = width * vit.spatial_merge_size**2
    head = width // vit.num_attention_heads
    kernel = (vit.in_channels, vit.temporal_patch_size, vit.patch_size, vit.patch_size)

    def heads(hf_name: str) -> list[RowRange]:
        """HF has all queries, all keys, all values; megatron has query, key and value of each head."""
        return [
            RowRange(hf_name, which * width + h * head, head)
            for h in range(vit.num_attention_heads)
            for which in range(3)
        ]

    table = {
        "patch_embed.weight": _whole(f"{HF_VISION}patch_embed.proj.weight", width, vit.patch_dim, foreign_tail=kernel),
        "patch_embed.bias": _whole(f"{HF_VISION}patch_embed.proj.bias", width),
        "pos_embed.weight": _whole(f"{HF_VISION}pos_embed.weight", vit.num_position_embeddings, width),
        "merger.norm.weight": _whole(f"{HF_VISION}merger.norm.weight", width),
        "merger.norm.bias": _whole(f"{HF_VISION}merger.norm.bias", width),
        "merger.linear_fc1.weight": _by_rows(
            RowRange(f"{HF_VISION}merger.linear_fc1.weight", 0, merged), tail=(merged,)
        ),
        "merger.linear_fc1.bias": _by_rows(RowRange(f"{HF_VISION}merger.linear_fc1.bias", 0, merged)),
        "merger.linear_fc2.weight": _by_columns(
            RowRange(f"{HF_VISION}merger.linear_fc2.weight", 0, merged), config.hidden_size
        ),
        "merger.linear_fc2.bias": _whole(f"{HF_VISION}merger.linear_fc2.bias", config.hidden_size),
    }
    for i in range(vit.num_layers):
        hf = f"{HF_VISION}blocks.{i}."
        layer = {
            "self_attention.linear_qkv.weight": _by_rows(heads(f"{hf}attn.qkv.weight"), tail=(width,)),
            "self_attention.linear_qkv.bias": _by_rows(heads(f"{hf}attn.qkv.bias")),
            "self_attention.linear_proj.weight": _by_columns(RowRange(f"{hf}attn.proj.weight", 0, width), width),
            "self_attention.linear_proj.bias": _whole(f"{hf}attn.proj.bias", width),
            "mlp.linear_fc1.weight": _by_rows(RowRange(f"{hf}mlp.linear_fc1.weight", 0, ffn), tail=(width,)),
            "mlp.linear_fc1.bias": _by_rows(RowRange(f"{hf}mlp.linear_fc1.bias", 0, ffn)),
            "mlp.linear_fc2.weight": _by_columns(RowRange(f"{hf}mlp.linear_fc2.weight", 0, ffn), width),
            "mlp.linear_fc2.bias": _whole(f"{hf}mlp.linear_fc2.bias", width),
        }
        for ours, theirs in (("input_layernorm", "norm1"), ("pre_mlp_layernorm", "norm2")):
            for kind in ("weight", "bias"):
                layer[f"{ours}.{kind}"] = _whole(f"{hf}{theirs}.{kind}", width)
        table |= {f"decoder.layers.{i}.{name}": source for name, source in layer.items()}
    return {f"vision_model.{name}": source for name, source in table.items()}


def _decoder(config: Qwen35VLConfig, storage: ExpertStorage, text: str) -> dict[str, Source]:
    vocabulary, hidden = config.vocab_size, config.hidden_size
    table = {
        EMBEDDING: _by_rows(RowRange(f"{text}embed_tokens.weight", 0, vocabulary), tail=(hidden,)),
        "language_model.decoder.final_layernorm.weight": _whole(f"{text}norm.weight", hidden),
    }
    if not config.tie_word_embeddings:
        table[OUTPUT] = _by_rows(RowRange("lm_head.weight", 0, vocabulary), tail=(hidden,))
    for i in range(config.num_layers):
        full_attention = (i + 1) % config.full_attention_interval == 0
        layer = _layer(f"{text}layers.{i}.", config, full_attention, storage.stacked_experts)
        table |= {f"language_model.decoder.layers.{i}.{name}": source for name, source in layer.items()}
    return table


def _mtp(config: Qwen35VLConfig, storage: ExpertStorage) -> dict[str, Source]:
    hidden = config.hidden_size
    table = {
        "eh_proj.weight": _by_rows(RowRange("mtp.fc.weight", 0, hidden), tail=(2 * hidden,)),
        "enorm.weight": _whole("mtp.pre_fc_norm_embedding.weight", hidden),
        "hnorm.weight": _whole("mtp.pre_fc_norm_hidden.weight", hidden),
        "final_layernorm.weight": _whole("mtp.norm.weight", hidden),
    }
    layer = _layer("mtp.layers.0.", config, True, storage.stacked_mtp_experts)
    table |= {f"mtp_model_layer.{name}": source for name, source in layer.items()}
    return {f"language_model.mtp.layers.0.{name}": source for name, source in table.items()}


def _layer(hf: str, config: Qwen35VLConfig, full_attention: bool, stacked: bool) -> dict[str, Source]:
    return {
        "input_layernorm.weight": _whole(f"{hf}input_layernorm.weight", config.hidden_size),
        "pre_mlp_layernorm.weight": _whole(f"{hf}post_attention_layernorm.weight", config.hidden_size),
        **(_attention(hf, config) if full_attention else _gated_delta_net(hf, config)),
        **_mlp(hf, config, stacked),
    }


def _attention(hf: str, config: Qwen35VLConfig) -> dict[str, Source]:
    hidden, head, groups = config.hidden_size, config.kv_channels, config.num_query_groups
    per_group = config.num_attention_heads // groups
    q, k, v, o = (f"{hf}self_attn.{name}_proj.weight" for name in "qkvo")

    def group(g: int) -> list[RowRange]:
        """HF: query and gate of each head. Megatron, per KV group: all queries, all gates, key, value."""
        heads = range(g * per_group, (g + 1) * per_group)
        queries = [RowRange(q, 2 * h * head, head) for h in heads]
        gates = [RowRange(q, (2 * h + 1) * head, head) for h in heads]
        return [*queries, *gates, RowRange(k, g * head, head), RowRange(v, g * head, head)]

    return {
        "self_attention.linear_qkv.weight": _by_rows([run for g in range(groups) for run in group(g)], tail=(hidden,)),
        "self_attention.linear_proj.weight": _by_columns(RowRange(o, 0, config.num_attention_heads * head), hidden),
        "self_attention.q_layernorm.weight": _whole(f"{hf}self_attn.q_norm.weight", head),
        "self_attention.k_layernorm.weight": _whole(f"{hf}self_attn.k_norm.weight", head),
    }


def _gated_delta_net(hf: str, config: Qwen35VLConfig) -> dict[str, Source]:
    hidden, value_heads = config.hidden_size, config.linear_num_value_heads
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = value_heads * config.linear_value_head_dim
    hf = f"{hf}linear_attn."
    return {
        "self_attention.in_proj.weight": _by_rows(
            *_cut(f"{hf}in_proj_qkv.weight", keys, keys, values),
            RowRange(f"{hf}in_proj_z.weight", 0, values),
            RowRange(f"{hf}in_proj_b.weight", 0, value_heads),
            RowRange(f"{hf}in_proj_a.weight", 0, value_heads),
            tail=(hidden,),
        ),
        "self_attention.conv1d.weight": _by_rows(
            *_cut(f"{hf}conv1d.weight", keys, keys, values), tail=(1, config.linear_conv_kernel_dim)
        ),
        "self_attention.A_log": _by_rows(RowRange(f"{hf}A_log", 0, value_heads)),
        "self_attention.dt_bias": _by_rows(RowRange(f"{hf}dt_bias", 0, value_heads)),
        "self_attention.out_norm.weight": _whole(f"{hf}norm.weight", config.linear_value_head_dim),
        "self_attention.out_proj.weight": _by_columns(RowRange(f"{hf}out_proj.weight", 0, values), hidden),
    }


def _mlp(hf: str, config: Qwen35VLConfig, stacked: bool) -> dict[str, Source]:
    if (experts := config.experts) is not None:
        return _moe(f"{hf}mlp.", config.hidden_size, experts, stacked)
    return _gated_mlp("mlp.", f"{hf}mlp.", config.hidden_size, config.dense_ffn_hidden_size)


def _gated_mlp(ours: str, hf: str, hidden: int, ffn: int, expert: tuple[int, int] | None = None) -> dict[str, Source]:
    gate, up, down = (RowRange(f"{hf}{name}_proj.weight", 0, ffn) for name in ("gate", "up", "down"))
    return {
        f"{ours}linear_fc1.weight": _by_rows(gate, up, tail=(hidden,), expert=expert),
        f"{ours}linear_fc2.weight": _by_columns(down, hidden, expert),
    }


def _moe(hf: str, hidden: int, experts: ExpertSizes, stacked: bool) -> dict[str, Source]:
    ffn = experts.ffn_hidden_size
    table = {
        "mlp.router.weight": _whole(f"{hf}gate.weight", experts.count, hidden),
        "mlp.shared_experts.gate_weight": _whole(f"{hf}shared_expert_gate.weight", 1, hidden),
        **_gated_mlp("mlp.shared_experts.", f"{hf}shared_expert.", hidden, experts.shared_ffn_hidden_size),
    }
    for e in range(experts.count):
        ours, place = f"mlp.experts.{e}.", (e, experts.count)
        if not stacked:
            table |= _gated_mlp(ours, f"{hf}experts.{e}.", hidden, ffn, place)
            continue
        gate_up = _cut(f"{hf}experts.gate_up_proj", ffn, ffn, expert=e)
        table[f"{ours}linear_fc1.weight"] = _by_rows(*gate_up, tail=(hidden,), expert=place)
        table[f"{ours}linear_fc2.weight"] = _by_columns(RowRange(f"{hf}experts.down_proj", 0, ffn, e), hidden, place)
    return table

"""The weight mapping: its HF side against transformers' classes, its cuts, its refusals, its round trip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.qwen35_vl.configuration import VARIANTS
from models.qwen35_vl.hf_weights import ExpertStorage, weight_map
from models.weight_map import Rank, Source, WeightMap, WeightMismatch, assemble, tensor_slices
from tests.hf_reference import build_hf_meta

ARCHITECTURES = {
    "dense_tied": VARIANTS["tiny"],
    "dense_untied": VARIANTS["tiny"].replace(tie_word_embeddings=False),
    "moe_untied": VARIANTS["tiny_moe"],
    "moe_tied": VARIANTS["tiny_moe"].replace(tie_word_embeddings=True),
    "no_mtp": VARIANTS["tiny_moe"].replace(mtp_num_layers=0),
}


def random_hf_state(mapping: WeightMap, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in mapping.tensors.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_hf_side_equals_transformers(variant: str):
    """Names and shapes of all tensors; transformers has no MTP, and counts a tied lm_head as a tensor of its own."""
    architecture = VARIANTS[variant]
    state = {name: tuple(tensor.shape) for name, tensor in build_hf_meta(architecture).state_dict().items()}
    if architecture.tie_word_embeddings:
        del state["lm_head.weight"]
    without_mtp = weight_map(architecture.replace(mtp_num_layers=0))
    assert without_mtp.tensors == state
    mtp = {k: v for k, v in weight_map(architecture).tensors.items() if k not in state}
    assert mtp and all(name.startswith("mtp.") for name in mtp)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_element_of_every_hf_tensor_is_mapped_once(name: str, stacked: bool):
    mapping = weight_map(ARCHITECTURES[name], ExpertStorage(stacked, stacked))
    used = {tensor: torch.zeros(shape, dtype=torch.int8) for tensor, shape in mapping.tensors.items()}
    for source in mapping.sources.values():
        for tensor_slice in tensor_slices(source, 0, 1):
            used[tensor_slice.name][tensor_slice.foreign_index] += 1
    assert all((count == 1).all() for count in used.values())


def split(source: Source, state: dict[str, Tensor], rank: int, size: int) -> Tensor:
    """One rank's share of a parameter."""
    shape = list(source.shape)
    shape[source.dim] //= size
    share = torch.full(shape, torch.nan)
    for tensor_slice in tensor_slices(source, rank, size):
        target = share[tensor_slice.index]
        target.copy_(state[tensor_slice.name][tensor_slice.foreign_index].reshape(target.shape))
    return share


@pytest.mark.parametrize("size", [2, 4])
def test_shares_of_tensor_parallel_ranks(size: int):
    """What TP means, written out: halves of the gate and of the up projection, of q, k, v, z, b, a, and so on."""
    architecture = ARCHITECTURES["moe_untied"].replace(num_experts=None, ffn_hidden_size=384)
    mapping = weight_map(architecture)
    state = random_hf_state(mapping)
    hf = "model.language_model.layers.0."

    def check(name: str, parts: list[Tensor], dim: int = 0) -> None:
        source = mapping.sources[f"language_model.decoder.layers.{name}"]
        for rank in range(size):
            expected = torch.cat([part.chunk(size, dim)[rank] for part in parts], dim)
            assert torch.equal(split(source, state, rank, size), expected), (name, rank)

    check("0.mlp.linear_fc1.weight", [state[f"{hf}mlp.gate_proj.weight"], state[f"{hf}mlp.up_proj.weight"]])
    check("0.mlp.linear_fc2.weight", [state[f"{hf}mlp.down_proj.weight"]], dim=1)
    keys = architecture.linear_num_key_heads * architecture.linear_key_head_dim
    values = architecture.linear_num_value_heads * architecture.linear_value_head_dim
    gdn = f"{hf}linear_attn."
    check(
        "0.self_attention.in_proj.weight",
        [
            *state[f"{gdn}in_proj_qkv.weight"].split([keys, keys, values]),
            *(state[f"{gdn}in_proj_{name}.weight"] for name in "zba"),
        ],
    )
    check("0.self_attention.conv1d.weight", list(state[f"{gdn}conv1d.weight"].split([keys, keys, values])))
    check("0.self_attention.A_log", [state[f"{gdn}A_log"]])
    check("0.self_attention.out_proj.weight", [state[f"{gdn}out_proj.weight"]], dim=1)

    # Attention: whole KV groups where there are enough of them, and equal blocks of rows in any case.
    hf = "model.language_model.layers.3.self_attn."
    heads, groups, width = architecture.num_attention_heads, architecture.num_query_groups, architecture.kv_channels
    query, gate = state[f"{hf}q_proj.weight"].view(groups, heads // groups, 2, width, -1).unbind(2)
    key, value = (state[f"{hf}{name}_proj.weight"].view(groups, 1, width, -1) for name in "kv")
    check("3.self_attention.linear_qkv.weight", [torch.cat([query, gate, key, value], 1).flatten(0, 2)])

    vision = mapping.sources["vision_model.decoder.layers.1.self_attention.linear_qkv.weight"]
    qkv = state["model.visual.blocks.1.attn.qkv.weight"]
    vit_heads = architecture.vision.num_attention_heads
    expected = qkv.view(3, vit_heads, -1, qkv.shape[1]).transpose(0, 1).flatten(0, 2)
    for rank in range(size):
        assert torch.equal(split(vision, state, rank, size), expected.chunk(size)[rank])


@pytest.mark.parametrize("stacked", [True, False])
def test_ranks_together_give_the_folder_back(stacked: bool):
    """HF -> shares of TP2 x EP2 x expert-TP2 ranks -> HF, bit for bit; one rank alone is refused."""
    architecture = ARCHITECTURES["moe_untied"]
    mapping = weight_map(architecture, ExpertStorage(stacked, stacked))
    state = random_hf_state(mapping)
    experts = architecture.num_experts

    def shares(rank: Rank):
        for name, source in mapping.sources.items():
            if source.is_expert and int(name.split(".experts.")[1].split(".")[0]) * 2 // experts != rank.ep:
                continue
            share = split(source, state, *rank.cut(source))
            for tensor_slice in tensor_slices(source, *rank.cut(source)):
                yield tensor_slice, share[tensor_slice.index]

    ranks = [Rank(r % 2, 2, r % 2, 2, r // 2, 2) for r in range(4)]
    together = assemble(mapping, (item for rank in ranks for item in shares(rank)))
    assert together.keys() == state.keys()
    assert all(torch.equal(together[name], state[name]) for name in state)
    with pytest.raises(WeightMismatch, match=r"lm_head\.weight: 65536 of 131072 elements"):
        assemble(mapping, shares(ranks[0]))


def test_layout_is_read_off_the_names():
    for layout in (ExpertStorage(a, b) for a in (True, False) for b in (True, False)):
        assert ExpertStorage.detect(weight_map(VARIANTS["tiny_moe"], layout).tensors) == layout
    assert ExpertStorage.detect(weight_map(VARIANTS["tiny"]).tensors) == ExpertStorage()


def test_what_is_wrong_with_a_folder_is_listed():
    mapping = weight_map(ARCHITECTURES["dense_tied"])
    shapes = dict(mapping.tensors)
    assert mapping.check(shapes) == []
    assert mapping.check({**shapes, "lm_head.weight": (1024, 128)}) == []
    del shapes["mtp.fc.weight"]
    shapes["model.visual.pos_embed.weight"] = (9, 128)
    shapes["model.language_model.layers.9.input_layernorm.weight"] = (128,)
    assert mapping.check(shapes) == [
        "mtp.fc.weight: missing",
        "model.visual.pos_embed.weight: has shape (9, 128), expected (2304, 128)",
        "model.language_model.layers.9.input_layernorm.weight: maps to no parameter",
    ]


def test_mtp_of_a_folder_is_left_out_by_name_when_the_model_has_none():
    mapping = weight_map(ARCHITECTURES["no_mtp"])
    assert mapping.check(weight_map(VARIANTS["tiny_moe"]).tensors) == []
    assert mapping.reason_to_ignore("mtp.fc.weight") == "the model is built without MTP"


def test_more_than_one_mtp_layer_is_refused():
    with pytest.raises(ValueError, match="one MTP layer, and the model has 2"):
        weight_map(VARIANTS["tiny"].replace(mtp_num_layers=2))

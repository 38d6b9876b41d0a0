"""What one configuration knows of its FFNs: either experts with all their sizes, or a dense width."""

from __future__ import annotations

import pytest

from models.qwen35_vl.configuration import VARIANTS, ExpertSizes


@pytest.mark.parametrize("missing", ["moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"])
def test_experts_need_their_sizes(missing: str) -> None:
    with pytest.raises(ValueError, match=f"num_experts 4 needs .*{missing}"):
        _ = VARIANTS["tiny_moe"].replace(**{missing: None}).experts


def test_a_decoder_needs_one_kind_of_ffn() -> None:
    with pytest.raises(ValueError, match="dense decoder needs ffn_hidden_size"):
        _ = VARIANTS["tiny"].replace(ffn_hidden_size=None).dense_ffn_hidden_size


def test_width_that_a_token_sees() -> None:
    dense, moe = VARIANTS["tiny"], VARIANTS["35b_a3b"]
    assert dense.experts is None and dense.dense_ffn_hidden_size == dense.ffn_hidden_size
    assert moe.experts == ExpertSizes(256, 8, 512, 512)
    assert moe.dense_ffn_hidden_size == 9 * 512

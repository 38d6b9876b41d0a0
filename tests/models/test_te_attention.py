"""The check for a fused attention, with a stand-in for Transformer Engine; tests/gpu asks the real one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from models.backends import te_attention
from models.backends.te_attention import AttentionSizes, check_fused_attention

pytestmark = pytest.mark.usefixtures("single_rank")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the stand-in was asked; it has a fused attention for heads of 64."""
    seen: dict[str, Any] = {}

    class DotProductAttention:
        def __init__(self, heads: int, head_dim: int, **options: Any) -> None:
            seen.update(options, fused=head_dim == 64)

        def __call__(self, query: Tensor, key: Tensor, value: Tensor, **documents: Any) -> Tensor:
            seen.update(documents, shape=query.shape, fallback=os.environ.get("NVTE_UNFUSED_ATTN"))
            if not seen["fused"] and seen["fallback"] == "0":
                raise ValueError("No dot product attention backend is available.")
            return query * 1

    package = ModuleType("transformer_engine.pytorch")
    package.DotProductAttention = DotProductAttention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", package)
    return seen


@pytest.mark.parametrize("before", [None, "1"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_fused_attention_is_asked_without_the_fallback(
    seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch, before: str | None, packed: bool
) -> None:
    if before:
        monkeypatch.setenv("NVTE_UNFUSED_ATTN", before)
    else:
        monkeypatch.delenv("NVTE_UNFUSED_ATTN", raising=False)
    state = torch.get_rng_state()
    check_fused_attention(AttentionSizes(4, 2, 64, torch.bfloat16, packed=packed))
    assert seen["fallback"] == "0"
    assert os.environ.get("NVTE_UNFUSED_ATTN") == before
    assert torch.equal(torch.get_rng_state(), state)
    assert seen["num_gqa_groups"] == 2
    assert (seen["qkv_format"], len(seen["shape"])) == (("thd", 3) if packed else ("sbhd", 4))
    assert ("cu_seqlens_q" in seen) is packed


def test_its_absence_is_refused(seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te_attention, "_cudnn_advice", lambda: "Advice. ")
    with pytest.raises(RuntimeError, match=r"4 heads of 16.*Advice\..*--allow-slow-kernels"):
        check_fused_attention(AttentionSizes(4, 2, 16, torch.bfloat16, packed=True))
    assert seen["fallback"] == "0"


def test_two_cudnns_are_told_apart(tmp_path: Path) -> None:
    line = "7f00-7f01 r-xp 00000000 00:00 0    {}\n"
    maps = tmp_path / "maps"
    files = ["/venv/cudnn/lib/libcudnn.so.9", "/venv/cudnn/lib/libcudnn_ops.so.9", "/usr/lib/libc.so.6"]
    maps.write_text("".join(map(line.format, files)))
    assert te_attention._cudnn_advice(maps) == ""
    maps.write_text("".join(map(line.format, [*files, "/usr/lib/libcudnn_graph.so.9.14.0"])))
    advice = te_attention._cudnn_advice(maps)
    assert "/usr/lib and /venv/cudnn/lib" in advice and "LD_LIBRARY_PATH" in advice

"""The check for a fused attention, with a stand-in for Transformer Engine; tests/gpu asks the real one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from models.backends import te_attention
from models.backends.te_attention import (
    CHECK_TOLERANCE,
    AttentionSizes,
    attention_errors,
    check_attention,
    check_fused_attention,
    torch_attention,
)

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


VISION = AttentionSizes(4, 4, 72, torch.bfloat16, packed=True, causal=False)
DECODER = AttentionSizes(4, 2, 64, torch.bfloat16, packed=True)
CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", [VISION, DECODER, AttentionSizes(4, 2, 64, torch.bfloat16, packed=False)])
def test_torchs_bfloat16_passes_the_comparison(sizes: AttentionSizes) -> None:
    assert max(attention_errors(torch_attention(sizes), sizes, CPU).values()) < CHECK_TOLERANCE


def looks_across_documents(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    return torch_attention(VISION)(query, key, value, [sum(lengths)])


def sees_the_future(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    return torch_attention(AttentionSizes(4, 2, 64, torch.bfloat16, packed=True, causal=False))(
        query, key, value, lengths
    )


def has_a_wrong_gradient_of_keys(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    return torch_attention(VISION)(query, 2 * key - key.detach(), value, lengths)


EVERYTHING = {"output", "gradient of queries", "gradient of keys", "gradient of values"}


@pytest.mark.parametrize(
    ("sizes", "attention", "wrong"),
    [
        (VISION, looks_across_documents, EVERYTHING),
        (DECODER, sees_the_future, EVERYTHING),
        (VISION, has_a_wrong_gradient_of_keys, {"gradient of keys"}),
    ],
)
def test_the_comparison_names_what_is_wrong(
    sizes: AttentionSizes, attention: Callable[..., Tensor], wrong: set[str]
) -> None:
    errors = attention_errors(attention, sizes, CPU)
    assert {name for name, error in errors.items() if not error < CHECK_TOLERANCE} == wrong


@pytest.mark.parametrize(("backend", "others"), [("auto", "flash, fused, unfused"), ("flash", "fused, unfused")])
def test_wrong_attention_is_refused_by_name(
    seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch, backend: str, others: str
) -> None:
    chosen = []

    def errors(*_: Any) -> dict[str, float]:
        chosen.append(os.environ.get("NVTE_FUSED_ATTN"))
        return {"output": 0.001, "gradient of keys": 0.5, "gradient of values": float("nan")}

    monkeypatch.setattr(te_attention, "attention_errors", errors)
    message = (
        rf"the ViT's attention \(4 heads of 72, 4 KV heads, torch.bfloat16\) wrongly on this .*0\.03\) gradient of "
        rf"keys is off by 5\.0e-01, gradient of values is off by nan\. Try another --attention-backend \({others}\)"
    )
    with pytest.raises(RuntimeError, match=message):
        check_attention("ViT", VISION, backend)
    assert chosen == ["0" if backend == "flash" else None] and "NVTE_FUSED_ATTN" not in os.environ
    assert seen["attn_mask_type"] == "padding" and seen["qkv_format"] == "thd"
    check_attention("ViT", VISION, "local")
    assert len(chosen) == 1

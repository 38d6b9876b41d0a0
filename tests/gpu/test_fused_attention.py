"""On a GPU: Transformer Engine's fused attention is there for the real head sizes and computes rightly; the checks see
when it isn't or doesn't."""

from __future__ import annotations

import pytest
import torch

from models.backends import te_attention
from models.backends.te_attention import AttentionSizes, check_attention, check_fused_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("packed", [True, False])
def test_fused_attention_is_there(packed: bool) -> None:
    check_fused_attention(AttentionSizes(16, 4, 256, torch.bfloat16, packed=packed))


def test_its_absence_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    with pytest.raises(RuntimeError, match="has no fused attention for 16 heads of 128"):
        check_fused_attention(AttentionSizes(16, 4, 128, torch.bfloat16, packed=True))


# Of the ViT of 9b and larger, of that of the smaller ones, and of the decoder.
SIZES = (
    AttentionSizes(16, 16, 72, torch.bfloat16, packed=True, causal=False),
    AttentionSizes(16, 16, 64, torch.bfloat16, packed=True, causal=False),
    AttentionSizes(16, 4, 256, torch.bfloat16, packed=True),
    AttentionSizes(16, 4, 256, torch.bfloat16, packed=False),
)


@pytest.mark.parametrize("sizes", SIZES)
def test_attention_equals_torch(sizes: AttentionSizes) -> None:
    check_attention("model", sizes, "auto")
    errors = te_attention.attention_errors(te_attention.te_attention(sizes), sizes, torch.device("cuda"))
    print(f"{sizes}: {errors}")


def test_wrong_attention_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's causal attention in the ViT's place."""
    wrong = te_attention.te_attention(AttentionSizes(16, 16, 72, torch.bfloat16, packed=True))
    monkeypatch.setattr(te_attention, "te_attention", lambda sizes: wrong)
    check_attention.cache_clear()
    with pytest.raises(RuntimeError, match=r"the ViT's attention .*output is off by .*--attention-backend"):
        check_attention("ViT", SIZES[0], "auto")
    check_attention.cache_clear()

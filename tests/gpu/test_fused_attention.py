"""On a GPU: Transformer Engine's fused attention is there for the real head sizes, and the check sees when it isn't."""

from __future__ import annotations

import pytest
import torch

from models.backends.te_attention import AttentionSizes, check_fused_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("packed", [True, False])
def test_fused_attention_is_there(packed: bool) -> None:
    check_fused_attention(AttentionSizes(16, 4, 256, torch.bfloat16, packed=packed))


def test_its_absence_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    with pytest.raises(RuntimeError, match="has no fused attention for 16 heads of 128"):
        check_fused_attention(AttentionSizes(16, 4, 128, torch.bfloat16, packed=True))

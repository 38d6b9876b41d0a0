"""What is said before a start on a GPU waits."""

from __future__ import annotations

import pytest
import torch

from runtime import first_step


@pytest.mark.parametrize(("gpu", "rank"), [(True, 0), (True, 1), (False, 0)])
def test_the_first_rank_says_once_what_a_gpu_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpu: bool, rank: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    for function, words in ((first_step.announce, ()), (first_step.announce_check, (True,))):
        function.cache_clear()
        function(*words)
        function(*words)
        function.cache_clear()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (2 if gpu and not rank else 0)
    if lines:
        assert lines[0].startswith("> first step: ") and "TRITON_CACHE_DIR" in lines[0]
        assert "flash-linear-attention" in lines[1]

"""What check_parallel.py refuses, and how it measures updates that a weight's rounding swallows."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from proofs.layouts import parse_layout
from proofs.run import PARAMETERS, Watch
from runtime.machine import Machine
from scripts import check_parallel

GPUS = Machine(2, transformer_engine=True, flash_linear_attention=True, fused_weight_gradients=False, wandb=False)


@pytest.mark.parametrize(("dtype", "refused"), [("float64", True), ("float32", False)])
def test_float64_with_transformer_engine_is_refused(
    dtype: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_parallel, "detect", lambda: GPUS)
    args = Namespace(
        **{"variant": "tiny", "dtype": dtype, "documents": "ragged", "optimizer": "adam", "steps": 1, "nnodes": 1},
        **{"seq_length": 64, "micro_batch_size": 1, "global_batch_size": 2, "flags": []},
    )
    problems = check_parallel.Comparison(args, tmp_path).refusals(parse_layout("dp2"))
    assert any("--dtype float32" in problem for problem in problems) is refused, problems


def test_a_step_below_a_rounding_is_no_infinite_error(tmp_path: Path) -> None:
    start = {"moved": torch.ones(4, dtype=torch.float64), "still": torch.ones(4, dtype=torch.float64)}
    save_file(start, tmp_path / "start")
    end = {"moved": torch.full((4,), 1.5, dtype=torch.bfloat16), "still": torch.ones(4, dtype=torch.bfloat16)}
    save_file(end, tmp_path / PARAMETERS)
    watch = object.__new__(Watch)
    watch._folder = tmp_path
    eps = torch.finfo(torch.bfloat16).eps
    # Both off by one rounding of 1 in each of four places.
    off = (4 * eps**2, 4)
    errors = watch._errors([{("moved", ""): off, ("still", ""): off}], PARAMETERS, minus="start")
    assert errors["still"] == pytest.approx(1)
    assert errors["moved"] == pytest.approx(eps / (0.5 + 1.5 * eps))

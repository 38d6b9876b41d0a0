"""Command lines for tests of the preflight: a machine without a GPU, and what it says of folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from arguments import CommandLine, Refused, preflight
from runtime.machine import Machine

LAPTOP = Machine(0, transformer_engine=False, flash_linear_attention=False, fused_weight_gradients=False, wandb=False)
SIZES = ["--seq-length", "128", "--micro-batch-size", "2", "--train-iters", "1", "--lr", "1e-3"]


def accepted(*flags: str | Path) -> CommandLine:
    """The preflight of these flags with `SIZES`, weights of hub names fetched."""
    return preflight([*SIZES, *map(str, flags)], LAPTOP, 1, with_weights=True)


def refused(*flags: str | Path) -> list[str]:
    """The problems that it has with them."""
    with pytest.raises(Refused) as error:
        accepted(*flags)
    return error.value.problems

"""Runs the entry several times after one import and keeps a digest of what each rank held after every step.

    python tests/runtime/state_runs.py JOBS.json

JOBS.json as for fsdp_runs.py. Each job writes `out/NAME.pt`: a list of (weights, optimizer), digests over all ranks
before the first step, after it, and so on. Not a test: a program that test_empty_steps.py starts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsdp_runs
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def digest(values: Iterable[Any]) -> str:
    """Over all ranks."""
    own = hashlib.sha256()
    for value in values:
        if isinstance(value, DTensor):
            value = value.to_local()
        if isinstance(value, Tensor):
            # A copy: NumPy's view would forbid FSDP to free the storage.
            own.update(value.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes())
    of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, own.hexdigest())
    return " ".join(of_ranks)


def state_of(model: list[nn.Module], optimizer: Any) -> tuple[str, str]:
    """The weights as forward uses them; Adam's moments and steps, and the fp32 weights that it updates."""
    held = []
    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in chained.optimizer.param_groups:
            for parameter in group["params"]:
                state = chained.optimizer.state.get(parameter, {})
                held += [parameter, *(state[name] for name in sorted(state))]
    return digest(parameter for chunk in model for parameter in chunk.parameters()), digest(held)


def run(flags: list[str], out: Path) -> None:
    found: list[tuple[str, str]] = []
    train_step = fsdp_runs.training.train_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        model, optimizer = args[2:4]
        found.append(state_of(model, optimizer)) if not found else None
        outcome = train_step(*args, **kwargs)
        found.append(state_of(model, optimizer))
        return outcome

    fsdp_runs.training.train_step = watched
    fsdp_runs.pretrain_multimodal.main(flags)
    if os.environ["RANK"] == "0":
        torch.save(found, out)


if __name__ == "__main__":
    fsdp_runs.run = run
    fsdp_runs.main()

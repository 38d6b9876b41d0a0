"""Runs the entry several times after one import and keeps a digest of what each rank held after every step.

    python tests/runtime/state_runs.py JOBS.json

JOBS.json as for fsdp_runs.py. Each job writes `out/NAME.json`: a list of the ranks' digests by name, before the first
step, after it, and so on. Not a test: a program that test_empty_steps.py starts.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import fsdp_runs
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from proofs.full_tensors import full_parameters


def digest(value: Any) -> str:
    own = value.to_local() if isinstance(value, DTensor) else value
    # A copy: NumPy's view would forbid FSDP to free the storage.
    content = own.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes() if isinstance(own, Tensor) else own
    return hashlib.sha256(repr(content).encode()).hexdigest()


def state_of(model: list[nn.Module], optimizer: Any) -> dict[str, str]:
    """Of the weights; and of the optimizer's own copies of them, moments and steps."""
    own = {f"weight {name}": digest(value) for name, value in full_parameters(model)}
    for number, chained in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
        parameters = [parameter for group in chained.optimizer.param_groups for parameter in group["params"]]
        for place, parameter in enumerate(parameters):
            state = {"value": parameter, **chained.optimizer.state.get(parameter, {})}
            own |= {f"optimizer {number} {place} {name}": digest(value) for name, value in state.items()}
    of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, own)
    return {f"{rank} {name}": value for rank, values in enumerate(of_ranks) for name, value in values.items()}


def run(flags: list[str], out: Path) -> None:
    found: list[dict[str, str]] = []
    train_step = fsdp_runs.training.train_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        model, optimizer = args[2:4]
        if not found:
            found.append(state_of(model, optimizer))
        outcome = train_step(*args, **kwargs)
        found.append(state_of(model, optimizer))
        return outcome

    fsdp_runs.training.train_step = watched
    fsdp_runs.pretrain_multimodal.main(flags)
    if os.environ["RANK"] == "0":
        out.with_suffix(".json").write_text(json.dumps(found))


if __name__ == "__main__":
    fsdp_runs.run = run
    fsdp_runs.main()

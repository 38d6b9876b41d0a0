"""Runs the entry with Megatron-FSDP, several times after one import, and keeps what each run held after every step.

    python tests/runtime/fsdp_runs.py JOBS.json

JOBS.json: {"out": folder, "jobs": {name: {"ranks": N, "flags": [...]}}}. Each writes `out/NAME.pt`: {"meta": whether
all parameters were on the meta device before wrapping, "marks", "dtypes": of the wrapped parameters by name, "states":
[state before the first step, after the first, ...], "rates": the learning rate of each step}. A state is {name: tensor}
of the whole parameters and Adam's whole moments; experts carry their number in the whole model. Not a test: a program
that test_fsdp.py starts.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from runtime import prepare

prepare()

import torch  # noqa: E402
from megatron.core import mpu  # noqa: E402
from megatron.training import training  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import pretrain_multimodal  # noqa: E402
from proofs.full_tensors import full_parameters, gather_share  # noqa: E402
from runtime.model_builder import unwrapped  # noqa: E402

# What megatron-core reads from a parameter.
MARKS = (
    *("allreduce", "sequence_parallel", "tensor_model_parallel", "partition_dim", "partition_stride", "is_qkv"),
    *("is_embedding_or_output_parameter", "shared_embedding", "average_gradients_across_tp_domain"),
)


def whole_name(name: str) -> str:
    """An expert's name as one rank has it."""
    experts = training.get_args().num_experts // mpu.get_expert_model_parallel_world_size()
    first = experts * mpu.get_expert_model_parallel_rank()
    return re.sub(r"local_experts\.(\d+)", lambda found: f"local_experts.{first + int(found[1])}", name)


def state_of(model: list[nn.Module], optimizer: Any) -> dict[str, Tensor]:
    own = {whole_name(name): value.clone() for name, value in full_parameters(model)}
    if training.get_args().use_megatron_fsdp:
        for key, parameter in model[0].param_and_grad_buffer.optimizer_named_parameters:
            for moment in ("exp_avg", "exp_avg_sq"):
                share = optimizer.optimizer.state.get(parameter, {}).get(moment, torch.zeros_like(parameter.data))
                own[f"{whole_name(key)}.{moment}"] = gather_share(share, parameter.orig_param.shape)
        # Of an empty share nobody counts the steps.
        held = [state for parameter, state in optimizer.optimizer.state.items() if parameter.to_local().numel()]
        own["steps"] = torch.tensor(sorted({float(state["step"]) for state in held}))
    of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, own)
    together: dict[str, Tensor] = {}
    for part in of_ranks:
        for name, value in part.items():
            assert torch.equal(together.setdefault(name, value), value), f"ranks differ in {name}"
    return together


def run(flags: list[str], out: Path) -> None:
    found: dict[str, Any] = {"states": [], "rates": []}
    provider, train_step = pretrain_multimodal.model_provider, training.train_step

    def built(*args: Any, **kwargs: Any) -> nn.Module:
        model = provider(*args, **kwargs)
        found["meta"] = all(parameter.is_meta for parameter in model.parameters())
        return model

    def watched(*args: Any, **kwargs: Any) -> Any:
        model, optimizer = args[2:4]
        if not found["states"]:
            assert not any(
                tensor.is_meta for tensor in (*unwrapped(model[0]).parameters(), *unwrapped(model[0]).buffers())
            )
            found["states"].append(state_of(model, optimizer))
            raw = {parameter: name for name, parameter in unwrapped(model[0]).named_parameters()}
            if training.get_args().use_megatron_fsdp:
                raw = {sharded.orig_param: name for sharded, name in raw.items()}
            found["marks"] = {
                name: {mark: getattr(parameter, mark) for mark in MARKS if hasattr(parameter, mark)}
                for parameter, name in raw.items()
            }
            found["dtypes"] = {name: parameter.dtype for parameter, name in raw.items()}
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        found["rates"].append(rate)
        outcome = train_step(*args, **kwargs)
        found["states"].append(state_of(model, optimizer))
        return outcome

    pretrain_multimodal.model_provider, training.train_step = built, watched
    pretrain_multimodal.main(flags)
    if os.environ["RANK"] == "0":
        torch.save(found, out)


def start(job: dict[str, Any], out: Path) -> None:
    """Fork the job's ranks and wait; exits when one fails, after ending the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = {}
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid:
            ranks[pid] = rank
            continue
        os.environ.update(address, RANK=str(rank), WORLD_SIZE=str(job["ranks"]), LOCAL_RANK=str(rank))
        code = 1
        try:
            run(job["flags"], out)
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.exit(code)  # ends the processes that saving has started
    while ranks:
        pid, status = os.wait()
        del ranks[pid]
        if status:
            for other in ranks:
                os.kill(other, 9)
            sys.exit(f"{out.stem} failed")


def main() -> None:
    torch.set_num_threads(1)
    work = json.loads(Path(sys.argv[1]).read_text())
    for name, job in work["jobs"].items():
        start(job, Path(work["out"]) / f"{name}.pt")


if __name__ == "__main__":
    main()

"""Runs the entry with the real model on forked CPU ranks, several times after one import.

    python tests/parallel/fsdp_program.py JOBS.json

Not a test: a program that test_fsdp.py starts.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)

import torch

torch.set_num_threads(1)
from runtime import cpu, mends

cpu.enable()
mends.apply()

import megatron.training.training as training  # noqa
import pretrain_multimodal  # noqa
from megatron.core import mpu  # noqa
from runtime.full_tensors import full_gradients, full_parameters  # noqa


def global_name(name: str) -> str:
    def shift(found):
        return f"local_experts.{int(found[1]) + shift.offset}."
    if "local_experts" in name:
        local = training.get_args().num_experts // mpu.get_expert_model_parallel_world_size()
        shift.offset = local * mpu.get_expert_model_parallel_rank()
        name = re.sub(r"local_experts\.(\d+)\.", shift, name)
    return name


def own_slice(name, whole):
    """This expert-tensor-parallel rank's part of an expert's weight."""
    ranks, rank = mpu.get_expert_tensor_parallel_world_size(), mpu.get_expert_tensor_parallel_rank()
    if "local_experts" not in name or ranks == 1:
        return whole
    if "linear_fc1" in name:
        return torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])
    return whole.chunk(ranks, dim=1)[rank]


def full_shape(name, parameter):
    ranks = mpu.get_expert_tensor_parallel_world_size()
    shape = list(parameter.shape)
    if "local_experts" in name and ranks > 1:
        shape[0 if "linear_fc1" in name else 1] *= ranks
    return shape


def fill(model) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            seed = int(hashlib.sha256(global_name(name).encode()).hexdigest()[:8], 16)
            generator = torch.Generator().manual_seed(seed)
            shape = full_shape(name, parameter)
            scale = 0.5 / shape[-1] ** 0.5 if parameter.dim() > 1 else 0.3
            noise = own_slice(name, torch.randn(shape, generator=generator, dtype=torch.float64))
            if name.endswith("A_log"):
                parameter.fill_(-3.0)
            elif parameter.dim() > 1:
                parameter.zero_()
            parameter.add_((noise * scale).to(parameter))


def gather(items):
    own = {global_name(n): t.detach().clone().double() if t.dtype == torch.float64 else t.detach().clone() for n, t in items}
    ranks = mpu.get_expert_tensor_parallel_world_size()
    if ranks > 1:
        slices = [None] * ranks
        torch.distributed.all_gather_object(slices, own, group=mpu.get_expert_tensor_parallel_group())
        for n in own:
            if "local_experts" in n:
                parts = [part[n] for part in slices]
                if "linear_fc1" in n:
                    own[n] = torch.cat([part.chunk(2)[half] for half in (0, 1) for part in parts])
                else:
                    own[n] = torch.cat(parts, dim=1)
    every = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)
    together = {}
    for part in every:
        for n, t in part.items():
            if n in together:
                assert torch.equal(together[n], t) or n.endswith("x"), f"ranks differ in {n}"
            together[n] = t
    return together


def moments(model, optimizer):
    if not training.get_args().use_megatron_fsdp:
        return {}
    from runtime.full_tensors import _fsdp_parameters, _gather
    params = dict(model[0].param_and_grad_buffer.optimizer_named_parameters)
    out = []
    for name, key, original in _fsdp_parameters(model[0]):
        state = optimizer.optimizer.state.get(params[key], {})
        zero = torch.zeros_like(params[key])
        for kind in ("exp_avg", "exp_avg_sq"):
            out.append((f"{name}.{kind}", _gather(state.get(kind, zero), original.shape)))
    steps = {float(s["step"]) for s in optimizer.optimizer.state.values()}
    out.append(("steps", torch.tensor(sorted(steps))))
    return gather(out)


def record(job: dict[str, Any]) -> None:
    out = Path(job["out"])
    results: dict[str, Any] = {"steps": [], "by_step": []}
    provider = pretrain_multimodal.model_provider

    def filled(*args: Any, **kwargs: Any) -> Any:
        model = provider(*args, **kwargs)
        results["meta"] = [name for name, p in model.named_parameters() if p.is_meta]
        results["all_meta"] = all(p.is_meta for p in model.parameters())
        if job.get("fill", True):
            fill(model)
        return model

    pretrain_multimodal.model_provider = filled
    step = training.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        model, optimizer = args[2], args[3]
        first = len(results["steps"]) == 0
        own_step = type(optimizer).step

        def optimizer_step() -> Any:
            if first:
                results["start"] = gather(full_parameters(model))
                results["start_moments"] = moments(model, optimizer)
                results["gradients"] = gather(full_gradients(model))
            return own_step(optimizer)

        optimizer.step = optimizer_step
        done = step(*args, **kwargs)
        results["steps"].append(({n: float(x) for n, x in done[0].items() if 'loss' in n}, float(done[5])))
        results["parameters"] = gather(full_parameters(model))
        results["moments"] = moments(model, optimizer)
        results["by_step"].append((results["parameters"], results["moments"]))
        return done

    training.train_step = train_step
    try:
        pretrain_multimodal.main(job["flags"])
    except SystemExit as e:
        if e.code:
            raise
    if int(os.environ["RANK"]) == 0:
        torch.save(results, out)


def rank_main(job: dict[str, Any], rank: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(job["ranks"]), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    if job["log"]:
        fd = os.open(f"{job['log']}.{rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
    try:
        if job.get("float64"):
            from tests.float64 import float64
            with float64():
                record(job)
        else:
            record(job)
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(job: dict[str, Any]) -> bool:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            rank_main(job, rank, port)
        pids.append(pid)
    ok = True
    left = set(pids)
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status:
            ok = False
            for other in left:
                try:
                    os.kill(other, 9)
                except ProcessLookupError:
                    pass
    return ok


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for name, job in jobs.items():
        import time
        t = time.time()
        ok = run(job)
        print(name, "ok" if ok else "FAILED", f"{time.time() - t:.1f}s", flush=True)

"""Runs `pretrain_multimodal.main()` several times in one process, whose import of Megatron takes longer than a run.

    [torch.distributed.run --nproc-per-node N] tests/train_jobs.py RUNS.json

RUNS.json: a list of command lines. Not a test: a program that tests start, and `run` is how.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A step on a few mock documents. The learning rate of zero leaves every weight as it is.
FLAGS = [
    *("--dataset-provider", "mock", "--image-size", "64", "--image-seq-length", "4", "--use-packed-sequence"),
    *("--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "2", "--train-iters", "1", "--bf16"),
    *("--lr", "0", "--weight-decay", "0", "--use-distributed-optimizer", "--num-workers", "0"),
    *("--eval-iters", "0", "--eval-interval", "10"),
]


def run(folder: Path, runs: list[list[str]], ranks: int = 1, *, fsdp: bool = False) -> str:
    """Start one job that does all `runs` with FLAGS before their own; what it printed.

    fsdp: they use Megatron-FSDP, which refuses the one connection that tensor parallelism wants.
    """
    job = folder / "runs.json"
    job.write_text(json.dumps(runs))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if fsdp else {"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    command = [sys.executable, "-W", "ignore", *launcher, __file__, str(job)]
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def main() -> None:
    import torch
    from megatron.training.training import destroy_global_state

    import pretrain_multimodal

    destroy = torch.distributed.destroy_process_group
    # The next run goes on with the default group.
    torch.distributed.destroy_process_group = lambda group=None: None if group is None else destroy(group)
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        pretrain_multimodal.main([*FLAGS, *flags])
        destroy_global_state()
    destroy()


if __name__ == "__main__":
    from runtime import cpu, mends

    cpu.enable()
    mends.apply()
    main()

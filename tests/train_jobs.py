"""Runs `pretrain_multimodal.main()` several times after one import of Megatron, which takes longer than a run.

    [torch.distributed.run --nproc-per-node N] tests/train_jobs.py RUNS.json

RUNS.json: a list of command lines; one that begins with the word fp32 runs in float32. Not a test: a program that
tests start, and `run` is how.
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
    *("--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "2", "--train-iters", "1"),
    *("--lr", "0", "--weight-decay", "0", "--use-distributed-optimizer", "--num-workers", "0"),
    *("--eval-iters", "0", "--eval-interval", "10"),
]


FP32 = "fp32"


def run(folder: Path, runs: list[list[str]], ranks: int = 1, *, fsdp: bool = False) -> str:
    """Start one job that does all `runs` with FLAGS before their own; what it printed.

    fsdp: they use Megatron-FSDP, which refuses the one connection that tensor parallelism wants.
    """
    job = folder / "runs.json"
    job.write_text(json.dumps(runs))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if fsdp else {"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    command = [sys.executable, *launcher, __file__, str(job)]
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def main() -> None:
    import megatron.training  # noqa: F401  before the forks

    import pretrain_multimodal
    import weights.job  # noqa: F401

    for index, flags in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        # A process of its own, which has Megatron imported: process groups and globals end with it.
        child = os.fork()
        if child == 0:
            if "MASTER_PORT" in os.environ:  # a store of its own: torchrun's still has the last run's addresses
                port = int(os.environ["MASTER_PORT"]) + 1 + index
                os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
            precision, flags = ([], flags[1:]) if flags[:1] == [FP32] else (["--bf16"], flags)
            pretrain_multimodal.main([*FLAGS, *precision, *flags])
            return  # the interpreter's own exit ends the processes that saving has started
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
            raise SystemExit(f"run {index} failed: {' '.join(flags)}")


if __name__ == "__main__":
    from runtime import prepare

    prepare()
    main()

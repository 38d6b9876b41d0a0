"""`megatron.training.pretrain()` on CPU ranks: one rank against two, and from its checkpoints."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.heavy

PROGRAM = Path(__file__).with_name("tiny_pretrain.py")
MOE = ["--num-experts", "4", "--moe-router-topk", "2", "--moe-token-dispatcher-type", "alltoall"]
MOE += ["--moe-aux-loss-coeff", "1e-2", "--moe-router-load-balancing-type", "aux_loss"]

# Sums may be rounded in another order on two ranks. Measured: 0; without an optimizer step of its own for each
# parameter, 1.8e-4.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pretrain")


def _start(
    folder: Path, name: str, launcher: list[str], runs: dict[str, list[str]]
) -> tuple[dict[str, list[float]], str]:
    """Run all of `runs` in one job; their losses per iteration and what the job printed."""
    job = folder / f"{name}.json"
    job.write_text(json.dumps({"out": str(folder), "runs": runs}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    command = [sys.executable, *launcher, str(PROGRAM), str(job)]
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-5000:]
    return {name: json.loads((folder / f"{name}-losses.json").read_text()) for name in runs}, done.stdout


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> tuple[dict[str, list[float]], str]:
    """Four iterations each, saved after two; started without torchrun."""
    save = ["--save-interval", "2", "--dist-ckpt-optim-fully-reshardable", "--save"]
    return _start(
        folder,
        "one",
        [],
        {
            "dense": [*save, str(folder / "dense"), "--tensorboard-dir", str(folder), "--log-memory-to-tensorboard"],
            "moe": [*MOE, *save, str(folder / "moe"), "--train-iters", "2", "--lr-decay-iters", "4"],
            # Megatron-core can't bring the optimizer's state from EP1 to EP2.
            "moe_on": [*MOE, "--load", str(folder / "moe"), "--no-load-optim"],
            "bf16": ["--bf16", *save, str(folder / "bf16")],
        },
    )


@pytest.fixture(scope="module")
def two_ranks(folder: Path, one_rank: tuple[dict[str, list[float]], str]) -> dict[str, list[float]]:
    """Iterations three and four on two ranks, from the one rank's checkpoint."""
    for model in ("dense", "bf16"):
        (folder / model / "latest_checkpointed_iteration.txt").write_text("2")
    load = ["--dist-ckpt-optim-fully-reshardable", "--load"]
    tensor_parallel = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return _start(
        folder,
        "two",
        launcher,
        {
            "data": [*load, str(folder / "dense")],
            "tensor": [*load, str(folder / "dense"), *tensor_parallel],
            "pipeline": [*load, str(folder / "dense"), "--pipeline-model-parallel-size", "2"],
            "expert": [*load, str(folder / "moe"), *MOE, "--no-load-optim", "--expert-model-parallel-size", "2"],
            "bf16_data": ["--bf16", *load, str(folder / "bf16")],
        },
    )[0]


def test_one_rank_trains(one_rank: tuple[dict[str, list[float]], str]) -> None:
    for name, losses in one_rank[0].items():
        assert all(math.isfinite(loss) for loss in losses), name
    for name in ("dense", "moe", "bf16"):
        assert one_rank[0][name][0] == pytest.approx(math.log(64), abs=0.1)


def test_megatron_reports_the_process_memory(one_rank: tuple[dict[str, list[float]], str], folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert "| max allocated: " in one_rank[1]
    events = EventAccumulator(str(folder))
    events.Reload()
    # Python with torch loaded takes a few hundred MB.
    assert all(1e8 < event.value < 1e11 for event in events.Scalars("mem-allocated-bytes"))


@pytest.mark.parametrize(
    ("run", "reference"),
    [("data", "dense"), ("tensor", "dense"), ("pipeline", "dense"), ("expert", "moe_on"), ("bf16_data", "bf16")],
)
def test_two_ranks_resume_as_one_goes_on(
    one_rank: tuple[dict[str, list[float]], str], two_ranks: dict[str, list[float]], run: str, reference: str
) -> None:
    """Parameters, Adam's moments and steps, scheduler and data position all come from the checkpoint.

    The loss of iteration three shows the parameters, that of iteration four the optimizer's state.
    """
    torch.testing.assert_close(
        torch.tensor(two_ranks[run][2:]), torch.tensor(one_rank[0][reference][2:]), rtol=TOLERANCE, atol=0
    )

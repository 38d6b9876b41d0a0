"""A step all of whose samples are broken changes neither weights nor optimizer, bit by bit, in any optimizer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

FLAGS = [
    *("--model-variant", "tiny_moe", "--dataset-provider", "broken_documents:step", "--max-bad-fraction", "1"),
    *("--use-packed-sequence", "--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "4"),
    *("--lr", "1e-2", "--weight-decay", "0.1", "--train-iters", "4", "--num-workers", "0", "--eval-iters", "0"),
    *("--eval-interval", "1000", "--log-interval", "1", "--distributed-timeout-minutes", "3", "--bf16"),
]
FSDP = ("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params", "--ckpt-format fsdp_dtensor")
JOBS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "distopt": (2, ("--use-distributed-optimizer",)),
    "ep2": (2, ("--expert-model-parallel-size 2",)),
    "pp2": (2, ("--pipeline-model-parallel-size 2",)),
    "fsdp": (2, FSDP),
}
SLOW = ("ep2", "pp2", "fsdp")
NAMES = [pytest.param(name, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name in JOBS]


@pytest.fixture(scope="module")
def printed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with what each selected job held, and what all of them printed."""
    folder = tmp_path_factory.mktemp("empty_steps")
    items = [item for item in request.session.items if item.path == request.path]
    selected = {item.callspec.params["name"] for item in items if hasattr(item, "callspec")}
    jobs = {
        name: {"ranks": ranks, "flags": [*FLAGS, *" ".join(flags).split()]}
        for name, (ranks, flags) in JOBS.items()
        if name in selected
    }
    (folder / "jobs.json").write_text(json.dumps({"out": str(folder), "jobs": jobs}))
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("state_runs.py")), str(folder / "jobs.json")],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return folder, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_nothing_changes(name: str, printed: tuple[Path, str]) -> None:
    """Step 2 is broken on all ranks. Step 3 is so on one rank of two alone, and trains."""
    states = json.loads((printed[0] / f"{name}.json").read_text())
    first, second, third, last = (
        [key for key in before | after if before.get(key) != after.get(key)] for before, after in pairwise(states)
    )
    assert first and third and last
    assert second == []


def test_the_log_says_so(printed: tuple[Path, str]) -> None:
    """By an own line, and as Megatron counts steps that are left out; its loss is no NaN."""
    folder, text = printed
    jobs = sum(file.stem in JOBS for file in folder.glob("*.json"))
    assert text.count("> iteration 2: skipped, no sample of it can be trained on") == jobs > 0
    lines = re.findall(r"iteration +(\d)/ .*", text)
    assert lines.count("2") == jobs
    for line in re.findall(r"iteration +2/ .*", text):
        assert "number of skipped iterations:   1" in line and "number of nan iterations:   0" in line
        assert " loss: nan" not in line
    for line in re.findall(r"iteration +[134]/ .*", text):
        assert "number of skipped iterations:   0" in line and "lm loss" in line

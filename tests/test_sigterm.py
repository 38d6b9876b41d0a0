"""SIGTERM to a job: it saves, ends with exit code 0, and the next one goes on as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import checkpoints
from tests import training_server
from tests.training_server import ROOT, Job, TrainingServer

pytestmark = pytest.mark.heavy

ITERATIONS = 12
FLAGS = ("--model-variant", "tiny", "--train-iters", str(ITERATIONS), "--save-interval", "100", "--num-workers", "1")


@pytest.fixture(scope="module")
def server() -> Iterator[TrainingServer]:
    with TrainingServer.running() as server:
        yield server


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(2, ()), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, ()), (2, ("--async-save",))])],
)
def test_a_terminated_run_saves_and_goes_on(
    server: TrainingServer, tmp_path: Path, ranks: int, flags: tuple[str, ...]
) -> None:
    """The signal reaches ranks, workers and, since the first save, Megatron's own processes alike."""
    save = tmp_path / "checkpoints"
    command = (*FLAGS, "--save", str(save), *flags)
    whole = server.train(tmp_path / "whole", *FLAGS, ranks=ranks)
    first = server.run(Job(str(tmp_path / "first"), (*command, "--save-interval", "1"), ranks, terminate_after=0.5))
    assert first.codes == [0] * ranks, first.log()[-4000:]
    assert "SIGTERM: the run saves and ends" in first.log()
    taken = len(first.steps())
    assert 0 < taken < ITERATIONS
    assert [len(first.steps(rank)) for rank in range(ranks)] == [taken] * ranks  # all ended after the same step
    assert checkpoints.read_tracker(save) == taken
    second = server.train(tmp_path / "second", *command, "--load", str(save), ranks=ranks)
    for rank in range(ranks):
        assert first.steps(rank) + second.steps(rank) == whole.steps(rank)


def end_by_signal(command: list[str], log: Path, **environment: str) -> tuple[int, float]:
    """Start a job, send SIGTERM to the process that was started once the second iteration is printed.

    Returns:
        Its exit code, and the seconds that it took to end.
    """
    with open(log, "w") as file:
        run = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    end = time.monotonic() + 900
    while not re.search(r"iteration +2/", log.read_text()):
        assert run.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.1)
    begin = time.monotonic()
    run.send_signal(signal.SIGTERM)
    return run.wait(timeout=900), time.monotonic() - begin


def lines(log: str) -> dict[int, tuple[str, ...]]:
    """Iteration -> what is printed of its loss, rate and gradient."""
    found = re.findall(r"iteration +(\d+)/.*?learning rate: (\S+).*?lm loss: (\S+).*?grad norm: (\S+)", log)
    return {int(iteration): tuple(figures) for iteration, *figures in found}


@pytest.mark.slow
def test_through_the_launcher(tmp_path: Path) -> None:
    """Two ranks; as Kubernetes sends it, to the first process alone. The log is whole: tee lives to the end."""
    settings = {"SKIP_ENV": "1", "GPUS_PER_NODE": "2", "TRAIN_ITERS": "40", "DATASET_PROVIDER": "mock"}
    settings |= {"OUTPUT_DIR": str(tmp_path / "run"), "SEQ_LEN": "128", "MBS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "scripts/run_qwen35_vl.sh"), "--image-size", "64", "--image-seq-length", "4"]
    command += ["--eval-iters", "0"]
    code, _ = end_by_signal(command, tmp_path / "first", **settings)
    first = (tmp_path / "first").read_text()
    assert code == 0, first[-4000:]
    assert "2 ranks have 1800 seconds" in first and first.count("the run saves and ends") == 2
    assert first in (tmp_path / "run/log-0.txt").read_text()
    taken = max(lines(first))
    assert 2 <= taken < 40 and checkpoints.read_tracker(tmp_path / "run/checkpoints") == taken

    def train(**variables: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings, **variables}
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout

    rest = lines(train(CKPT_RESUME="1"))
    assert lines(first) | rest == lines(train(OUTPUT_DIR=str(tmp_path / "whole")))
    assert set(lines(first)) | set(rest) == set(range(1, 41)) and min(rest) == taken + 1


# pretrain_multimodal.py, which takes longer to save than torchrun waits.
SLOW_SAVING = """
import sys, time
import pretrain_multimodal
from runtime import checkpoints, saving
make_room = checkpoints.make_room
checkpoints.make_room = lambda *args: (time.sleep(40), make_room(*args))
if __name__ == "__main__":
    pretrain_multimodal.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_save_that_takes_longer_than_torchrun_waits(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(SLOW_SAVING)
    agent = [sys.executable, str(ROOT / "scripts/agent.py"), "--standalone", "--nproc-per-node", "2", str(program)]
    flags = [*training_server.FLAGS, *FLAGS, "--train-iters", "1000", "--save", str(tmp_path / "checkpoints")]
    code, seconds = end_by_signal([*agent, *flags], tmp_path / "log", PYTHONPATH=str(ROOT))
    log = (tmp_path / "log").read_text()
    assert code == 0 and seconds > 40, log[-4000:]
    assert checkpoints.read_tracker(tmp_path / "checkpoints") == max(lines(log))
    saved = tmp_path / "checkpoints"
    assert checkpoints.problem(saved, checkpoints.choose(saved, None, "torch_dist"), "torch_dist") is None

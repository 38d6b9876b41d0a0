"""A rank or a loader's worker that dies ends the job: its own traceback, an exit code, no waiting, nothing left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training_server import FLAGS, ROOT

pytestmark = pytest.mark.heavy

# pretrain_multimodal.py with rank 1 coming to grief in its third step.
PROGRAM = """
import os, signal, sys, time
import pretrain_multimodal
from forward_step import ForwardStep
from data import reader
how = sys.argv[1]
call, batch, calls = ForwardStep.__call__, reader.MicroBatches.__iter__, []

def failing(self, *args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 5:
        print("dying", time.time(), file=sys.stderr, flush=True)
        if how == "raise":
            raise ValueError("rank 1 has had enough")
        os.kill(os.getppid() if how == "agent" else os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
    return call(self, *args)

def dying_worker(self):
    for number, item in enumerate(batch(self)):
        if os.environ["RANK"] == "1" and number == 4:
            print("dying", time.time(), file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

if how == "worker":
    reader.MicroBatches.__iter__ = dying_worker
else:
    ForwardStep.__call__ = failing
if __name__ == "__main__":
    pretrain_multimodal.main(sys.argv[2:])
"""


# In the environment of all processes of a job.
MARK = "TEST_DYING_RANKS"


def die(folder: Path, how: str, launcher: list[str], *flags: str) -> tuple[int, str, float]:
    """Exit code, what was printed, and the seconds from the death to the end of the job."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment[MARK] = str(folder)
    command = [sys.executable, *launcher, str(program), how, "--model-variant", "tiny", *FLAGS, "--train-iters", "50"]
    with open(folder / "log", "w") as log:
        run = subprocess.run([*command, *flags], env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=900)
        end = time.time()
    while left := marked(folder):
        assert time.time() < end + 20, f"{left} are still there"
        time.sleep(0.2)
    printed = (folder / "log").read_text()  # now, since ranks may outlive their agent for a second
    died = re.search(r"dying ([0-9.]+)", printed)
    assert died, printed[-3000:]
    return run.returncode, printed, end - float(died[1])


def marked(folder: Path) -> list[str]:
    """Command lines of the job's processes, however far removed from it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended meanwhile, or somebody else's
            continue
    return found


TORCHRUN = [str(ROOT / "scripts/agent.py"), "--standalone", "--nproc-per-node", "2"]
# torchrun gives the other rank 30 seconds; --distributed-timeout-minutes is 2.
SECONDS = 60


def test_a_rank_that_raises_ends_the_job(tmp_path: Path) -> None:
    code, log, seconds = die(tmp_path, "raise", TORCHRUN)
    assert code == 1
    assert "ValueError: rank 1 has had enough" in log and "in failing" in log
    summary = log[log.index("Root Cause (first observed failure)") :]
    assert re.search(r"rank +: 1 ", summary) and "ValueError: rank 1 has had enough" in summary
    assert seconds < SECONDS


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_job(tmp_path: Path) -> None:
    code, log, seconds = die(tmp_path, "worker", TORCHRUN, "--num-workers", "1")
    assert code == 1
    assert re.search(r"DataLoader worker \(pid.*\) (is killed by signal: Killed|exited unexpectedly)", log)
    assert seconds < SECONDS


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_job(tmp_path: Path) -> None:
    """Megatron's queue of write results ends with it."""
    save = ("--save", str(tmp_path / "checkpoints"), "--save-interval", "1", "--num-workers", "1")
    code, log, seconds = die(tmp_path, "kill", TORCHRUN, *save)
    assert code == 1
    assert "Signal 9 (SIGKILL) received by PID" in log
    assert seconds < SECONDS


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_within_the_timeout(tmp_path: Path) -> None:
    code, log, seconds = die(tmp_path, "stop", TORCHRUN, "--distributed-timeout-minutes", "1")
    assert code == 1
    assert re.search(r"[Tt]imed out waiting 60000ms", log), log[-3000:]
    assert seconds < 60 + SECONDS


@pytest.mark.slow
def test_an_agent_that_is_killed_ends_the_job(tmp_path: Path) -> None:
    """Ranks, workers and all."""
    save = ("--save", str(tmp_path / "checkpoints"), "--save-interval", "1", "--num-workers", "1")
    code, log, _ = die(tmp_path, "agent", TORCHRUN, *save)
    assert code == -9
    assert "torchrun's agent has ended, so this rank ends too" in log

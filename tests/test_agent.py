"""scripts/agent.py: SIGTERM is the ranks' to act on, with more time than torchrun gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[1]
# A rank that takes its time to save when it is told to, and fails or ends well.
RANK = """
import os, signal, sys, time
seconds, code = float(sys.argv[1]), int(sys.argv[2])
def save(*_):
    print("saving", os.environ["RANK"], flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(seconds)
    print("saved", os.environ["RANK"], flush=True)
    sys.exit(code)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(600)
"""


def terminated(folder: Path, seconds: float, code: int = 0, **environment: str) -> tuple[int, list[str], float]:
    """Exit code, what the ranks printed, and the seconds from SIGTERM to the end."""
    program = folder / "rank.py"
    program.write_text(RANK)
    command = [sys.executable, "scripts/agent.py", "--standalone", "--nproc-per-node", "2"]
    with open(folder / "errors", "w") as errors:
        run = subprocess.Popen(
            [*command, str(program), str(seconds), str(code)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert [run.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        begin = time.monotonic()
        run.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        run.send_signal(signal.SIGTERM)  # again, as srun may
        printed = run.stdout.read().splitlines()
        return run.wait(), sorted(printed), time.monotonic() - begin


SAVED = ["saved 0", "saved 1", "saving 0", "saving 1"]


def test_ranks_save_and_end(tmp_path: Path) -> None:
    code, printed, _ = terminated(tmp_path, 2)
    assert (code, printed) == (0, SAVED), (tmp_path / "errors").read_text()


@pytest.mark.slow
def test_ranks_save_for_longer_than_torchrun_waits(tmp_path: Path) -> None:
    code, printed, seconds = terminated(tmp_path, 40)
    assert (code, printed) == (0, SAVED) and seconds > 40


@pytest.mark.slow
def test_a_rank_that_fails_to_save_fails_the_job(tmp_path: Path) -> None:
    assert terminated(tmp_path, 1, code=3)[0] == 1


@pytest.mark.slow
def test_ranks_that_never_end_are_stopped(tmp_path: Path) -> None:
    """After SAVE_SECONDS they have torchrun's 30."""
    code, printed, seconds = terminated(tmp_path, 600, SAVE_SECONDS="3")
    assert code != 0 and "saved 0" not in printed and seconds < 60
    assert "the ranks haven't ended 3 seconds after SIGTERM" in (tmp_path / "errors").read_text()


def test_seconds_that_are_none() -> None:
    command = [sys.executable, "scripts/agent.py", "x.py"]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "SAVE_SECONDS": "1e3"}, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr == "SAVE_SECONDS=1e3: expected a number above 0\n"

"""Processes end with the one that started them, and outlive a SIGTERM that wasn't meant for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Watchers look once a second; the machine may be busy.
SECONDS = 20

# A rank with a worker that waits, as a loader's or a pool's do, and the queue that Megatron's saving uses.
RANK = """
import multiprocessing, os, signal, sys
from runtime import lifetime

lifetime.end_with_agent()
signal.signal(signal.SIGTERM, lambda *_: print("term", flush=True))
own = os.getpid()

def work(connection):
    lifetime.end_with_parent(own)
    connection.recv()

with lifetime.shielded():
    pipe = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(pipe[1],), daemon=True)
    process.start()
queue = lifetime.write_results_queue()
queue.put("alive")
workers = [process.pid, queue._manager._process.pid]
print("pids", own, *workers, flush=True)
for line in sys.stdin:
    if line == "alive?\\n":
        print(process.is_alive(), queue.get(), flush=True)
        queue.put("alive")
    elif line == "end\\n":
        break
"""


def begin(environment: dict[str, str] | None = None, command: list[str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command or [sys.executable, "-c", RANK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        start_new_session=True,
    )


def pids(run: subprocess.Popen[str]) -> list[int]:
    word, *numbers = run.stdout.readline().split()
    assert word == "pids"
    return [int(number) for number in numbers]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def assert_gone(processes: list[int]) -> None:
    end = time.monotonic() + SECONDS
    while left := [pid for pid in processes if is_alive(pid)]:
        assert time.monotonic() < end, f"{left} of {processes} are still there"
        time.sleep(0.1)


def test_children_outlive_a_signal_to_the_job_and_end_with_their_rank() -> None:
    run = begin()
    own, *children = pids(run)
    assert own == run.pid and len(children) == 2
    for _ in range(2):
        os.killpg(run.pid, signal.SIGTERM)
        assert run.stdout.readline() == "term\n"
        run.stdin.write("alive?\n")
        run.stdin.flush()
        assert run.stdout.readline() == "True alive\n"
    run.kill()
    run.wait()
    assert_gone(children)


def test_a_rank_ends_while_a_child_is_stuck() -> None:
    """multiprocessing sends SIGTERM to its daemons at exit and waits for them: from the parent, it counts."""
    run = begin()
    children = pids(run)[1:]
    run.stdin.write("end\n")
    run.stdin.flush()
    assert run.wait(timeout=SECONDS) == 0
    assert_gone(children)


AGENT = """
import subprocess, sys
print("agent", flush=True)
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""


@pytest.mark.parametrize("torchrun", [True, False])
def test_ranks_end_with_their_agent(torchrun: bool) -> None:
    environment = {"TORCHELASTIC_RUN_ID": "none"} if torchrun else {}
    run = begin(environment, [sys.executable, "-c", AGENT, RANK])
    assert run.stdout.readline() == "agent\n"
    ranks = pids(run)
    run.kill()
    run.wait()
    if torchrun:
        assert_gone(ranks)
        return
    time.sleep(3)
    assert all(is_alive(pid) for pid in ranks)  # plain python outlives its shell
    os.kill(ranks[0], signal.SIGKILL)
    assert_gone(ranks)

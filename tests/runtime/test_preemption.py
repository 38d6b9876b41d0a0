"""The ranks agree to end after one and the same step, whichever of them was asked to."""

from __future__ import annotations

import multiprocessing
import os
import signal
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from runtime.preemption import ExitSignal
from tests.ranks import ROOT


def steps(rank: int, folder: str, ranks: int, asked: dict[int, int]) -> None:
    """Twenty steps, in the one that `asked` says this rank gets the signal; leaves the number of those that it took."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    exit_signal = ExitSignal({signal.SIGTERM}, timedelta(seconds=60))
    taken = 0
    for step in range(1, 21):
        if asked.get(rank) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        taken = step
        if any(exit_signal.signals_received()):
            break
    assert exit_signal.agreed == (taken < 20)
    Path(folder, str(rank)).write_text(str(taken))
    dist.destroy_process_group()


def start(folder: Path, ranks: int, asked: dict[int, int]) -> None:
    """Not forked from this process, which may have process groups of its own."""
    multiprocessing.set_forkserver_preload(["tests.ranks_imports"])  # heeded by the first start of the server
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):
        torch.multiprocessing.start_processes(
            steps, (str(folder), ranks, asked), nprocs=ranks, start_method="forkserver"
        )


@pytest.mark.parametrize(
    ("asked", "expected"),
    [({1: 5}, 6), ({0: 5, 1: 9}, 6), ({0: 1, 1: 1}, 2), ({1: 20}, 20), ({}, 20)],
)
def test_all_ranks_end_after_the_same_step(tmp_path: Path, asked: dict[int, int], expected: int) -> None:
    start(tmp_path, 2, asked)
    assert [int((tmp_path / str(rank)).read_text()) for rank in range(2)] == [expected] * 2


def test_a_single_rank_ends_at_once(tmp_path: Path) -> None:
    start(tmp_path, 1, {0: 5})
    assert (tmp_path / "0").read_text() == "5"

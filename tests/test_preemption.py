"""SIGTERM to a job: it saves, ends with exit code 0, and the next one goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import checkpoints
from tests.training_server import Job, TrainingServer

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
    """The signal reaches ranks, workers and Megatron's own processes alike, which has a process since the first save."""
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

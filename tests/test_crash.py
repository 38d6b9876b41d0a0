"""Killed at any moment, a run goes on as if nothing had happened; a full disk or a damaged file is named."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import checkpoints
from tests.training_server import Job, Result, Step, TrainingServer, read_steps

pytestmark = pytest.mark.heavy

ITERATIONS = 6
FLAGS = ("--model-variant", "tiny", "--train-iters", str(ITERATIONS), "--save-interval", "1")


@pytest.fixture(scope="module")
def server() -> Iterator[TrainingServer]:
    with TrainingServer.running() as server:
        yield server


@pytest.fixture(scope="module")
def uninterrupted(server: TrainingServer, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Step]]:
    """The steps of a run that nobody kills, by number of ranks, made when they are asked for."""

    class Runs(dict[int, list[Step]]):
        def __missing__(self, ranks: int) -> list[Step]:
            folder = tmp_path_factory.mktemp("uninterrupted")
            self[ranks] = server.train(folder, *FLAGS[:-2], ranks=ranks).steps()
            return self[ranks]

    return Runs()


class KilledRun:
    """A training that is started again and again into the same folders."""

    def __init__(self, server: TrainingServer, folder: Path, flags: tuple[str, ...] = (), ranks: int = 1) -> None:
        self.server, self.out, self.ranks = server, folder / "out", ranks
        self.save = folder / "checkpoints"
        self.flags = (*FLAGS, "--save", str(self.save), "--load", str(self.save), *flags)

    @property
    def finished(self) -> bool:
        return checkpoints.read_tracker(self.save) == ITERATIONS

    def go_on(self, **how: float | int) -> Result:
        """Start, and check that it goes on from the last complete checkpoint and says what it leaves."""
        start = checkpoints.choose(self.save, None, "torch_dist")
        assert start.problem is None
        before = len(read_steps(self.out))
        logged = len(self.log())
        result = self.server.run(Job(str(self.out), self.flags, self.ranks, **how))
        if None not in result.codes:
            assert result.codes == [0] * self.ranks, result.log()[-5000:]
        new = read_steps(self.out)[before:]
        if new:
            assert new[0].iteration == (int(start.folder.name[5:]) if start.folder else 0) + 1
        log = self.log()[logged:]
        if "saving checkpoint at iteration" in log:
            assert all(f"notice: {remark}" in log for remark in start.warnings)
        return result

    def log(self) -> str:
        path = self.out / "rank0.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def check(self, uninterrupted: list[Step]) -> None:
        """Every step that was taken, however often, is the uninterrupted run's, and none was left out."""
        steps = read_steps(self.out)
        assert {step.iteration for step in steps} == set(range(1, ITERATIONS + 1))
        assert all(step == uninterrupted[step.iteration - 1] for step in steps)


def changes(log: str) -> list[tuple[int, str]]:
    """What `kill_at` counts: number and what was about to change."""
    return [(int(number), what) for number, what in re.findall(r"^change (\d+): (.*)$", log, re.MULTILINE)]


def test_killed_before_the_last_file(
    server: TrainingServer, uninterrupted: dict[int, list[Step]], tmp_path: Path
) -> None:
    """The newest folder has everything but metadata.json: it isn't taken, and the log says so."""
    # The first run only counts; the second is killed at the same place of its second checkpoint.
    counted = KilledRun(server, tmp_path / "counted")
    counted.go_on(kill_at=10**6)
    place = next(n for n, what in changes(counted.log()) if what.endswith("iter_0000002/metadata.json"))
    run = KilledRun(server, tmp_path / "killed")
    run.go_on(kill_at=place)
    assert (run.save / "iter_0000002/.metadata").exists()
    run.go_on()
    assert f"notice: starting from {run.save / 'iter_0000001'}" in run.log()
    assert f"{run.save / 'iter_0000002'} isn't taken: it has no metadata.json" in run.log()
    run.check(uninterrupted[1])


def test_killed_at_a_random_moment(
    server: TrainingServer, uninterrupted: dict[int, list[Step]], tmp_path: Path
) -> None:
    run = KilledRun(server, tmp_path, ("--async-save", "--keep-last", "2"))
    run.go_on(kill_after=random.uniform(0.2, 2))
    run.go_on()
    run.check(uninterrupted[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(1, ()), (1, ("--async-save", "--keep-last", "2")), (2, ("--keep-last", "1")), (2, ("--async-save",))],
)
def test_killed_again_and_again(
    server: TrainingServer, uninterrupted: dict[int, list[Step]], tmp_path: Path, ranks: int, flags: tuple[str, ...]
) -> None:
    """At least eight kills for each of the four, at random moments of steps and saves."""
    kills = saving = runs = 0
    reach = 1.0  # seconds within which a kill comes
    while kills < 8:
        run = KilledRun(server, tmp_path / str(runs), flags, ranks)
        runs += 1
        while not run.finished:
            before = checkpoints.read_tracker(run.save)
            if run.go_on(kill_after=random.uniform(0, reach)).codes == [None] * ranks:
                kills += 1
                saving += any("isn't taken" in r for r in checkpoints.choose(run.save, None, "torch_dist").warnings)
                # However fast the machine is, some kills come before a checkpoint and some after several.
                reach *= 1.5 if checkpoints.read_tracker(run.save) == before else 0.8
            assert kills < 100, "it doesn't get on"
        run.check(uninterrupted[ranks])
    print(f"{kills} kills in {runs} runs, {saving} of them while saving")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--async-save",), ("--keep-last", "1")])
def test_killed_at_every_change_of_a_save(
    server: TrainingServer, uninterrupted: dict[int, list[Step]], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """One kill before each file that a save makes, renames or deletes, from the second checkpoint on."""
    counted = KilledRun(server, tmp_path / "counted", flags)
    counted.go_on(kill_at=10**6)
    found = changes(counted.log())
    first = next(n for n, what in found if "iter_0000002" in what)
    end = next(n for n, what in found if "iter_0000004" in what)
    assert end - first > 8
    for place in range(first, end):
        run = KilledRun(server, tmp_path / str(place), flags)
        run.go_on(kill_at=place)
        run.go_on()
        run.check(uninterrupted[1])
        shutil.rmtree(tmp_path / str(place))


@pytest.fixture(scope="module")
def two_checkpoints(server: TrainingServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    server.train(folder / "out", *FLAGS, "--exit-interval", "2", "--save", str(folder / "checkpoints"))
    return folder / "checkpoints"


def start(server: TrainingServer, out: Path, load: Path, *flags: str) -> Result:
    return server.run(Job(str(out), (*FLAGS, "--load", str(load), "--exit-interval", "3", *flags)))


def test_damaged_checkpoint_is_refused(server: TrainingServer, two_checkpoints: Path, tmp_path: Path) -> None:
    load = shutil.copytree(two_checkpoints, tmp_path / "checkpoints")
    shard = load / "iter_0000002/__0_0.distcp"
    size = shard.stat().st_size
    with open(shard, "r+b") as file:
        file.truncate(1000)
    result = start(server, tmp_path / "out", load)
    assert result.codes == [2]
    assert f"{shard} has 1000 bytes of {size}: the checkpoint is damaged" in result.log()
    assert "--ckpt-step 1 takes the last" in result.log()
    assert "initializing torch distributed" not in result.log()
    again = start(server, tmp_path / "again", load, "--ckpt-step", "1")
    assert again.codes == [0] and again.steps()[0].iteration == 2


def test_corrupt_tracker_is_mended(
    server: TrainingServer, two_checkpoints: Path, uninterrupted: dict[int, list[Step]], tmp_path: Path
) -> None:
    load = shutil.copytree(two_checkpoints, tmp_path / "checkpoints")
    (load / checkpoints.TRACKER).write_text("")  # as a kill between opening and writing leaves it
    result = start(server, tmp_path / "out", load)
    assert result.codes == [0], result.log()[-3000:]
    assert f"{load / checkpoints.TRACKER} is empty or corrupt" in result.log()
    assert result.steps() == uninterrupted[1][2:3]
    assert checkpoints.read_tracker(load) == 2


@pytest.mark.parametrize("flags", [(), pytest.param(("--async-save",), marks=pytest.mark.slow)])
def test_full_disk_loses_nothing(
    server: TrainingServer,
    two_checkpoints: Path,
    uninterrupted: dict[int, list[Step]],
    tmp_path: Path,
    flags: tuple[str, ...],
) -> None:
    """A limit on the size of files stands in for the disk: the shard can't be written to its end."""
    save = shutil.copytree(two_checkpoints, tmp_path / "checkpoints")
    command = (*FLAGS, "--load", str(save), "--save", str(save), "--exit-interval", "3", *flags)
    result = server.run(Job(str(tmp_path / "full"), command, file_bytes=1 << 20))
    assert result.codes == [1]
    assert f"{save / 'iter_0000003/__0_0.distcp'} can't be written: [Errno 27] File too large" in result.log()
    assert f"while saving {save / 'iter_0000003'} (free there: " in result.log()
    assert "iteration 2 is the last complete one" in result.log()
    again = server.run(Job(str(tmp_path / "again"), command))
    assert again.codes == [0], again.log()[-3000:]
    assert again.steps() == uninterrupted[1][2:3]
    assert checkpoints.read_tracker(save) == 3

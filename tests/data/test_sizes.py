"""Measuring: shared by processes, resumable, kept, and what is broken counted by reason."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from toy_data import ToyDataset

import data.sizes
from data.bad_log import BadSampleLog, BadSamplePolicy
from data.bad_sample import BadSample, Reason
from data.pack import Lost
from data.plan import PackPlan
from data.sample import Sample
from data.sizes import SampleSize, measure

LENGTHS = [1 + index % 90 for index in range(1000)]


class Bad(ToyDataset):
    """Every tenth sample is broken, in two ways; which are measured is written down."""

    def __init__(self, lengths: list[int], cache_dir: Path | None, notes: Path | None = None) -> None:
        super().__init__(lengths, cache_dir=cache_dir)
        self.notes = notes

    def size(self, index: int) -> SampleSize:
        if self.notes is not None:
            with self.notes.open("a") as file:
                file.write(f"{index}\n")
        if index % 10 == 0:
            reason = Reason.IMAGE if index % 20 else Reason.MALFORMED
            raise BadSample(reason, f"toy/{index}: it is what it is")
        return super().size(index)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.sizes, "SHARD", 64)
    monkeypatch.setattr(data.sizes, "_POLL", 0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_counted_and_named(workers: int, tmp_path: Path) -> None:
    for dataset in (Bad(LENGTHS, None), Bad(LENGTHS, tmp_path), Bad(LENGTHS, tmp_path)):
        sizes = measure(dataset, workers=workers)
        assert sizes.tokens.tolist() == [0 if index % 10 == 0 else length for index, length in enumerate(LENGTHS)]
        assert sizes.broken == {"malformed conversation": 50, "unreadable image": 50}
        assert (
            sizes.examples[:2] == ("toy/0: it is what it is", "toy/10: it is what it is") and len(sizes.examples) == 10
        )
    said = [json.loads(line) for line in sizes.bad_file.read_text().splitlines()]
    assert len(said) == 100 and said[1] == {"reason": "unreadable image", "sample": "toy/10: it is what it is"}
    plan = PackPlan(sizes, seed=0, token_budget=90, packed=True)
    assert plan.samples == 900 and "50 broken: unreadable image" in plan.summary()


def measure_in_process(folder: Path, rank: int, world: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    measure(Bad(LENGTHS, folder, folder / f"measured-{rank}"))


def test_processes_share_the_work_and_measure_each_row_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=measure_in_process, args=(tmp_path, rank, 3)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    measured = [file.read_text().split() for file in tmp_path.glob("measured-*")]
    assert sorted(int(index) for rank in measured for index in rank) == list(range(1000))
    again = measure(Bad(LENGTHS, tmp_path, tmp_path / "again"))
    assert not (tmp_path / "again").exists()
    assert np.array_equal(again.tokens, measure(Bad(LENGTHS, None)).tokens)
    assert not list(tmp_path.glob("sizes-*/"))  # the shards are gone
    assert {file.stat().st_mode & 0o777 for file in tmp_path.glob("sizes-*.npz")} == {0o644}


class Dying(Bad):
    def size(self, index: int) -> SampleSize:
        if index == 700:
            raise KeyboardInterrupt
        return super().size(index)


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure(Dying(LENGTHS, tmp_path, tmp_path / "first"))
    measure(Bad(LENGTHS, tmp_path, tmp_path / "second"))
    second = [int(index) for index in (tmp_path / "second").read_text().split()]
    assert second == list(range(640, 1000))  # whole shards of 64 are kept


@pytest.mark.parametrize("damage", [b"", b"x" * 100, "half"])
def test_a_damaged_file_is_measured_again_with_a_notice(
    damage: bytes | str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = measure(Bad(LENGTHS, tmp_path))
    (file,) = tmp_path.glob("sizes-*.npz")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if damage == "half" else damage)
    assert np.array_equal(measure(Bad(LENGTHS, tmp_path)).tokens, expected.tokens)
    assert f"{file} is damaged" in capsys.readouterr().err
    assert np.array_equal(measure(Bad(LENGTHS, tmp_path)).tokens, expected.tokens)
    assert capsys.readouterr().err == ""


class Several(ToyDataset):
    """Row i has i % 3 + 1 samples of the lengths i + 1, i + 2, ..."""

    def sizes(self, index: int) -> Sequence[SampleSize]:
        return [SampleSize(index + 1 + part, 0, 1) for part in range(index % 3 + 1)]

    def sample(self, index: int, part: int) -> Sample:
        raise AssertionError


def test_rows_of_several_samples(tmp_path: Path) -> None:
    for cache in (None, tmp_path, tmp_path):
        sizes = measure(Several([0] * 5, cache_dir=cache))
        assert sizes.tokens.tolist() == [1, 2, 3, 3, 4, 5, 4, 5, 6]
        assert [sizes.place(sample) for sample in range(9)] == [
            *((0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0), (4, 0), (4, 1)),
        ]


# What a run bears


def test_too_many_broken_samples_stop_the_run_before_it_trains(tmp_path: Path) -> None:
    sizes = measure(Bad(LENGTHS, tmp_path))
    BadSamplePolicy(max_fraction=0.1).check_measured("toy", sizes)
    with pytest.raises(ValueError, match="toy: 100 of 1000 samples are broken") as caught:
        BadSamplePolicy(max_fraction=0.099).check_measured("toy", sizes)
    for said in ("50 malformed conversation, 50 unreadable image", "--max-bad-fraction 0.099", "toy/0:", "bad.jsonl"):
        assert said in str(caught.value)
    with pytest.raises(ValueError, match="--on-bad-sample skip leaves them out"):
        BadSamplePolicy(fails=True, max_fraction=1.0).check_measured("toy", sizes)


def test_too_many_broken_samples_stop_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = BadSampleLog("toy", BadSamplePolicy(max_fraction=0.1), tmp_path / "run/bad.jsonl")
    lost = [Lost(index, 0, 7, Reason.IMAGE, f"toy/{index}: cut") for index in range(30)]
    log.count(40, lost[:9])  # a share says nothing yet
    log.count(59, [])
    log.count(10, lost[9:10])
    with pytest.raises(ValueError, match=r"11 of 109 samples .* \(11 unreadable image\).*toy/10: cut"):
        log.count(0, lost[10:11])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 10 and "toy/0: cut (unreadable image)" in printed[0] and "its 7 trained tokens" in printed[0]
    assert len((tmp_path / "run/bad.jsonl").read_text().splitlines()) == 11
    with pytest.raises(ValueError, match=r"toy/0: cut .*--on-bad-sample skip"):
        BadSampleLog("toy", BadSamplePolicy(fails=True), None).count(1, lost[:1])

"""Packs: every sample once an epoch, within budgets, the same at an index however it is reached."""

from __future__ import annotations

import random
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_data import ToyDataset

import data.plan
from data.lengths import lengths_of
from data.pack import IndexedPacks, Pack
from data.plan import PackPlan
from data.sample import Sample
from data.sizes import SampleSize, Sizes, measure


def ragged(count: int, longest: int = 100) -> list[int]:
    numbers = random.Random(0)
    return [numbers.randint(1, longest) for _ in range(count)]


def plan_of(lengths: list[int], patches: list[int] | None = None, **changes: object) -> PackPlan:
    arguments = {"seed": 7, "token_budget": 100, "patch_budget": None, "packed": True} | changes
    return PackPlan(measure(ToyDataset(lengths, patches)), **arguments)


def packs_of(plan: PackPlan, start: int, count: int) -> list[list[int]]:
    return [plan[index].tolist() for index in range(start, start + count)]


@pytest.mark.parametrize("packed", [True, False])
def test_every_epoch_uses_every_sample_once_within_the_budget(packed: bool) -> None:
    lengths = ragged(500)
    plan = plan_of(lengths, packed=packed)
    start = 0
    orders = []
    for epoch in range(3):
        packs = packs_of(plan, start, plan.epoch_packs(epoch))
        start += len(packs)
        assert sorted(chain(*packs)) == list(range(500))
        assert all(sum(lengths[index] for index in pack) <= 100 for pack in packs)
        assert packed or all(len(pack) == 1 for pack in packs)
        orders.append(packs)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize(
    ("name", "most"), [("lognormal", 0.02), ("uniform", 0.02), ("chat-like", 0.02), ("bimodal", 0.01)]
)
def test_packs_are_well_filled(name: str, most: float) -> None:
    """Padding, or for bimodal lengths the packs above the least number there can be."""
    lengths = lengths_of(name, 20_000, 4096)
    plan = plan_of(lengths.tolist(), token_budget=4096)
    bound = max(-(-int(lengths.sum()) // 4096), int((lengths > 2048).sum()))  # two long ones never share a pack
    if name != "bimodal":
        assert 1 - plan.fill < most
    assert plan.epoch_packs() <= (1 + most) * bound


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    samples=st.lists(st.tuples(st.integers(0, 110), st.integers(0, 60)), min_size=1, max_size=120),
    patch_budget=st.sampled_from([None, 40]),
    seed=st.integers(0, 5),
)
def test_any_sizes_are_planned_once_each_within_their_budgets(
    samples: list[tuple[int, int]], patch_budget: int | None, seed: int
) -> None:
    tokens, patches = (np.array(column, np.int32) for column in zip(*samples, strict=True))
    kept = (tokens > 0) & (tokens <= 100) & (patches <= (patch_budget or 60))
    sizes = Sizes(tokens, patches, tokens, {}, {})
    if not kept.any():
        with pytest.raises(ValueError, match="no sample is left"):
            PackPlan(sizes, seed=seed, token_budget=100, patch_budget=patch_budget, packed=True)
        return
    plan = PackPlan(sizes, seed=seed, token_budget=100, patch_budget=patch_budget, packed=True)
    start = 0
    for epoch in range(2):
        packs = packs_of(plan, start, plan.epoch_packs(epoch))
        start += len(packs)
        assert sorted(chain(*packs)) == np.flatnonzero(kept).tolist()
        for pack in packs:
            assert 0 < tokens[pack].sum() <= 100 and (patch_budget is None or patches[pack].sum() <= patch_budget)


def test_a_large_plan_is_kept_for_the_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.plan, "KEPT_FROM", 100)
    sizes = measure(ToyDataset(ragged(300)))
    expected = packs_of(PackPlan(sizes, seed=7, token_budget=100, packed=True), 0, 400)

    def kept(seed: int) -> list[list[int]]:
        return packs_of(PackPlan(sizes, seed=seed, token_budget=100, packed=True, cache=tmp_path), 0, 400)

    assert kept(7) == expected
    monkeypatch.setattr(data.plan, "first_fit", lambda *args: pytest.fail("planned again"))
    assert kept(7) == expected
    with pytest.raises(pytest.fail.Exception):
        kept(8)


def test_a_million_chats_are_planned_in_two_seconds() -> None:
    """Of this process: other work on the machine doesn't count."""
    tokens = lengths_of("chat-like", 1_000_000, 4096).astype(np.int32)
    patches = np.where(np.arange(len(tokens)) % 2, np.minimum(tokens * 4, 16_000), 0).astype(np.int32)
    sizes = Sizes(tokens, patches, tokens, {}, {})
    start = time.process_time()
    plan = PackPlan(sizes, seed=0, token_budget=4096, patch_budget=16_384, packed=True)
    assert plan.epoch_packs() and time.process_time() - start < 2.0


def test_a_pack_is_the_same_however_it_is_reached() -> None:
    straight = packs_of(plan_of(ragged(300)), 0, 700)
    backwards = plan_of(ragged(300))
    assert [backwards[index].tolist() for index in reversed(range(700))] == straight[::-1]
    assert packs_of(plan_of(ragged(300)), 612, 3) == straight[612:615]
    assert packs_of(plan_of(ragged(300), seed=8), 0, 700) != straight


GOLDEN = [[0, 2], [6], [4, 1, 3], [7, 5], [7, 5], [6], [0, 2], [3, 1, 4], [7, 5]]


def test_the_order_does_not_change_unnoticed() -> None:
    """A checkpoint's position means these packs: a change of the algorithm would move every resumed run."""
    assert packs_of(plan_of([60, 50, 40, 30, 20, 10, 100, 90]), 0, 9) == GOLDEN


def test_patch_budget_limits_packs_and_drops_what_exceeds_it_alone() -> None:
    plan = plan_of([10] * 6, patches=[4, 4, 4, 4, 9, 0], patch_budget=8)
    packs = packs_of(plan, 0, plan.epoch_packs())
    assert sorted(chain(*packs)) == [0, 1, 2, 3, 5]
    assert all(sum([4, 4, 4, 4, 9, 0][index] for index in pack) <= 8 for pack in packs)
    assert plan.dropped == {"dropped: more patches than --max-patches-per-pack": 1}


def test_a_sample_that_fills_the_budget_exactly_is_kept() -> None:
    plan = plan_of([100, 101, 1])
    assert sorted(chain(*packs_of(plan, 0, plan.epoch_packs()))) == [0, 2]
    assert plan.dropped == {"dropped: longer than --seq-length": 1}


class Remarking(ToyDataset):
    def size(self, index: int) -> SampleSize:
        if index == 3:
            return SampleSize(0, 0, 0, "dropped: no answer")
        return SampleSize(self.lengths[index], 0, 0, "turns cut" if index in (1, 2) else "")


def test_dropped_and_changed_samples_are_counted_by_reason() -> None:
    plan = PackPlan(measure(Remarking([10, 20, 30, 40, 200])), seed=0, token_budget=100, packed=True)
    assert plan.dropped == {"dropped: no answer": 1, "dropped: longer than --seq-length": 1}
    assert plan.samples == 3
    summary = plan.summary()
    assert "3 samples in 1 packs an epoch, 60.0% full" in summary
    assert "1 dropped: no answer" in summary
    assert "2 turns cut" in summary


def test_nothing_left_is_an_error_with_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"no sample is left.*longer than --seq-length': 2"):
        plan_of([101, 102])
    with pytest.raises(ValueError, match="the dataset is empty"):
        plan_of([])


def test_sizes_are_measured_once_and_cached(tmp_path: Path) -> None:
    dataset = Remarking([10, 20, 30, 40], cache_dir=tmp_path)
    sizes = measure(dataset)
    again = ToyDataset([10, 20, 30, 40], cache_dir=tmp_path)  # the same fingerprint
    cached = measure(again)
    assert again.measured == 0
    assert np.array_equal(cached.tokens, sizes.tokens) and cached.tokens.tolist() == [10, 20, 30, 0]
    assert (
        (cached.dropped, cached.changed)
        == (sizes.dropped, sizes.changed)
        == ({"dropped: no answer": 1}, {"turns cut": 2})
    )
    other = ToyDataset([10, 20, 30, 41], cache_dir=tmp_path)
    measure(other)
    assert other.measured == 4


def test_workers_measure_the_same() -> None:
    lengths = ragged(200)
    assert np.array_equal(measure(ToyDataset(lengths), workers=2).tokens, np.array(lengths))


class Broken(ToyDataset):
    """One sample can't be read."""

    def __init__(self, lengths: list[int], broken: int) -> None:
        super().__init__(lengths)
        self.broken = broken

    def _read(self, index: int) -> None:
        if index == self.broken:
            raise OSError("truncated file")

    def size(self, index: int) -> SampleSize:
        self._read(index)
        return super().size(index)

    def __getitem__(self, index: int) -> Sample:
        self._read(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_measured_is_named(workers: int) -> None:
    with pytest.raises(OSError, match="truncated file") as error:
        measure(Broken([1] * 200, 17), workers=workers)
    assert error.value.__notes__ == ["while measuring sample 17 of toy/train"]


def source(lengths: list[int] | None = None, order: str = "toy") -> IndexedPacks:
    dataset = ToyDataset(lengths or ragged(50))
    return IndexedPacks(dataset, PackPlan(measure(dataset), seed=1, token_budget=100, packed=True), order=order)


def ids(pack: Pack) -> list[str]:
    return [sample.id for sample in pack]


def read(packs: IndexedPacks, count: int) -> list[list[str]]:
    """So many packs from where the source stands, which moves on."""
    found, lost = packs.read(packs.position, count)
    assert lost == []
    packs.position += count
    return [ids(pack) for pack in found]


def test_source_resumes_from_its_state() -> None:
    straight = source()
    packs = read(straight, 40)
    for position in (0, 1, 17, 39):
        state = source()
        read(state, position)
        resumed = source()
        resumed.load_state_dict(state.state_dict())
        assert resumed.position == position
        assert read(resumed, 1) == packs[position : position + 1]


def test_a_state_of_another_order_is_refused() -> None:
    with pytest.raises(ValueError, match="it was toy, and is other"):
        source(order="other").load_state_dict(source().state_dict())


def test_a_period_repeats_the_same_packs() -> None:
    periodic = source()
    periodic.period = 6
    packs = read(periodic, 18)
    assert packs[:6] == packs[6:12] == packs[12:]
    assert packs[:6] == read(source(), 6)


def test_a_sample_that_cannot_be_loaded_is_named() -> None:
    dataset = Broken([10], 0)
    plan = PackPlan(Sizes(np.array([10]), np.array([0]), np.array([0]), {}, {}), seed=0, token_budget=10, packed=True)
    with pytest.raises(OSError) as error:
        IndexedPacks(dataset, plan, order="").read(0, 1)
    assert error.value.__notes__ == ["while loading sample 0 of toy/train"]

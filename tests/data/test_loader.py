"""Loader: the global order on any number of workers and ranks, resuming, errors, and the broadcast over two ranks."""

from __future__ import annotations

import os
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from toy_data import PAD, ToyDataset, ToyInputs

from data import DATASET_PROVIDERS, DatasetProvider, shared_memory
from data.bad_log import BadSampleLog, BadSamplePolicy
from data.bad_sample import BadSample, Reason
from data.batch import Batch, collate
from data.loader import dataset_provider
from data.pack import IndexedPacks
from data.plan import PackPlan
from data.reader import BatchReader, Ranks, SharedReader
from data.sample import Sample
from data.sizes import measure

CPU = torch.device("cpu")
LENGTHS = [7, 3, 12, 1, 5, 9, 2, 11, 4, 8, 6, 10, 12, 3, 5, 1, 2, 9]


class Alone:
    """A process group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def reader(
    data_rank: int = 0,
    data_size: int = 1,
    *,
    micro_batch_size: int = 1,
    global_batch_size: int = 4,
    workers: int = 0,
    position: int = 0,
    dataset: ToyDataset | None = None,
    with_vision: bool = True,
    group: object | None = None,
    timeout: float = 60,
    stages: object | None = None,
    policy: BadSamplePolicy = BadSamplePolicy(),  # noqa: B008  frozen
    packed: bool = True,
    sample_timeout: float | None = None,
) -> BatchReader:
    dataset = dataset or ToyDataset(LENGTHS)
    plan = PackPlan(measure(dataset), seed=3, token_budget=12, packed=packed)
    source = IndexedPacks(dataset, plan, order="toy", timeout=sample_timeout)
    source.position = position
    group = group or Alone()
    collate_packs = partial(
        collate,
        model_inputs=ToyInputs(),
        alignment=1,
        packed=packed,
        seq_len=12,
        dtype=torch.float32,
        pad_token_id=PAD,
        with_vision=with_vision,
    )
    ranks = Ranks(data_rank, data_size, group, group, stages)
    return BatchReader(
        source,
        collate_packs,
        ranks,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        workers=workers,
        device=CPU,
        timeout=timeout,
        log=BadSampleLog("toy/train", policy, None),
    )


def rows(batches: BatchReader | list[Batch], count: int | None = None) -> list[list[int]]:
    return [batch.input_ids.flatten().tolist() for batch in islice(batches, count)]


def test_workers_do_not_change_the_order() -> None:
    expected = rows(reader(), 20)
    assert rows(reader(workers=1), 20) == expected
    assert rows(reader(workers=3), 20) == expected


@pytest.mark.parametrize(("data_size", "micro_batch_size"), [(1, 4), (2, 1), (2, 2), (4, 1), (3, 2)])
def test_the_global_order_does_not_depend_on_the_ranks(data_size: int, micro_batch_size: int) -> None:
    packs = data_size * micro_batch_size
    expected = rows(reader(), 6 * packs)
    ranks = [rows(reader(rank, data_size, micro_batch_size=micro_batch_size), 6) for rank in range(data_size)]
    for step in range(6):
        together = [token for rank in ranks for token in rank[step]]
        assert together == [token for row in expected[step * packs : (step + 1) * packs] for token in row]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("position", [0, 4, 36])
def test_resuming_continues_the_order(workers: int, position: int) -> None:
    """Over the end of an epoch too, and with other ranks than before."""
    expected = rows(reader(), position + 8)[position:]
    assert rows(reader(position=position, workers=workers), 8) == expected
    halves = [rows(reader(rank, 2, position=position, workers=workers), 4) for rank in range(2)]
    assert [row for step in zip(*halves, strict=True) for row in step] == expected


def test_the_state_is_what_was_delivered_not_what_was_prefetched() -> None:
    loaded = reader(1, 2, micro_batch_size=2, workers=2, position=8)
    for _ in range(3):
        next(loaded)
    assert loaded.save_state() == {"position": 8 + 3 * 4, "order": "toy", "overdue": []}


def test_loading_leaves_the_default_generator_alone() -> None:
    """Its state belongs to the training and is in checkpoints: a resumed run must not differ by a new loader."""
    state = torch.get_rng_state()
    rows(reader(workers=1), 2)
    rows(reader(), 2)
    assert torch.equal(torch.get_rng_state(), state)


class Threads(ToyDataset):
    def __getitem__(self, index: int) -> Sample:
        assert torch.get_num_threads() == 1, f"{torch.get_num_threads()} threads"
        return super().__getitem__(index)


def test_workers_have_one_thread() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert rows(reader(workers=1, dataset=Threads(LENGTHS)), 3)
    finally:
        torch.set_num_threads(threads)


class Broken(ToyDataset):
    def __getitem__(self, index: int) -> Sample:
        if index == 5:
            raise OSError("truncated file")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_names_the_sample(workers: int) -> None:
    with pytest.raises(OSError, match="truncated file") as error:
        rows(reader(workers=workers, dataset=Broken(LENGTHS)), 20)
    text = "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])
    assert "while loading sample 5 of toy/train" in text


class Stuck(ToyDataset):
    def __getitem__(self, index: int) -> Sample:
        time.sleep(600)
        raise AssertionError


def test_a_loader_that_gives_nothing_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match=r"timed out after 1\.5 seconds") as error:
        next(reader(workers=1, dataset=Stuck(LENGTHS), timeout=1.5))
    (note,) = error.value.__notes__
    assert "No batch of toy/train in 0.025 minutes (--loader-timeout-minutes)" in note and "--shm-size" in note


class Where(ToyDataset):
    """Samples that know who made them: their process is the number of their first token."""

    def __getitem__(self, index: int) -> Sample:
        made = super().__getitem__(index)
        made.input_ids[0] = os.getpid()
        return made


def test_workers_outlive_a_signal_to_the_job() -> None:
    loaded = reader(workers=2, dataset=Where(LENGTHS))
    before = [row[0] for row in rows(loaded, 4)]
    assert len(set(before)) == 2
    for worker in set(before):
        subprocess.run(["kill", "-TERM", str(worker)], check=True)  # not from their parent
    assert [row[0] for row in rows(loaded, 20)] == (before * 5)[:20]


def test_shared_memory_is_checked(provide: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda folder: Namespace(free=5_000))
    provide()
    with pytest.raises(shared_memory.SharedMemoryTooSmall, match=r"0 MB free.*--shm-size.*--num-workers"):
        provide(num_workers=1)


def test_stages_without_the_encoder_load_no_pixels() -> None:
    dataset = ToyDataset([8, 8], [16, 8])
    assert next(reader(dataset=dataset)).vision[0]["pixel_values"].size(0) in (16, 8)
    assert next(reader(dataset=dataset.without_pixels(), with_vision=False)).vision is None


def test_model_chunks_see_the_same_batches_in_any_order() -> None:
    expected = rows(reader(), 6)
    chunks = SharedReader.split(reader(), 3)
    seen: list[list[Batch]] = [[], [], []]
    for chunk in (0, 0, 1, 1, 2, 2, 0, 1, 0, 1, 2, 0, 0, 1, 1, 2, 2, 2):  # virtual pipelining's turns, ragged
        seen[chunk].append(next(chunks[chunk]))
    assert [rows(batches) for batches in seen] == [expected] * 3
    assert seen[0][0] is seen[1][0] is seen[2][0]  # read once


# Samples that turn out broken


class CutInHalf(ToyDataset):
    """Some samples are broken, which only their pixels show."""

    broken: frozenset[int] = frozenset({0, 3, 5, 9, 14})

    def __getitem__(self, index: int) -> Sample:
        if self.pixels and index in self.broken:
            raise BadSample(Reason.IMAGE, f"toy/{index}: cut in half")
        return super().__getitem__(index)


BEARS_ALL = BadSamplePolicy(max_fraction=1.0)


def samples_of(batches: list[Batch]) -> list[list[int]]:
    """The toy's samples in each micro-batch: 100 + their index are their ids."""
    return [
        sorted({token - 100 for row in batch.input_ids.tolist() for token in row if token > PAD}) for batch in batches
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packed", [True, False])
def test_a_broken_sample_leaves_its_pack_short(workers: int, packed: bool) -> None:
    whole = samples_of(list(islice(reader(packed=packed), 12)))
    found = list(islice(reader(packed=packed, dataset=CutInHalf(LENGTHS), workers=workers, policy=BEARS_ALL), 12))
    assert samples_of(found) == [[index for index in batch if index not in CutInHalf.broken] for batch in whole]
    emptied = [batch for batch in found if batch.input_ids.unique().tolist() == [PAD]]
    assert emptied  # becomes a document of padding
    for batch in emptied:
        assert not batch.loss_mask.any() and batch.stats.documents == 1
        assert batch.input_ids.shape == ((1, 8) if packed else (1, 12))


def test_the_plan_counts_lost_samples_for_the_routers() -> None:
    planned = [batch.stats.mean_trained_tokens for batch in islice(reader(), 12)]
    batches = list(islice(reader(dataset=CutInHalf(LENGTHS), policy=BEARS_ALL), 12))
    assert [batch.stats.mean_trained_tokens for batch in batches] == planned


def test_a_sample_of_another_size_than_measured_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    dataset = ToyDataset(LENGTHS)
    loaded = reader(dataset=dataset, policy=BEARS_ALL)
    dataset.lengths = [*LENGTHS[:4], 7, *LENGTHS[5:]]
    assert 4 not in {index for batch in samples_of(list(islice(loaded, 10))) for index in batch}
    assert "toy/train/4: 7 tokens and 0 patches, and 5 and 0 when it was measured" in capsys.readouterr().out


class Hanging(ToyDataset):
    def __getitem__(self, index: int) -> Sample:
        if index == 5:
            with suppress(Exception):  # as libraries do
                time.sleep(60)
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_hangs_is_lost_for_good(workers: int) -> None:
    loaded = reader(dataset=Hanging(LENGTHS), policy=BEARS_ALL, workers=workers, sample_timeout=0.2)
    start = time.monotonic()
    first = samples_of(list(islice(loaded, 10)))
    assert time.monotonic() - start < 30 and 5 not in {index for batch in first for index in batch}
    state = loaded.save_state()
    assert state["overdue"] == [5]
    resumed = reader(policy=BEARS_ALL)  # where it would load at once
    resumed.source.load_state_dict(state)
    resumed.source.position = 0
    assert samples_of(list(islice(resumed, 10))) == first


def stage(rank: int, folder: str, workers: int) -> None:
    """Two pipeline stages: the first reads pixels, the second is told what is lost, later and at its own pace."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    dataset = CutInHalf(LENGTHS, [4 * (index % 2) for index in range(len(LENGTHS))])
    loaded = reader(
        dataset=dataset if rank == 0 else dataset.without_pixels(),
        stages=dist.group.WORLD,
        with_vision=rank == 0,
        micro_batch_size=2,
        workers=workers,
        policy=BEARS_ALL,
    )
    if rank == 1:
        time.sleep(0.5)
    batches = list(islice(loaded, 8))
    tensors = [[tensor.clone() for tensor in (b.input_ids, b.labels, b.vision_index)] for b in batches]
    torch.save([(*of_batch, b.stats) for of_batch, b in zip(tensors, batches, strict=True)], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("workers", [0, 2])
def test_stages_lose_the_same_samples(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    torch.multiprocessing.spawn(stage, args=(str(tmp_path), workers), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    whole = list(islice(reader(micro_batch_size=2), 8))
    assert any(batch.stats.documents > stats.documents for batch, (*_, stats) in zip(whole, first, strict=True))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True)) and one[3] == other[3]


# The provider that Megatron calls, on one rank


TOY = DatasetProvider("toy", False, lambda args, split, processor, model_inputs: ToyDataset(args.lengths))


@pytest.fixture(autouse=True)
def toy_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASET_PROVIDERS, "toy", TOY)


def arguments(**changes: object) -> Namespace:
    return Namespace(
        **{
            "dataset_provider": "toy",
            "lengths": LENGTHS,
            "seq_length": 12,
            "max_patches_per_pack": None,
            "use_packed_sequence": True,
            "seed": 5,
            "params_dtype": torch.float32,
            "num_workers": 0,
            "micro_batch_size": 2,
            "eval_micro_batch_size": 1,
            "global_batch_size": 2,
            "eval_global_batch_size": 3,
            "eval_iters": 2,
            "full_validation": False,
            "skip_train": False,
            "consumed_train_samples": 0,
            "consumed_valid_samples": 0,
            "iteration": 0,
            "load": None,
            "save": None,
            "virtual_pipeline_model_parallel_size": None,
            "context_parallel_size": 1,
            "redundant_vision": False,
            "language_model_only": False,
            "tensor_model_parallel_size": 1,
            "sequence_parallel": False,
            "loader_timeout_minutes": 10.0,
            "cuda_graphs": False,
            "on_bad_sample": "skip",
            "max_bad_fraction": 0.05,
            "sample_timeout": 0.0,
        }
        | changes
    )


@pytest.fixture
def provide(single_rank: None) -> Callable[..., tuple]:
    def make(vp_stage: int | None = None, **changes: object) -> tuple:
        return dataset_provider(arguments(**changes), ToyInputs(), None)([1, 1, 1], vp_stage=vp_stage)

    return make


def test_provider_resumes_from_the_counters(provide: Callable[..., tuple]) -> None:
    train, valid, _ = provide()
    straight, evaluations = rows(train, 10), rows(valid, 18)
    train, valid, _ = provide(consumed_train_samples=8, consumed_valid_samples=3)
    assert rows(train, 6) == straight[4:]
    assert rows(valid, 12) == evaluations[3:15]


def test_every_evaluation_reads_the_same_packs(provide: Callable[..., tuple]) -> None:
    """2 iterations of 3 packs, in micro-batches of 1."""
    _, valid, test = provide()
    evaluations = rows(valid, 18)
    assert evaluations[:6] == evaluations[6:12] == evaluations[12:]
    assert rows(test, 12) == evaluations[:12]  # the toy's splits are the same
    assert len({str(row) for row in evaluations}) == 6


def test_full_validation_reads_one_epoch(provide: Callable[..., tuple]) -> None:
    _, valid, _ = provide(full_validation=True, lengths=[12] * 10)
    assert len(valid) == 3  # 10 packs fill 3 iterations of 3
    evaluations = rows(valid, 18)
    assert evaluations[:9] == evaluations[9:]
    assert len({str(row) for row in evaluations}) == 9


def test_megatron_is_told_a_full_validation_s_iterations(single_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> ToyDataset:
        return ToyDataset([12] * 10)

    monkeypatch.setitem(DATASET_PROVIDERS, "toy", DatasetProvider("toy", False, build))
    args = arguments(full_validation=True)
    dataset_provider(args, ToyInputs(), None)([1, 1, 1])
    assert (args.eval_iters, args.full_validation) == (3, False)


def test_splits_that_no_flag_asks_for_are_not_built(provide: Callable[..., tuple]) -> None:
    assert provide(eval_iters=0)[1:] == (None, None)
    assert provide(skip_train=True)[0] is None


def test_without_validation_data_evaluation_is_off(
    single_rank: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(args: Namespace, split: str, processor: None, model_inputs: ToyInputs) -> ToyDataset:
        return ToyDataset(LENGTHS if split == "train" else [])

    monkeypatch.setitem(DATASET_PROVIDERS, "toy", DatasetProvider("toy", False, build))
    args = arguments()
    train, valid, test = dataset_provider(args, ToyInputs(), None)([1, 1, 1])
    assert train is not None and valid is None and test is None
    assert (args.eval_iters, args.full_validation) == (0, False)
    assert "has no validation data, so evaluation is off" in capsys.readouterr().out


def test_provider_gives_model_chunks_one_reader(single_rank: None) -> None:
    provide = dataset_provider(arguments(virtual_pipeline_model_parallel_size=2, eval_iters=0), ToyInputs(), None)
    first, second = (provide([1, 1, 1], vp_stage=stage)[0] for stage in (0, 1))
    assert next(first) is next(second)
    assert provide.is_distributed


def test_a_checkpoint_with_another_order_is_warned_about(
    provide: Callable[..., tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, _, _ = provide(save=str(tmp_path))
    next(train)
    state = tmp_path / "data" / "iter_0000001" / "mp_rank_00" / "train_dataloader_dprank000.pt"
    state.parent.mkdir(parents=True)
    torch.save({"dataloader_state_dict": train.save_state()}, state)
    resumed = {"load": str(tmp_path), "iteration": 1, "consumed_train_samples": 2}

    expected = rows(train, 3)
    capsys.readouterr()
    assert rows(provide(**resumed)[0], 3) == expected
    assert "WARNING" not in capsys.readouterr().out
    changed = provide(**resumed, seq_length=13)[0]
    assert changed.source.position == 2
    assert "WARNING: the data's order has changed since the checkpoint: it was toy/train" in capsys.readouterr().out


@pytest.mark.parametrize("first_stage", [True, False])
def test_only_the_stage_with_the_encoder_asks_for_pixels(
    first_stage: bool, provide: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import mpu

    monkeypatch.setattr(mpu, "is_pipeline_first_stage", lambda ignore_virtual: first_stage)
    asked: list[str] = []
    monkeypatch.setattr(ToyDataset, "without_pixels", lambda self: asked.append(self.name) or self)
    train, *_ = provide(eval_iters=0)
    assert (next(train).vision is not None) == first_stage
    assert asked == ([] if first_stage else ["toy/train"])


def test_the_log_says_what_was_dropped(provide: Callable[..., tuple], capsys: pytest.CaptureFixture[str]) -> None:
    provide(lengths=[3, 4, 13], eval_iters=0)
    line = "> toy/train: 2 samples in 1 packs an epoch, 58.3% full, 1 dropped: longer than --seq-length\n"
    assert line in capsys.readouterr().out


# Two ranks


def receive(rank: int, folder: str) -> None:
    """Both ranks read three micro-batches; the second has no data at all."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    calls: list[str] = []
    for name in ("broadcast", "all_reduce", "all_gather", "broadcast_object_list", "barrier", "send", "recv"):
        for module in (dist, dist.distributed_c10d):
            original = getattr(module, name)
            setattr(module, name, partial(lambda f, n, *a, **k: (calls.append(n), f(*a, **k))[1], original, name))
    dataset = ToyDataset(LENGTHS, [4 * (index % 2) for index in range(len(LENGTHS))])
    if rank == 1:
        dataset.__class__ = Unreadable
    loaded = reader(dataset=dataset, group=dist.group.WORLD, micro_batch_size=2, workers=1 - rank)
    batches = list(islice(loaded, 3))
    assert calls == ["broadcast"] * 6
    assert loaded.source.position == 6
    assert (loaded.save_state() is None) == (rank == 1)
    torch.save(batches, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


class Unreadable(ToyDataset):
    def __getitem__(self, index: int) -> Sample:
        raise AssertionError("only the first rank of a group loads")


@pytest.mark.heavy
def test_two_ranks_get_the_same_batches_in_two_collectives_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False
    )  # set by runtime/patches.py; this file is our own
    torch.multiprocessing.spawn(receive, args=(str(tmp_path),), nprocs=2)
    sent, received = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    alone = reader(dataset=ToyDataset(LENGTHS, [4 * (index % 2) for index in range(len(LENGTHS))]), micro_batch_size=2)
    for one, other, expected in zip(sent, received, islice(alone, 3), strict=True):
        for batch in (one, other):
            assert batch.stats == expected.stats
            assert batch.input_ids.tolist() == expected.input_ids.tolist()
            assert torch.equal(batch.position_ids, expected.position_ids)
            assert torch.equal(batch.vision[0]["pixel_values"], expected.vision[0]["pixel_values"])
            assert batch.vision[0]["max_seqlen"] == expected.vision[0]["max_seqlen"]


@pytest.mark.parametrize(("data_size", "workers"), [(1, 0), (1, 2), (2, 0), (2, 1)])
def test_every_micro_batch_knows_the_mean_trained_tokens_of_its_step(data_size: int, workers: int):
    """Four packs a step, read from the middle of an epoch: the mean is of the step's micro-batches on all ranks."""
    batches = [
        [next(loaded).stats for _ in range(8 // data_size)]
        for loaded in (reader(rank, data_size, position=3, workers=workers) for rank in range(data_size))
    ]
    per_step = 4 // data_size
    for step in range(2):
        stats = [s for of_rank in batches for s in of_rank[step * per_step : (step + 1) * per_step]]
        assert len({s.trained_tokens for s in stats}) > 1
        assert {s.mean_trained_tokens for s in stats} == {sum(s.trained_tokens for s in stats) / 4}

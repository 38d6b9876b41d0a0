"""Readers of micro-batches: workers make them, one rank of each TP x CP group of a stage has them, and broadcasts.

Ranks of a data-parallel step read neighbouring blocks of packs, so the global order doesn't depend on how many there
are: this is `megatron.training.datasets.data_samplers.MegatronPretrainingSampler`'s order, without its end.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data import shared_memory
from data.bad_log import BadSampleLog
from data.bad_sample import Reason
from data.batch import Batch, CollatePacks, FlatBatch, flatten, unflatten
from data.pack import IndexedPacks
from data.verdicts import Verdicts
from runtime import lifetime

# A batch's header is at most this long, so that its broadcast needs no length first.
HEADER_BYTES = 1 << 16


@dataclass(frozen=True)
class Ranks:
    """Who reads what.

    data_rank, data_size: this rank's place among the data-parallel replicas.
    group: ranks that work on the same micro-batch of one pipeline stage (TP x CP); its first rank loads.
    header_group: the same ranks on gloo, so that receivers know a batch's shapes without waiting for their device.
    stages: the loading ranks of all stages on gloo, the first stage's first; None without a pipeline.
    """

    data_rank: int
    data_size: int
    group: dist.ProcessGroup
    header_group: dist.ProcessGroup
    stages: dist.ProcessGroup | None = None

    @property
    def loads(self) -> bool:
        return self.group.rank() == 0


class MicroBatches(IterableDataset[FlatBatch]):
    """This data-parallel rank's micro-batches, without end; iterated in the loader's workers.

    Worker w of W makes the micro-batches w, w + W, ...: torch's DataLoader takes from its workers in turn, so the
    order is the same with any number of workers.
    """

    def __init__(
        self,
        source: IndexedPacks,
        collate_packs: CollatePacks,
        ranks: Ranks,
        *,
        micro_batch_size: int,
        global_batch_size: int,
    ) -> None:
        self._source = source
        self._first = source.position
        self._collate = collate_packs
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._data_rank = ranks.data_rank
        self._data_size = ranks.data_size

    def __iter__(self) -> Iterator[FlatBatch]:
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        step = self._data_size * self._micro_batch_size
        for position in itertools.count(self._first + worker_id * step, workers * step):
            yield self.make(position)

    def make(self, position: int, verdict: Collection[int] | None = None) -> FlatBatch:
        """This rank's micro-batch of the data-parallel ranks' packs from `position` on.

        Args:
            verdict: places of its samples that are lost, as the first stage found; None to find out.
        """
        mine = position + self._data_rank * self._micro_batch_size
        packs, lost = self._source.read(mine, self._micro_batch_size, verdict)
        batch = self._collate(packs)
        stats = replace(batch.stats, mean_trained_tokens=self._mean_trained_tokens(position))
        return replace(flatten(replace(batch, stats=stats)), lost=tuple(lost))

    def _mean_trained_tokens(self, position: int) -> float:
        """Of a micro-batch in the step that pack `position` belongs to, as planned: known before anything is loaded.

        Reading began at a step's first pack.
        """
        into_step = (position - self._first) % self._global_batch_size
        trained = self._source.trained_tokens(position - into_step, self._global_batch_size)
        return trained * self._micro_batch_size / self._global_batch_size


class BatchReader(Iterator[Batch]):
    """Yields this rank's micro-batches, on its device; every rank of `ranks.group` calls next() as often.

    Args:
        source: at the position to start from; only its position is used on ranks that don't load.
        micro_batch_size: packs of a micro-batch.
        global_batch_size: packs of a step, over all ranks.
        workers: processes that load; 0 loads in this one.
        timeout: seconds that the workers may take for a batch.
        log: of samples that turn out broken.
        tag: tells this reader's messages between stages from other readers'.

    Attributes:
        source: where the next micro-batch of the whole data-parallel step starts.
        micro_batch_size: as given.
    """

    def __init__(
        self,
        source: IndexedPacks,
        collate_packs: CollatePacks,
        ranks: Ranks,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        workers: int,
        device: torch.device,
        log: BadSampleLog,
        timeout: float = 600,
        tag: int = 0,
    ) -> None:
        self.source = source
        self._log = log
        self._verdicts = Verdicts(ranks.stages, tag) if ranks.stages is not None and ranks.loads else None
        self._collate = collate_packs
        self._ranks = ranks
        self.micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._workers = workers
        self._device = device
        self._timeout = timeout
        self._evaluation_iterations: int | None = None
        self._loader: Iterator[FlatBatch] | None = None
        self._maker: MicroBatches | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __len__(self) -> int:
        """Iterations of one evaluation."""
        if self._evaluation_iterations is None:
            raise TypeError(f"{self.source.name} has no end")
        return self._evaluation_iterations

    def repeat_evaluation(self, *, iterations: int | None, batch_size: int) -> None:
        """Make every evaluation read the same packs.

        Args:
            iterations: of an evaluation; None for as many as one epoch fills.
            batch_size: packs of an iteration, over all ranks.
        """
        self._evaluation_iterations = iterations or max(1, self.source.epoch_packs // batch_size)
        self.source.period = self._evaluation_iterations * batch_size

    def __next__(self) -> Batch:
        own = None
        if self._ranks.loads:
            if self._loader is None:
                self._loader = self._start()
            with self._silence_explained():
                made = next(self._loader)
            own = self._agreed(made)
        flat = broadcast(own, self._ranks, self._device)
        self.source.position += self.micro_batch_size * self._ranks.data_size
        return unflatten(flat)

    def _agreed(self, flat: FlatBatch) -> FlatBatch:
        """The micro-batch with the samples that the first stage's has.

        Raises:
            ValueError: too many samples are broken, or one that mustn't be.
            BadSample: one that only this stage can't read.
        """
        if self._verdicts is None or self._verdicts.decides:
            mine = self.source.position + self._ranks.data_rank * self.micro_batch_size
            if self._verdicts is not None:
                self._verdicts.send([lost.place for lost in flat.lost])
            self.source.overdue |= {lost.sample for lost in flat.lost if lost.reason is Reason.TIMEOUT}
            self._log.count(self.source.planned_samples(mine, self.micro_batch_size), flat.lost)
            return flat
        assert self._maker is not None  # made when the first batch was asked for
        verdict = self._verdicts.receive()
        if set(verdict) == {lost.place for lost in flat.lost}:
            return flat
        # Seldom: tokens alone, so it is quickly made again.
        return self._maker.make(self.source.position, verdict)

    def save_state(self) -> dict[str, Any] | None:
        """Called by Megatron when it saves a checkpoint, once per data-parallel rank of each CP rank."""
        return self.source.state_dict() if self._ranks.loads else None

    def _start(self) -> Iterator[FlatBatch]:
        """Workers are forked at the first batch: they inherit the dataset, and a loader that isn't read costs nothing.

        torch gives each worker one thread. A SIGTERM to the job is the rank's alone: it needs them until it has saved.
        """
        self._maker = MicroBatches(
            self.source,
            self._collate,
            self._ranks,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self._global_batch_size,
        )
        with lifetime.shielded():
            return iter(
                DataLoader(
                    self._maker,
                    batch_size=None,
                    num_workers=self._workers,
                    prefetch_factor=shared_memory.PREFETCH if self._workers else None,
                    multiprocessing_context="fork" if self._workers else None,
                    worker_init_fn=partial(_begin_worker, os.getpid()),
                    timeout=self._timeout if self._workers else 0,
                    pin_memory=self._device.type == "cuda",
                    generator=torch.Generator(),  # the default one's state is the training's, and in its checkpoints
                )
            )

    @contextmanager
    def _silence_explained(self) -> Iterator[None]:
        """Add to torch's error of workers that give nothing what to look for."""
        try:
            yield
        except RuntimeError as error:
            if "timed out" in str(error):
                error.add_note(
                    f"No batch of {self.source.name} in {self._timeout / 60:g} minutes (--loader-timeout-minutes). Is "
                    "there an error of a worker above, such as a full /dev/shm (docker run --shm-size)? Does the disk "
                    "of the data answer? Is a sample very slow to decode?"
                )
            raise


def _begin_worker(parent: int, _: int) -> None:
    lifetime.end_with_parent(parent)


def broadcast(flat: FlatBatch | None, ranks: Ranks, device: torch.device) -> FlatBatch:
    """Bring the first rank's batch to every rank of the group, on its device: two collectives, none for one rank.

    Raises:
        ValueError: the header is longer than HEADER_BYTES: more vision inputs than anybody has.
    """
    if ranks.group.size() == 1:
        assert flat is not None  # the only rank loads
        return FlatBatch(flat.header, flat.buffer.to(device, non_blocking=True))
    header = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
    if flat is not None:
        if len(flat.header) > HEADER_BYTES:
            raise ValueError(f"a batch's header takes {len(flat.header)} bytes of {HEADER_BYTES}; raise HEADER_BYTES")
        header[: len(flat.header)] = torch.frombuffer(bytearray(flat.header), dtype=torch.uint8)
    dist.broadcast(header, group_src=0, group=ranks.header_group)
    text = header.numpy().tobytes().rstrip(b"\0")
    if flat is not None:
        buffer = flat.buffer.to(device, non_blocking=True)
    else:
        buffer = torch.empty(json.loads(text)["bytes"], dtype=torch.uint8, device=device)
    dist.broadcast(buffer, group_src=0, group=ranks.group)
    return FlatBatch(text, buffer)


class SharedReader(Iterator[Batch]):
    """One of the model chunks of a rank under virtual pipelining, which all see the same micro-batches.

    The chunks take turns a few micro-batches at a time; what the first of them read waits for the others.
    """

    def __init__(self, reader: BatchReader, mine: deque[Batch], waiting: list[deque[Batch]]) -> None:
        self._reader = reader
        self._mine = mine
        self._waiting = waiting

    @classmethod
    def split(cls, reader: BatchReader, count: int) -> list[Self]:
        waiting: list[deque[Batch]] = [deque() for _ in range(count)]
        return [cls(reader, mine, waiting) for mine in waiting]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __len__(self) -> int:
        return len(self._reader)

    def save_state(self) -> dict[str, Any] | None:
        """As `BatchReader.save_state`: between steps no chunk is ahead of another."""
        return self._reader.save_state()

    def __next__(self) -> Batch:
        if not self._mine:
            batch = next(self._reader)
            for queue in self._waiting:
                queue.append(batch)
        return self._mine.popleft()

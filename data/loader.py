"""From a dataset provider to the iterators that Megatron's training loop reads (`--dataloader-type external`).

One rank of each TP x CP group loads, in worker processes, and broadcasts to the others. Ranks of a data-parallel
step read neighbouring blocks of packs, so the global order doesn't depend on how many there are: this is
`megatron.training.datasets.data_samplers.MegatronPretrainingSampler`'s order, without its end.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data import DATASET_PROVIDERS, shared_memory
from data.batch import Batch, CollatePacks, FlatBatch, collate, flatten, unflatten
from data.conversation import Split
from data.pack import IndexedPacks, Pack, PackPlan, SampleDataset, Sizes, measure
from data.static_shapes import StaticShapes, pad_batch
from models.context_parallel import document_alignment
from runtime import checkpoints, lifetime

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from models.spec import ModelInputs

# A batch's header is at most this long, so that its broadcast needs no length first.
HEADER_BYTES = 1 << 14
# Documents and image frames of a pack that CUDA graphs make room for.
STATIC_DOCUMENTS = 32


@dataclass(frozen=True)
class Ranks:
    """Who reads what.

    data_rank, data_size: this rank's place among the data-parallel replicas.
    group: ranks that work on the same micro-batch of one pipeline stage (TP x CP); its first rank loads.
    header_group: the same ranks on gloo, so that receivers know a batch's shapes without waiting for their device.
    """

    data_rank: int
    data_size: int
    group: dist.ProcessGroup
    header_group: dist.ProcessGroup

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
        self._collate = collate_packs
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._data_rank = ranks.data_rank
        self._data_size = ranks.data_size

    def __iter__(self) -> Iterator[FlatBatch]:
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        first = self._source.position
        reader = self._source.shard(
            worker_id * self._data_size + self._data_rank, workers * self._data_size, self._micro_batch_size
        )
        while True:
            mean = self._mean_trained_tokens(reader.position, first)
            batch = self._collate([next(reader) for _ in range(self._micro_batch_size)])
            yield flatten(replace(batch, stats=replace(batch.stats, mean_trained_tokens=mean)))

    def _mean_trained_tokens(self, position: int, first: int) -> float:
        """Of a micro-batch in the step that pack `position` belongs to: the plan knows it before anything is loaded.

        Args:
            first: position of the first step.
        """
        into_step = (position - first) % self._global_batch_size
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
        timeout: float = 600,
    ) -> None:
        self.source = source
        self._collate = collate_packs
        self._ranks = ranks
        self.micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._workers = workers
        self._device = device
        self._timeout = timeout
        self._evaluation_iterations: int | None = None
        self._loader: Iterator[FlatBatch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __len__(self) -> int:
        """Iterations of one evaluation, which Megatron asks for with `--full-validation`."""
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
                own = next(self._loader)
        flat = broadcast(own, self._ranks, self._device)
        self.source.position += self.micro_batch_size * self._ranks.data_size
        return unflatten(flat)

    def save_state(self) -> dict[str, Any] | None:
        """Called by Megatron when it saves a checkpoint, once per data-parallel rank of each CP rank."""
        return self.source.state_dict() if self._ranks.loads else None

    def _start(self) -> Iterator[FlatBatch]:
        """Workers are forked at the first batch: they inherit the dataset, and a loader that isn't read costs nothing.

        torch gives each worker one thread. A SIGTERM to the job is the rank's alone: it needs them until it has saved.
        """
        with lifetime.shielded():
            return iter(
                DataLoader(
                    MicroBatches(
                        self.source,
                        self._collate,
                        self._ranks,
                        micro_batch_size=self.micro_batch_size,
                        global_batch_size=self._global_batch_size,
                    ),
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


type Readers = tuple[Iterator[Batch] | None, Iterator[Batch] | None, Iterator[Batch] | None]


def dataset_provider(
    args: Namespace, model_inputs: ModelInputs, processor: ProcessorMixin | None
) -> Callable[..., Readers]:
    """What `megatron.training.pretrain` calls on every rank for its training, validation and test iterators.

    Every evaluation reads the same packs, the first `--eval-iters` global batches of its split.

    Args:
        args: resolved; read when the iterators are made, so that a loaded checkpoint's counters count.
        model_inputs: what `ModelSpec.model_inputs` gave.
        processor: what the dataset provider's `processor` gave.
    """
    chunks: list[Readers] = []

    def provide(target_samples: list[int | None], vp_stage: int | None = None) -> Readers:
        """Megatron calls this once, or with virtual pipelining once per model chunk; data has no target size."""
        if vp_stage is None:
            return _build_readers(args, model_inputs, processor)
        if not chunks:
            readers = _build_readers(args, model_inputs, processor)
            chunks.extend(_share(readers, args.virtual_pipeline_model_parallel_size))
        return chunks[vp_stage]

    vars(provide)["is_distributed"] = True  # Megatron then calls it on every rank
    return provide


def _share(readers: Iterable[BatchReader | None], count: int) -> list[Readers]:
    """The readers for each of a rank's model chunks."""
    train, valid, test = ([None] * count if reader is None else SharedReader.split(reader, count) for reader in readers)
    return list(zip(train, valid, test, strict=True))


def _build_readers(
    args: Namespace, model_inputs: ModelInputs, processor: ProcessorMixin | None
) -> tuple[BatchReader | None, BatchReader | None, BatchReader | None]:
    from megatron.core import mpu

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    ranks = _ranks(device)
    with_vision = mpu.is_pipeline_first_stage(ignore_virtual=True)
    pad_token_id = processor.tokenizer.pad_token_id if processor else 0
    collate_packs = partial(
        collate,
        model_inputs=model_inputs,
        alignment=document_alignment(
            cp_size=args.context_parallel_size,
            tp_size=args.tensor_model_parallel_size,
            sequence_parallel=args.sequence_parallel,
        ),
        packed=args.use_packed_sequence,
        seq_len=args.seq_length,
        dtype=args.params_dtype,
        pad_token_id=pad_token_id,
        context_ranks=args.context_parallel_size,
        vision_ranks=1 if args.redundant_vision else args.context_parallel_size,
        with_vision=with_vision,
    )

    if args.cuda_graphs:
        # Rows hold at most this many documents and frames in practice; a batch with more runs without a graph.
        most = STATIC_DOCUMENTS * args.micro_batch_size
        shapes = StaticShapes(
            tokens=args.seq_length * args.micro_batch_size,
            documents=most,
            patches=args.max_patches_per_pack * args.micro_batch_size,
            frames=most,
        )
        collate_packs = partial(_static, collate_packs, shapes, model_inputs, pad_token_id)

    def split(name: Split, micro_batch_size: int, global_batch_size: int) -> BatchReader:
        build = partial(DATASET_PROVIDERS[args.dataset_provider].build, args, name, processor, model_inputs)
        dataset, sizes = _build_dataset(build, args.num_workers)
        source = _pack_source(dataset if with_vision else dataset.without_pixels(), sizes, args)
        return BatchReader(
            source,
            collate_packs,
            ranks,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            workers=args.num_workers,
            device=device,
            timeout=60 * args.loader_timeout_minutes,
        )

    train = valid = test = None
    if not args.skip_train:
        train = split("train", args.micro_batch_size, args.global_batch_size)
        _resume(train.source, args)
        # Not in the checkpoint's own folder: an mp_rank_* there makes Megatron take an fsdp_dtensor checkpoint for
        # another kind.
        args.dataloader_save = str(Path(args.save) / checkpoints.DATA) if args.save else None
    if args.full_validation or args.eval_iters:
        valid = split("validation", args.eval_micro_batch_size, args.eval_global_batch_size)
        test = split("test", args.eval_micro_batch_size, args.eval_global_batch_size)
        for reader in (valid, test):
            reader.repeat_evaluation(
                iterations=None if args.full_validation else args.eval_iters, batch_size=args.eval_global_batch_size
            )
        valid.source.position = args.consumed_valid_samples
    if ranks.loads:
        readers = {"train": train, "validation": valid, "test": test}
        _check_shared_memory({name: r for name, r in readers.items() if r is not None}, args, model_inputs, with_vision)
    return train, valid, test


def _static(
    collate_packs: CollatePacks,
    shapes: StaticShapes,
    model_inputs: ModelInputs,
    pad_token_id: int,
    packs: Sequence[Pack],
) -> Batch:
    return pad_batch(collate_packs(packs), shapes, model_inputs, pad_token_id)


def _check_shared_memory(
    readers: dict[str, BatchReader], args: Namespace, model_inputs: ModelInputs, with_vision: bool
) -> None:
    """Refuse a run whose loaders would fill /dev/shm and hang."""
    needs = {
        name: shared_memory.loader_bytes(
            reader.source.patches_of_packs(),
            micro_batch_size=reader.micro_batch_size,
            tokens=args.seq_length,
            bytes_of_patch=model_inputs.patch_dim * args.params_dtype.itemsize if with_vision else 0,
            workers=args.num_workers,
        )
        for name, reader in readers.items()
    }
    ranks_per_batch = args.tensor_model_parallel_size * args.context_parallel_size
    shared_memory.check(needs, shared_memory.loaders_here(ranks_per_batch))


def _ranks(device: torch.device) -> Ranks:
    from megatron.core import mpu

    group = mpu.get_tensor_and_context_parallel_group()
    header_group = group
    if device.type == "cuda" and group.size() > 1:
        header_group = dist.new_group(
            dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True
        )
    return Ranks(
        data_rank=mpu.get_data_parallel_rank(),
        data_size=mpu.get_data_parallel_world_size(),
        group=group,
        header_group=header_group,
    )


def _build_dataset(build: Callable[[], SampleDataset], workers: int) -> tuple[SampleDataset, Sizes]:
    """Build and measure on the first rank, which may write files, then on the others."""
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        dataset = build()
        result = [measure(dataset, workers=workers)]
    dist.broadcast_object_list(result, src=0)
    if dist.get_rank() != 0:
        dataset = build()
    return dataset, result[0]


def _pack_source(dataset: SampleDataset, sizes: Sizes, args: Namespace) -> IndexedPacks:
    plan = PackPlan(
        sizes,
        seed=args.seed,
        token_budget=args.seq_length,
        patch_budget=args.max_patches_per_pack,
        packed=args.use_packed_sequence,
    )
    if dist.get_rank() == 0:
        print(f"> {dataset.name}: {plan.summary()}", flush=True)
    budgets = f"--seq-length {args.seq_length}, --max-patches-per-pack {args.max_patches_per_pack}"
    packing = "packed" if args.use_packed_sequence else "one sample a row"
    return IndexedPacks(
        dataset, plan, order=f"{dataset.name} ({dataset.fingerprint}), {packing}, {budgets}, --seed {args.seed}"
    )


def _resume(source: IndexedPacks, args: Namespace) -> None:
    """Continue where the checkpoint stopped. Its counter is enough; its data state tells whether it means the same."""
    source.position = args.consumed_train_samples
    if not args.load or args.iteration == 0:
        return
    folder = Path(args.load) / checkpoints.DATA / checkpoints.folder_name(args.iteration)
    states = sorted(folder.glob("*/train_dataloader_dprank000.pt"))
    try:
        if not states:
            raise ValueError(f"{folder} doesn't say how the data was ordered")
        source.load_state_dict(_read_state(states[0]))
    except ValueError as error:
        if dist.get_rank() == 0:
            print(f"> WARNING: {error}; some samples may come again sooner, others later", flush=True)


def _read_state(path: Path) -> dict[str, Any]:
    """What `BatchReader.save_state` gave.

    Raises:
        RuntimeError: the file is damaged.
    """
    try:
        return torch.load(path, weights_only=True)["dataloader_state_dict"]
    except Exception as error:  # torch names no file, and raises anything at all
        raise RuntimeError(
            f"{path}: the data's state can't be read ({error}); without the file, the checkpoint's counter of samples "
            "is used"
        ) from error

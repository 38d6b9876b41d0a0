"""From a dataset provider to the iterators that Megatron's training loop reads (`--dataloader-type external`)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from data import find_provider, shared_memory
from data.bad_log import BadSampleLog, BadSamplePolicy
from data.batch import Batch, CollatePacks, collate
from data.conversation import Split
from data.pack import IndexedPacks, Pack
from data.plan import PackPlan
from data.reader import BatchReader, Ranks, SharedReader
from data.sizes import SampleDataset, Sizes, measure
from data.static_shapes import StaticShapes, pad_batch
from models.context_parallel import document_alignment
from runtime import checkpoints

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from models.spec import ModelInputs

# Documents and image frames of a pack that CUDA graphs make room for.
STATIC_DOCUMENTS = 32

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
    with_vision = mpu.is_pipeline_first_stage(ignore_virtual=True) and not args.language_model_only
    collate_packs = _collator(args, model_inputs, processor, with_vision=with_vision)
    build = partial(find_provider(args.dataset_provider).open, args)

    def split(name: Split, micro_batch_size: int, global_batch_size: int, tag: int) -> BatchReader | None:
        dataset = build(name, processor, model_inputs)
        if len(dataset) == 0:
            if name != "train":
                return None
            where = f" of --dataset-path {' '.join(args.dataset_path)}" if args.dataset_path else ""
            raise ValueError(
                f"{dataset.name}: no row{where} is for training: files are empty, or named after other splits"
            )
        sizes = measure(dataset, workers=args.num_workers)
        policy = BadSamplePolicy.of(args)
        policy.check_measured(dataset.name, sizes)
        return BatchReader(
            _pack_source(dataset if with_vision else dataset.without_pixels(), sizes, args),
            collate_packs,
            ranks,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            workers=args.num_workers,
            device=device,
            timeout=60 * args.loader_timeout_minutes,
            log=BadSampleLog(dataset.name, policy, _bad_file(args, name, ranks.data_rank)),
            tag=tag,
        )

    train = valid = test = None
    if not args.skip_train:
        train = split("train", args.micro_batch_size, args.global_batch_size, 0)
        assert train is not None  # only evaluation may have no data
        _resume(train.source, args)
        # Not in the checkpoint's own folder: an mp_rank_* there makes Megatron take an fsdp_dtensor checkpoint for
        # another kind.
        args.dataloader_save = str(Path(args.save) / checkpoints.DATA) if args.save else None
    if args.full_validation or args.eval_iters:
        valid = split("validation", args.eval_micro_batch_size, args.eval_global_batch_size, 1)
        test = split("test", args.eval_micro_batch_size, args.eval_global_batch_size, 2)
        for reader in (valid, test):
            if reader is not None:
                reader.repeat_evaluation(
                    iterations=None if args.full_validation else args.eval_iters, batch_size=args.eval_global_batch_size
                )
        if valid is None:
            _switch_off_evaluation(args)
            test = None
        else:
            valid.source.position = args.consumed_valid_samples
            if args.full_validation:
                # megatron-core 0.19.2 takes its number for a list of them (training/training.py:4384).
                args.eval_iters, args.full_validation = len(valid), False
    if ranks.loads:
        readers = {"train": train, "validation": valid, "test": test}
        _check_shared_memory({name: r for name, r in readers.items() if r is not None}, args, model_inputs, with_vision)
    return train, valid, test


def _collator(
    args: Namespace, model_inputs: ModelInputs, processor: ProcessorMixin | None, *, with_vision: bool
) -> CollatePacks:
    """How the loader's workers make a micro-batch of its packs."""
    pad_token_id = processor.tokenizer.pad_token_id if processor else 0
    collate_packs: CollatePacks = partial(
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
        vision_ranks=1 if args.redundant_vision or args.language_model_only else args.context_parallel_size,
        with_vision=with_vision,
    )
    if not args.cuda_graphs:
        return collate_packs
    # Rows hold at most this many documents and frames in practice; a batch with more runs without a graph.
    most = STATIC_DOCUMENTS * args.micro_batch_size
    shapes = StaticShapes(
        tokens=args.seq_length * args.micro_batch_size,
        documents=most,
        patches=(args.max_patches_per_pack or 0) * args.micro_batch_size,
        frames=most,
    )
    return partial(_static, collate_packs, shapes, model_inputs, pad_token_id)


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
    stages = None
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        # Made by all ranks in one order: torch names a group that is made by its members alone after the number of
        # groups that they have, and pipeline stages have different ones.
        own = dist.get_process_group_ranks(mpu.get_pipeline_model_parallel_group())
        pipelines: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(pipelines, tuple(own) if group.rank() == 0 else None)
        for ranks in sorted(set(pipelines) - {None}):
            made = dist.new_group(list(ranks), backend="gloo")
            stages = made if dist.get_rank() in ranks else stages
    return Ranks(
        data_rank=mpu.get_data_parallel_rank(),
        data_size=mpu.get_data_parallel_world_size(),
        group=group,
        header_group=header_group,
        stages=stages,
    )


def _switch_off_evaluation(args: Namespace) -> None:
    """Megatron evaluates whenever there are iterations for it, with or without data."""
    args.eval_iters, args.full_validation = 0, False
    if dist.get_rank() == 0:
        print(
            f"notice: --dataset-provider {args.dataset_provider} has no validation data, so evaluation is off; name a "
            "file or a split validation, or cut the rows with --split 98,1,1",
            flush=True,
        )


def _bad_file(args: Namespace, split: Split, data_rank: int) -> Path | None:
    return Path(args.save) / "bad_samples" / f"{split}-{data_rank}.jsonl" if args.save else None


def _pack_source(dataset: SampleDataset, sizes: Sizes, args: Namespace) -> IndexedPacks:
    plan = PackPlan(
        sizes,
        seed=args.seed,
        token_budget=args.seq_length,
        patch_budget=args.max_patches_per_pack,
        packed=args.use_packed_sequence,
        cache=dataset.cache_dir,
    )
    if dist.get_rank() == 0:
        print(f"> {dataset.name}: {plan.summary()}", flush=True)
    budgets = f"--seq-length {args.seq_length}, --max-patches-per-pack {args.max_patches_per_pack}"
    packing = "packed" if args.use_packed_sequence else "one sample a row"
    order = f"{dataset.name} ({dataset.fingerprint}), {packing}, {budgets}, --seed {args.seed}"
    return IndexedPacks(dataset, plan, order=order, timeout=args.sample_timeout or None)


def _resume(source: IndexedPacks, args: Namespace) -> None:
    """Continue where the checkpoint stopped. Its counter is enough; its data state tells whether it means the same, and
    which samples took too long."""
    source.position = args.consumed_train_samples
    if not args.load or args.iteration == 0:
        return
    folder = Path(args.load) / checkpoints.DATA / checkpoints.folder_name(args.iteration)
    states = sorted(folder.glob("*/train_dataloader_dprank*.pt"))
    try:
        if not states:
            raise ValueError(f"{folder} doesn't say how the data was ordered")
        for state in states:  # each rank's own: samples that took too long for it
            source.load_state_dict(_read_state(state))
        source.position = args.consumed_train_samples
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

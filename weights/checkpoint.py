"""HuggingFace folder <-> Megatron checkpoint, on one process without torchrun, a tensor at a time.

A checkpoint names its tensors as the whole model's, whatever layout wrote it, so neither direction builds a model.
Where each parameter lies is `ModelSpec.hf_weights.checkpoint_slices` for `torch_dist`, whose names are the same from
either backend, and `.fsdp_checkpoint_slices` for `fsdp_dtensor`, whose names are the modules'.
torch.distributed.checkpoint reads and writes the files: of each tensor only the part that is asked for is in memory.
Knows no architecture.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial, reduce
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as save_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from models.spec import HfWeights, ModelConfig
from models.weight_map import CheckpointSlice, Source, TensorSlice, WeightMap, WeightMismatch, tensor_slices
from runtime.checkpoints import RELEASE, TRACKER, damage, elsewhere, folder_name, other_steps, read_index, read_tracker
from runtime.loading import CheckedReader
from weights.check import check_folder, ignored_tensors, mapping_of, model_of, tensor_infos
from weights.folder import (
    FolderError,
    FolderTensors,
    HfFolder,
    new_folder,
    open_tensors,
    read_config,
    torch_dtype,
    write_tensors,
)
from weights.origin import HfOrigin, write_hf_folder
from weights.schema import description_problems

# What load_checkpoint() reads of a release besides tensors.
COMMON_STATE = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {"singleton_local_shards": False}}
_NOT_THE_MODEL = ("optimizer.", "rng_state")
_WRITTEN_AT_ONCE = 100 * 2**20  # bytes; torch keeps what goes into one file in memory


class CheckpointError(ValueError):
    """A checkpoint that can't be read; the message names the file or the key."""


# Export


def export_checkpoint(
    checkpoint: Path | str,
    output: Path | str,
    *,
    iteration: int | None = None,
    max_shard_size: int = 5 * 10**9,
    quiet: bool = False,
) -> Path:
    """Write a checkpoint's weights as a HuggingFace folder.

    Args:
        checkpoint: what `--save` named, or one of its iter_ folders.
        output: must not be there yet.
        iteration: which; the latest by default.
        max_shard_size: bytes of a safetensors file at most.
        quiet: no progress on stderr.

    Returns:
        `output`.

    Raises:
        CheckpointError, FolderError: what can't be read or written.
        WeightMismatch: the checkpoint's tensors aren't those of its `hf/config.json`.
    """
    folder, hf = find_checkpoint(Path(checkpoint), iteration)
    config_json = read_config(hf)
    _, weights, config = model_of(config_json, hf)
    origin = HfOrigin.of_checkpoint(hf)
    mapping = mapping_of(weights, config, origin.record, hf)
    if problems := description_problems(hf, config.vocab_size):
        raise FolderError(hf, problems)
    infos = tensor_infos(weights, mapping, origin.record)
    tensors = CheckpointTensors(folder)
    slices, synonyms = stored_slices(weights, config, mapping, tensors)
    _check_keys(tensors, mapping, slices, synonyms)
    wanted: dict[str, list[tuple[str, TensorSlice]]] = {}
    for name, source in mapping.sources.items():
        for tensor_slice in tensor_slices(source, 0, 1):
            wanted.setdefault(tensor_slice.name, []).append((name, tensor_slice))
    wanted |= {copy: wanted[name] for name, copy in mapping.copies.items() if copy in infos}
    with new_folder(Path(output)) as new:
        for name, tensor in write_tensors(new, infos, max_shard_size, title=f"exporting {folder}", quiet=quiet):
            for parameter, tensor_slice in wanted[name]:
                for stored in slices[parameter]:
                    _copy_slice(tensors, mapping.sources[parameter], stored, tensor_slice, tensor)
        write_hf_folder(new, config_json, None, origin, with_record=False)
    return Path(output)


def _copy_slice(
    tensors: CheckpointTensors, source: Source, stored: CheckpointSlice, tensor_slice: TensorSlice, target: Tensor
) -> None:
    """Copy what a slice of an HF tensor and a slice of the checkpoint have in common."""
    common = tensor_slice.within(source.dim, stored.start, stored.start + stored.count)
    if common is not None:
        region = target[common.foreign_index]
        region.copy_(tensors.read_slice(source, stored)[common.index].reshape(region.shape))


def stored_slices(
    weights: HfWeights[Any], config: ModelConfig, mapping: WeightMap, tensors: CheckpointTensors
) -> tuple[Mapping[str, tuple[CheckpointSlice, ...]], set[str]]:
    """Where this checkpoint has each parameter, and what other keys the same may have (imported checkpoints do)."""
    if not tensors.is_fsdp:
        return weights.checkpoint_slices(config, mapping), set()
    slices = {}
    ranks = 1
    synonyms: set[str] = set()
    for name, alternatives in weights.fsdp_checkpoint_slices(config, mapping).items():
        synonyms |= {stored.key for option in alternatives for stored in option}
        there = (option for option in alternatives if all(stored.key in tensors.metadata for stored in option))
        slices[name] = next(there, alternatives[0])
        source, entry = mapping.sources[name], tensors.metadata.get(slices[name][0].key)
        if source.dim == 1 and source.sharded and not source.is_expert and entry is not None:
            ranks = max(ranks, len({chunk.offsets[1] for chunk in entry.chunks}))  # a rank's columns are a chunk
    return {name: _rank_by_rank(mapping.sources[name], option, ranks) for name, option in slices.items()}, synonyms


def _rank_by_rank(source: Source, slices: tuple[CheckpointSlice, ...], ranks: int) -> tuple[CheckpointSlice, ...]:
    """`fsdp_dtensor` puts tensor-parallel ranks' shares one after the other, each with its share of every part."""
    if len(slices) > 1 or not source.sharded or source.is_expert or ranks == 1:
        return slices  # nothing cut, or a part by itself, or of experts, whose one part is in order whatever cuts it
    found, offset = [], 0
    for rank in range(ranks):
        start = 0
        for part in source.parts:
            whole = sum(run.count for run in part)
            count = whole // ranks
            found.append(CheckpointSlice(slices[0].key, start + rank * count, count, offset=offset))
            start, offset = start + whole, offset + count
    return tuple(found)


def find_checkpoint(path: Path, iteration: int | None = None) -> tuple[Path, Path]:
    """(folder of one iteration, `hf/` folder) of what `--save` or `--load` names.

    Raises:
        CheckpointError: nothing there, an unknown format, or files that are missing, damaged or elsewhere.
    """
    path = path.expanduser()
    if (path / ".metadata").is_file():
        folder, root = path, path.parent
    else:
        root = path
        latest = read_tracker(root) if iteration is None else iteration
        if latest is None:
            what = "is empty or corrupt" if (root / TRACKER).exists() else "is missing"
            raise CheckpointError(f"{root}: no checkpoint ({TRACKER} {what}){elsewhere(root)}")
        folder = root / (RELEASE if latest == RELEASE else folder_name(latest))
    if not (folder / ".metadata").exists():
        raise CheckpointError(f"{folder}: no complete checkpoint, since it has no .metadata")
    ckpt_format = "torch_dist" if (folder / "metadata.json").exists() else "fsdp_dtensor"
    if fault := damage(folder, ckpt_format):
        raise CheckpointError(f"{fault}: the checkpoint is damaged; {other_steps(folder, ckpt_format, '--iteration')}")
    if not (root / "hf").is_dir():
        raise CheckpointError(f"{root}: has no hf/ folder, in which this harness keeps config.json and the processor")
    return folder, root / "hf"


class CheckpointTensors:
    """Regions of a checkpoint's tensors. Nothing in it is run: tensors are read with `weights_only`, the index too.

    Raises:
        CheckpointError: a file that can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = CheckedReader(folder)
        try:
            with (folder / ".metadata").open("rb") as file:
                metadata = read_index(file)
        except Exception as error:  # whatever unpickling a damaged file raises
            raise CheckpointError(f"{folder / '.metadata'}: {error}") from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.metadata: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._last: tuple[CheckpointSlice, Tensor] | None = None

    @property
    def is_fsdp(self) -> bool:
        """Whether it is `fsdp_dtensor`."""
        return any(key.startswith("model.") for key in self.metadata)

    def read_slice(self, source: Source, stored: CheckpointSlice) -> Tensor:
        """The rows of a parameter in one slice of the checkpoint.

        Kept until the next slice is asked for, since HF tensors that share a parameter follow one another.
        """
        if self._last is None or self._last[0] != stored:
            self._last = None  # freed first
            shape = slice_shape(source, stored)
            offsets = [0] * len(shape)
            offsets[source.dim] = stored.offset
            if stored.layer is None:
                values = self.read(stored.key, tuple(offsets), shape)
            else:
                values = self.read(stored.key, (stored.layer, *offsets), (1, *shape))[0]
            self._last = (stored, values)
        return self._last[1]

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """One region, put together from the chunks that the ranks wrote."""
        entry = self.metadata[key]
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        found = sum(prod(item.lengths) for item in items)
        if found != target.numel():
            raise CheckpointError(f"{self.folder}: {key}: {found} of {target.numel()} elements of a region are there")
        try:
            self._reader.read_data(LoadPlan(items), _RegionPlanner(target)).wait()
        except Exception as error:  # a short file shows as one of many errors of torch.load
            files = {self._reader.storage_data[item.storage_index].relative_path for item in items}
            raise CheckpointError(f"{self.folder}: {key}, in {', '.join(sorted(files))}: {error}") from error
        return target


class _RegionPlanner(LoadPlanner):
    """Lets a storage reader fill one tensor."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        region = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            region = region.narrow(dim, start, length)
        return region

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: it was filled in place."""

    def _unplanned(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("reads are planned by CheckpointTensors.read")

    set_up_planner = create_local_plan = create_global_plan = finish_plan = load_bytes = _unplanned


def slice_shape(source: Source, stored: CheckpointSlice) -> tuple[int, ...]:
    """Shape of the rows in one slice of the checkpoint."""
    return (*source.shape[: source.dim], stored.count, *source.shape[source.dim + 1 :])


def key_shape(source: Source, stored: CheckpointSlice) -> tuple[int, ...]:
    """Shape of the checkpoint's tensor that a slice is the end of."""
    shape = list(slice_shape(source, stored))
    shape[source.dim] += stored.offset
    return tuple(shape) if stored.layer is None else (stored.layers, *shape)


def _check_keys(
    tensors: CheckpointTensors,
    mapping: WeightMap,
    slices: Mapping[str, tuple[CheckpointSlice, ...]],
    synonyms: set[str],
) -> None:
    """Every parameter is there in its shape, and every tensor of the model is known.

    Raises:
        WeightMismatch: listing what isn't so.
    """
    known: dict[str, tuple[int, ...]] = {}
    for name, of_parameter in slices.items():
        known |= {stored.key: key_shape(mapping.sources[name], stored) for stored in of_parameter}
    problems = [f"{key}: not in the checkpoint" for key in known if key not in tensors.metadata]
    for key, entry in tensors.metadata.items():
        if key not in known:
            if key not in synonyms and not key.startswith(_NOT_THE_MODEL):
                problems.append(f"{key}: in the checkpoint, and maps to no tensor")
        elif tuple(entry.size) != known[key]:
            problems.append(f"{key}: has shape {tuple(entry.size)} in the checkpoint, expected {known[key]}")
    if problems:
        raise WeightMismatch(problems)


# Import


def import_folder(
    hf: Path | str,
    output: Path | str,
    *,
    ckpt_format: Literal["torch_dist", "fsdp_dtensor"] = "torch_dist",
    language_model_only: bool = False,
    allow_nonfinite: bool = False,
    quiet: bool = False,
) -> Path:
    """Write a HuggingFace folder as a checkpoint, which every layout of its format and either backend load.

    Args:
        hf: a folder with config.json and safetensors.
        output: must not be there yet.
        ckpt_format: fsdp_dtensor for Megatron-FSDP, which loads it with `--finetune`.
        language_model_only: leave out the vision encoder.
        allow_nonfinite: accept NaN and infinity.
        quiet: no progress on stderr.

    Returns:
        `output`.

    Raises:
        FolderError, WeightMismatch: nothing is left behind.
    """
    hf = Path(hf).expanduser()
    _, weights, described = model_of(read_config(hf), hf)
    folder = HfFolder.open(hf)
    config, notices = weights.as_stored(described, folder.shapes)
    if language_model_only:
        config = weights.language_model(config)
    source = check_folder(weights, config, folder)
    mapping = source.mapping
    if not quiet:
        for notice in (*notices, *ignored_tensors(mapping, folder)):
            print(f"notice: {folder.path}: {notice}", file=sys.stderr)
    planner = ImportPlanner(weights, config, folder, mapping, ckpt_format)
    with (
        new_folder(Path(output)) as new,
        open_tensors(folder, mapping.copies, title=f"importing {folder.path}", quiet=quiet) as tensors,
    ):
        planner.tensors = tensors
        writer = _PiecewiseWriter(new / RELEASE, planner.aliases)
        try:
            save_checkpoint({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:  # torch's wrapping, which is no Exception, around what reading raised
            for cause, _ in error.failures.values():
                if isinstance(cause, FolderError | OSError):
                    raise FolderError(folder.path, [str(cause).removeprefix(f"{folder.path}: ")]) from error
            raise
        problems = [f"{name}: has NaN or infinity" for name in sorted(tensors.not_finite) if not allow_nonfinite]
        problems += [f"{copy}: differs from {name}, to which config.json ties it" for name, copy in tensors.unequal]
        if problems:
            raise WeightMismatch(problems)
        if ckpt_format == "torch_dist":
            (new / RELEASE / "metadata.json").write_text(
                '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
            )
        write_hf_folder(new / "hf", config.to_hf(), None, HfOrigin(folder.path, dict(source.record)), with_record=True)
        (new / TRACKER).write_text(RELEASE)
    return Path(output)


class ImportPlanner(SavePlanner):
    """Plans a checkpoint's tensors; each is read from the HuggingFace folder when it is about to be written.

    tensors: where from; set before anything is written.
    aliases: key -> further names of the same bytes, for readers with another backend.
    """

    tensors: FolderTensors

    def __init__(
        self, weights: HfWeights[Any], config: ModelConfig, folder: HfFolder, mapping: WeightMap, ckpt_format: str
    ) -> None:
        self._items: list[WriteItem] = []
        self._values: dict[tuple[str, torch.Size | None], Callable[[], Tensor | io.BytesIO]] = {}
        self.aliases: dict[str, list[str]] = {}
        if ckpt_format == "torch_dist":
            slices = weights.checkpoint_slices(config, mapping)
        else:
            alternatives = weights.fsdp_checkpoint_slices(config, mapping)
            slices = {name: first for name, (first, *_) in alternatives.items()}
            for first, *others in alternatives.values():
                for i, stored in enumerate(first):
                    self.aliases[stored.key] = [other[i].key for other in others]
        dtypes: dict[str, torch.dtype] = {}  # of a key; the widest, where a folder mixes some in one parameter
        modules: dict[str, int] = {}
        for name, of_parameter in slices.items():
            found = [torch_dtype(folder.dtypes[run.name]) for run in mapping.sources[name].row_ranges]
            for stored in of_parameter:
                dtypes[stored.key] = reduce(torch.promote_types, found, dtypes.get(stored.key, found[0]))
                modules[module_of(stored.key)] = stored.layers
        for name, of_parameter in slices.items():
            for stored in of_parameter:
                self._add_tensor(mapping.sources[name], stored, dtypes[stored.key])
        if ckpt_format == "fsdp_dtensor":
            for key, value in {**COMMON_STATE, "args": None}.items():
                self._add_object(key, value)
            return
        for module, layers in modules.items():
            # What Transformer Engine keeps of a module besides its parameters: nothing yet. Loading asks for it.
            for i in range(max(layers, 1)):
                # In a list, as megatron-core has it.
                self._add_object(f"{module}._extra_state/shard_{i}_{max(layers, 1)}", [None])
        self._add_object("common_state/shard_0_1", [COMMON_STATE])

    def _add_tensor(self, source: Source, stored: CheckpointSlice, dtype: torch.dtype) -> None:
        shape = slice_shape(source, stored)
        offsets = torch.Size((0,) * len(shape) if stored.layer is None else (stored.layer, *(0 for _ in shape)))
        sizes = torch.Size(shape if stored.layer is None else (1, *shape))
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, sizes),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(key_shape(source, stored)),
        )
        self._items.append(WriteItem(MetadataIndex(stored.key, offsets), WriteItemType.SHARD, tensor_data=data))
        self._values[stored.key, offsets] = partial(self._read, source, stored, sizes, dtype)

    def _add_object(self, key: str, value: Any) -> None:
        encoded = io.BytesIO()
        torch.save(value, encoded)
        self._items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
        self._values[key, None] = lambda: encoded

    def _read(self, source: Source, stored: CheckpointSlice, sizes: torch.Size, dtype: torch.dtype) -> Tensor:
        values = torch.empty(slice_shape(source, stored), dtype=dtype)
        for tensor_slice in tensor_slices(source, 0, 1):
            part = tensor_slice.within(source.dim, stored.start, stored.start + stored.count)
            if part is not None:
                target = values[part.index]
                target.copy_(self.tensors[part.name][part.foreign_index].reshape(target.shape))
        return values.view(sizes)

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Everything is planned already."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for key, others in self.aliases.items():
            metadata.state_dict_metadata |= dict.fromkeys(others, metadata.state_dict_metadata[key])
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._values[write_item.index.fqn, write_item.index.offset]()


def module_of(key: str) -> str:
    """The module that a checkpoint's tensor belongs to: `...linear_qkv` of `...linear_qkv.layer_norm_weight`."""
    return re.sub(r"\.(weight(\.\w+)?|bias|layer_norm_(weight|bias)|gate_weight|A_log|dt_bias)$", "", key)


class _PiecewiseWriter(FileSystemWriter):
    """Writes a plan in several files: torch keeps all of a file's tensors in memory until it is complete.

    aliases: see `ImportPlanner`.
    """

    def __init__(self, path: Path, aliases: Mapping[str, list[str]]) -> None:
        super().__init__(path)
        self._aliases = aliases

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_batches(plan.items)):
            # As if each came from a rank of its own.
            part = replace(plan, items=items, storage_data=_StoragePrefix(f"__{number}_"))
            for result in super().write_data(part, planner).wait():
                names = [result.index.fqn, *self._aliases.get(result.index.fqn, ())]
                results += [replace(result, index=replace(result.index, fqn=name)) for name in names]
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written


def _batches(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    batch: list[WriteItem] = []
    filled = 0
    for item in items:
        data = item.tensor_data
        size = 0 if data is None else prod(data.chunk.sizes) * data.properties.dtype.itemsize
        if batch and filled + size > _WRITTEN_AT_ONCE:
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += size
    yield batch

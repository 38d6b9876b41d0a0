"""Adapters of checkpoints and folders on one process: peft's format, or merged into their base, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.adapters import A, AdapterMap, B, LoraOptions, recorded_map
from models.spec import HfWeights, ModelConfig
from models.weight_map import CheckpointSlice, TensorSlice, assemble, tensor_slices
from weights.adapter import AdapterFolder, write_adapter
from weights.base import BaseRecord, header_hash
from weights.check import mapping_of, model_of
from weights.checkpoint import CheckpointError, CheckpointTensors, export_checkpoint, find_checkpoint, stored_slices
from weights.folder import FolderError, HfFolder, TensorInfo, new_folder, open_tensors, write_tensors
from weights.origin import HfOrigin, write_hf_folder


def export(
    load: Path,
    output: Path,
    *,
    merge: bool = False,
    adapter: Path | None = None,
    iteration: int | None = None,
    max_shard_size: int = 5 * 10**9,
    quiet: bool = False,
) -> Path:
    """Write what `load` holds: a whole model or a merged one as a HuggingFace folder, or an adapter as peft's.

    Args:
        load: a checkpoint, or with `adapter` the HuggingFace folder that it belongs to.
        merge: add the adapter to its base.
        adapter: a peft folder, to be merged into `load`.

    Returns:
        `output`.

    Raises:
        ValueError: what can't be read, written or merged.
    """
    if adapter is not None:
        base = HfFolder.open(load)
        opened = AdapterFolder.open(adapter)
        _, weights, config = model_of(base.config, base.path)
        whole = mapping_of(weights, config, (), base.path)
        modules = [*opened.modules, *opened.stacked(whole.tensors)]
        mapping = recorded_map(whole, weights.linears(whole), modules, opened.options)
        state = opened.read(mapping)
        return _merge(base, state, mapping, output, max_shard_size, quiet)
    folder, hf = find_checkpoint(load, iteration)
    record = BaseRecord.read(hf.parent)
    if record is None:
        if merge:
            raise CheckpointError(f"{load}: --merge: it holds a whole model, and there is nothing to merge")
        return export_checkpoint(load, output, iteration=iteration, max_shard_size=max_shard_size, quiet=quiet)
    base = HfFolder.open(record.path)
    if header_hash(base) != record.headers:
        raise FolderError(base.path, [f"isn't the base that {hf.parent} was trained on: its tensors are others"])
    _, weights, config = model_of(base.config, base.path)
    options = LoraOptions(record.rank, record.alpha, record.dropout, record.rslora)
    whole = mapping_of(weights, config, (), base.path)
    mapping = recorded_map(whole, weights.linears(whole), record.modules, options)
    state = _read_checkpoint(CheckpointTensors(folder), weights, config, mapping)
    if merge:
        return _merge(base, state, mapping, output, max_shard_size, quiet)
    write_adapter(output, state, mapping, whole.tensors, record.path)
    return output


def _read_checkpoint(
    tensors: CheckpointTensors, weights: HfWeights[Any], config: ModelConfig, mapping: AdapterMap
) -> dict[str, Tensor]:
    """The adapter's tensors by the table's names."""
    stored = _stored(tensors, weights, config, mapping)

    def slices() -> Iterator[tuple[TensorSlice, Tensor]]:
        for name, source in mapping.weights.sources.items():
            whole = torch.empty(source.shape, dtype=tensors.metadata[stored[name][0].key].properties.dtype)
            for place in stored[name]:
                whole.narrow(source.dim, place.start, place.count).copy_(tensors.read_slice(source, place))
            for tensor_slice in tensor_slices(source, 0, 1):
                yield tensor_slice, whole[tensor_slice.index]

    try:
        return assemble(mapping.weights, slices())
    except KeyError as error:
        raise CheckpointError(f"{tensors.folder}: it lacks {error}") from error


def _stored(
    tensors: CheckpointTensors, weights: HfWeights[Any], config: ModelConfig, mapping: AdapterMap
) -> Mapping[str, tuple[CheckpointSlice, ...]]:
    """Where a checkpoint has each lora_A and lora_B.

    Raises:
        CheckpointError: Megatron-FSDP's, of which can't be told how many tensor-parallel ranks wrote it.
    """
    if tensors.is_fsdp:
        several = [adapter for adapter in mapping.adapters.values() if len(adapter.b_parts) > 1]
        if several and not any(adapter.by_columns for adapter in mapping.adapters.values()):
            raise CheckpointError(
                f"{tensors.folder}: it has {several[0].modules[0]} as its tensor-parallel ranks cut it, and no adapter "
                "by which to count them; resume it with --save-adapter"
            )
        return stored_slices(weights, config, mapping.weights, tensors)[0]
    stored = dict(weights.checkpoint_slices(config, mapping.weights))
    for adapter in mapping.adapters.values():
        (place,) = stored[f"{adapter.prefix}lora_B"]
        if len(adapter.b_parts) > 1:
            starts = accumulate((count for _, count in adapter.b_parts), initial=0)
            stored[f"{adapter.prefix}lora_B"] = tuple(
                CheckpointSlice(f"{place.key}.{part}", start, count, place.layer, place.layers)
                for (part, count), start in zip(adapter.b_parts, starts, strict=False)
            )
    return stored


def _merge(
    base: HfFolder, state: Mapping[str, Tensor], mapping: AdapterMap, output: Path, max_shard_size: int, quiet: bool
) -> Path:
    """Write the base with scale * B A added to each adapted tensor, in the base's dtypes."""
    infos = {name: TensorInfo(shape, base.dtypes[name]) for name, shape in base.shapes.items()}
    pairs = {name.removesuffix(A): (state[name], state[name.removesuffix(A) + B]) for name in state if name.endswith(A)}
    places = {module if module in infos else f"{module}.weight": pair for module, pair in pairs.items()}
    if missing := sorted(places.keys() - infos.keys()):
        raise FolderError(base.path, [f"it has no {missing[0]}, which the adapter changes"])
    with (
        new_folder(output) as new,
        open_tensors(base, title=f"merging into {base.path}", quiet=quiet) as tensors,
    ):
        for name, target in write_tensors(new, infos, max_shard_size, title=f"writing {output}", quiet=True):
            values = tensors[name][(slice(None),)]
            if name in places:
                a, b = places[name]
                dtype = torch.promote_types(torch.promote_types(values.dtype, a.dtype), torch.float32)
                values = values.to(dtype) + mapping.options.scale * (b.to(dtype) @ a.to(dtype))
            target.copy_(values)
        write_hf_folder(new, base.config, None, HfOrigin(base.path, base.dtypes), with_record=False)
    return output

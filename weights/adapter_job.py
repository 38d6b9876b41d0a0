"""LoRA adapters in a running job: fresh ones, `--load-adapter`, `--save-adapter`, and the record of their base."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from models import ModelConfig, ModelSpec
from models.adapters import AdapterMap, adapters_of_args, lora_of_args
from models.common.lora import initial_state
from models.trained import is_adapter
from models.weight_map import Rank, assemble, fill
from runtime.model_builder import unwrapped
from weights.adapter import AdapterFolder, write_adapter
from weights.base import OWN_BASE, BaseRecord
from weights.check import HfSource
from weights.folder import HfFolder, has_weights
from weights.job import HfExporter, install_shards, owned, save_hf, shard_of
from weights.origin import HfOrigin, write_hf_folder


def adapter_parameters(
    spec: ModelSpec[Any], config: ModelConfig, model: nn.Module
) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's lora_A and lora_B by canonical name."""
    return ((name, parameter) for name, parameter in spec.table.parameters(config, model) if is_adapter(name))


def load_adapter(
    args: Namespace, spec: ModelSpec[Any], config: ModelConfig, chunks: list[nn.Module]
) -> list[nn.Module]:
    """Fill the wrapped model's adapters, from `--load-adapter` or afresh; a hook after wrapping.

    Raises:
        FolderError: an adapter that doesn't fit the model.
    """
    mapping = adapters_of_args(args, spec, config)
    if mapping is None:
        return chunks
    state = initial_state(mapping, args.seed)
    if args.load_adapter is not None:
        state |= AdapterFolder.open(args.load_adapter).read(mapping)
    for chunk in chunks:
        model = unwrapped(chunk)
        parameters = adapter_parameters(spec, config, model)
        fill(mapping.weights, parameters, Rank.of(model.pg_collection), state, shard_of(chunk))
        install_shards(chunk)
    return chunks


def record_base(
    args: Namespace, spec: ModelSpec[Any], config: ModelConfig, source: HfSource | None, chunks: list[nn.Module]
) -> list[nn.Module]:
    """Write beside `--save`'s checkpoints which base they belong to; a base of random weights is saved there, once.

    A hook after wrapping, since only the wrapped model has the random weights. Collective.

    Args:
        source: `--load-hf`'s folder, if there is one.
    """
    mapping = adapters_of_args(args, spec, config)
    if mapping is None or args.save is None:
        return chunks
    if source is None:
        # In the precision of the run: resuming reads them back.
        tensors = spec.table.mapping(config, ()).tensors
        narrow = args.bf16 or args.fp16
        record = {name: "F32" if not narrow or spec.table.is_wide(name) else spec.table.dtype(name) for name in tensors}
        exporter = HfExporter(
            args,
            spec,
            config,
            record,
            lambda new: write_hf_folder(new, config.to_hf(), None, HfOrigin(), with_record=False),
        )
        exporter.chunks = chunks
        save_hf(exporter, Path(args.save) / OWN_BASE, merge=False)
    if args.rank == 0:
        folder = HfFolder.open(Path(args.save) / OWN_BASE) if source is None else source.folder
        BaseRecord.of(folder, mapping).write(Path(args.save))
    return chunks


def gather_adapter(exporter: HfExporter, mapping: AdapterMap) -> dict[str, Tensor]:
    """All adapters by the table's names, on rank 0; nothing elsewhere. Collective.

    Raises:
        WeightMismatch: tensors that the ranks don't cover.
    """
    held = []
    for chunk in exporter.chunks:
        model = unwrapped(chunk)
        parameters = adapter_parameters(exporter.spec, exporter.config, model)
        held += [(own, value().cpu()) for own, value in owned(mapping.weights, parameters, model, chunk)]
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(held, of_ranks if dist.get_rank() == 0 else None, dst=0)
    if dist.get_rank() != 0:
        return {}
    return assemble(mapping.weights, (share for shares in of_ranks for share in shares))


def save_adapter(exporter: HfExporter) -> None:
    """`--save-adapter`, after training: collective, rank 0 writes. A folder that is there stays as it is.

    Raises:
        FolderError, WeightMismatch: on rank 0.
    """
    args = exporter.args
    mapping = lora_of_args(args, exporter.spec, exporter.config)
    state = gather_adapter(exporter, mapping)
    if args.rank != 0:
        return
    target = Path(args.save_adapter)
    if has_weights(target):
        print(f"--save-adapter: {target} is there already, and stays as it is")
        return
    base = args.load_hf
    if base is None and args.save is not None:
        base = str((Path(args.save) / OWN_BASE).resolve())
    write_adapter(target, state, mapping, exporter.spec.table.mapping(exporter.config, ()).tensors, base)
    if left_out := sum(name.startswith("mtp.") for name in state):
        print(f"notice: {target}: without {left_out} tensors of MTP, which peft doesn't know; checkpoints have them")
    print(f"saved {target}", flush=True)

"""HuggingFace weights into and out of a running job: `--load-hf` and `--save-hf`.

Loading happens once the model is wrapped and before the optimizer exists, so that DDP's buffers, FSDP's shards and the
optimizer's fp32 copies all start from the loaded values, whether the model was built in memory or on the meta device.
Every rank reads its own slices. Saving sends each tensor's slices from the ranks that own them to rank 0, one tensor
after the other. Knows no architecture.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import MegatronFSDP
from megatron.training.checkpointing import checkpoint_exists
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models import ModelConfig, ModelSpec
from models.base import MultimodalModel
from models.common.lora import LoRA, adapted_weights, merged
from models.spec import HfWeights
from models.trained import is_adapter
from models.weight_map import LocalShard, Rank, TensorSlice, WeightMap, WeightMismatch, fill, plan, whole
from runtime.checkpoints import folder_name
from runtime.model_builder import unwrapped
from weights.check import HfSource, described, ignored_tensors, tensor_infos
from weights.folder import (
    ITEM_SIZES,
    HfFolder,
    has_weights,
    new_folder,
    open_tensors,
    parse_size,
    torch_dtype,
    write_order,
    write_tensors,
)

Region = tuple[slice | int, ...]


def starts_from_hf(args: Namespace) -> bool:
    """Whether `--load-hf` gives the weights: an existing checkpoint of `--load` goes on instead."""
    return args.load_hf is not None and not checkpoint_exists(args.load)


def weights_table(spec: ModelSpec[Any]) -> HfWeights[Any]:
    """An architecture's table of HuggingFace weights.

    Raises:
        ValueError: it has none; the preflight refuses the flags that need one.
    """
    if spec.hf_weights is None:
        raise ValueError("--model-arch: there is no table of its HuggingFace weights")
    return spec.hf_weights


def load_hf(
    args: Namespace, spec: ModelSpec[Any], config: ModelConfig, source: HfSource | None, chunks: list[nn.Module]
) -> list[nn.Module]:
    """Fill the wrapped model from `--load-hf`, unless a checkpoint is to be loaded; a hook after wrapping.

    Args:
        spec, config: the run's model.
        source: `--load-hf`'s folder, as the preflight opened it; None: there is none.

    Raises:
        WeightMismatch: on every rank, before anything is written; for NaN and infinity after reading.
    """
    if source is None:
        return chunks
    # An adapter's checkpoint doesn't hold its base.
    if not starts_from_hf(args) and args.lora_rank is None:
        if args.rank == 0:
            print(f"--load-hf {args.load_hf}: not read, since --load {args.load} has a checkpoint to go on from")
        return chunks
    folder, mapping, weights = source.folder, source.mapping, weights_table(spec)
    if args.rank == 0:
        _, without = weights.as_stored(described(spec, folder.config, folder.path), folder.shapes)
        for notice in (*without, *ignored_tensors(mapping, folder), *rounded_tensors(args, weights, source)):
            print(f"notice: {folder.path}: {notice}")
    own = sum(_bytes_to_read(weights, config, mapping, folder, chunk) for chunk in chunks)
    title = f"rank 0 reads its part of {folder.path}"
    with open_tensors(folder, mapping.copies, title=title, total=own, quiet=args.rank != 0) as tensors:
        for chunk in chunks:
            model = unwrapped(chunk)
            parameters = base_parameters(weights, config, model)
            fill(mapping, parameters, Rank.of(model.pg_collection), tensors, shard_of(chunk))
            install_shards(chunk)
    check_values(tensors.not_finite, tensors.unequal, args.allow_nonfinite_weights)
    return chunks


def _bytes_to_read(
    weights: HfWeights[Any], config: ModelConfig, mapping: WeightMap, folder: HfFolder, chunk: nn.Module
) -> int:
    model, local_shard, total = unwrapped(chunk), shard_of(chunk), 0
    for name, parameter in base_parameters(weights, config, model):
        if (of_parameter := mapping.sources.get(name)) is not None:
            own = Rank.of(model.pg_collection).of_source(of_parameter, local_shard(parameter))
            total += own.tensor.numel() * ITEM_SIZES[folder.dtypes[next(of_parameter.row_ranges).name]]
    return total


def base_parameters(
    weights: HfWeights[Any], config: ModelConfig, model: nn.Module
) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters without LoRA's, by canonical name."""
    return ((name, parameter) for name, parameter in weights.parameters(config, model) if not is_adapter(name))


def install_shards(chunk: nn.Module) -> None:
    """Under Megatron-FSDP, bring what was written to the optimizer's weights to those that the model computes with."""
    for fsdp in _fsdp_modules(chunk):
        fsdp.install_optimized_model_weights()


def rounded_tensors(args: Namespace, weights: HfWeights[Any], source: HfSource) -> Iterator[str]:
    """What the run's precision can't hold, by dtype."""
    narrow = "BF16" if args.bf16 else "F16" if args.fp16 else "F32"
    rounded: dict[tuple[str, str], list[str]] = {}
    for name, dtype in source.folder.dtypes.items():
        if name not in source.mapping.tensors:
            continue
        held = "F32" if weights.is_wide(name) else narrow
        if dtype != held and (held != "F32" or dtype == "F64"):
            rounded.setdefault((dtype, held), []).append(name)
    for (dtype, held), names in rounded.items():
        yield f"{len(names)} tensors, {names[0]} the first, are rounded from {dtype} to {held}"


def check_values(not_finite: set[str], unequal: set[tuple[str, str]], allow_nonfinite: bool) -> None:
    """Refuse bad values that any rank has read; collective.

    Raises:
        WeightMismatch: on all ranks, naming the tensors.
    """
    problems = []
    if not allow_nonfinite:
        problems += [f"{name}: has NaN or infinity (--allow-nonfinite-weights loads it)" for name in not_finite]
    problems += [f"{copy}: differs from {name}, to which config.json ties it" for name, copy in unequal]
    if dist.is_initialized():
        # One number first: lists of objects only where there is something to say.
        found = torch.tensor(len(problems), device=torch.cuda.current_device())
        dist.all_reduce(found)
        if not found.item():
            return
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, problems)
        problems = sorted({problem for some in of_ranks for problem in some})
    if problems:
        raise WeightMismatch(problems)


def shard_of(chunk: nn.Module) -> Callable[[Tensor], LocalShard]:
    """What this rank holds of a parameter: under Megatron-FSDP some rows, of the fp32 copy where there is one."""
    sharded = {
        id(parameter): distributed
        for fsdp in _fsdp_modules(chunk)
        for _, distributed in fsdp.param_and_grad_buffer.optimizer_named_parameters
        for parameter in (distributed, distributed.orig_param)
    }

    def local_shard(parameter: Tensor) -> LocalShard:
        distributed = sharded.get(id(parameter))
        if distributed is None or not isinstance(distributed.data, DTensor):
            return whole(parameter)
        shape = tuple(distributed.orig_param.shape)  # tensor parallelism's share
        rows = distributed.data.to_local().view(-1, *shape[1:])  # megatron-core cuts between rows
        if len(rows) == shape[0]:
            return LocalShard(shape, rows)
        # megatron-core's own attribute: elements of the flattened share.
        return LocalShard(
            shape, rows, distributed.megatron_fsdp_slice.start * shape[0] // distributed.orig_param.numel()
        )

    return local_shard


def _fsdp_modules(chunk: nn.Module) -> list[MegatronFSDP]:
    return [module for module in chunk.modules() if isinstance(module, MegatronFSDP)]


# Saving


class HfExporter:
    """`--save-hf`: DIR at the end, or DIR/iter_0000100 and so on every `--save-hf-interval` iterations and at the end.

    Megatron calls `finalize_model_grads` where all ranks are between backward and the optimizer's step: the weights
    are those of `args.curr_iteration`, and nobody waits for a pipeline neighbour.

    Args:
        spec, config: the run's model.
        record: dtype of every tensor of the folder that training came from; empty if it came from none.
        write_sidecar_files: writes config.json, tokenizer and processor into a folder.
    """

    def __init__(
        self,
        args: Namespace,
        spec: ModelSpec[Any],
        config: ModelConfig,
        record: dict[str, str],
        write_sidecar_files: Callable[[Path], None],
    ) -> None:
        self.args = args
        self.spec = spec
        self.config = config
        self.record = record
        self.write_sidecar_files = write_sidecar_files
        self.chunks: list[nn.Module] = []

    def attach(self, chunks: list[nn.Module]) -> list[nn.Module]:
        """Remember the wrapped model, and be called every step; a hook after wrapping."""
        from megatron.core.distributed import finalize_model_grads

        def finalize(*args: Any, **kwargs: Any) -> None:
            iteration = self.args.curr_iteration
            if iteration > 0 and iteration % self.args.save_hf_interval == 0:
                self.save(iteration)
            finalize_model_grads(*args, **kwargs)

        self.chunks[:] = chunks
        if self.args.save_hf is not None and self.args.save_hf_interval is not None:
            for chunk in chunks:
                unwrapped(chunk).config.finalize_model_grads_func = finalize
        return chunks

    def finish(self) -> None:
        """After training."""
        if self.args.save_hf is not None:
            self.save(self.args.iteration if self.args.skip_train else self.args.train_iters)

    def save(self, iteration: int) -> None:
        """Write this iteration's folder; collective."""
        target = Path(self.args.save_hf)
        if self.args.save_hf_interval is not None:
            target /= folder_name(iteration)
        there = torch.tensor(int(has_weights(target)), device=torch.cuda.current_device())
        dist.broadcast(there, src=0)
        if not there.item():
            save_hf(self, target)
        elif self.args.rank == 0:
            print(f"--save-hf: {target} is there already, and stays as it is")


def save_hf(exporter: HfExporter, target: Path, *, merge: bool = True) -> None:
    """Write an exporter's model as a HuggingFace folder; collective, rank 0 writes.

    Args:
        merge: add LoRA's part to the weights.

    Raises:
        FolderError: on rank 0: the target is there, the disk is full.
        WeightMismatch: parameters without source, or tensors that the ranks don't cover.
    """
    args, weights = exporter.args, weights_table(exporter.spec)
    mapping = weights.mapping(exporter.config, exporter.record)
    infos = tensor_infos(weights, mapping, exporter.record)
    own: dict[str, list[tuple[Region, Callable[[], Tensor]]]] = {}
    for chunk in exporter.chunks:
        model = unwrapped(chunk)
        adapters = {id(weight): adapter for weight, adapter in adapted_weights(model)} if merge else {}
        parameters = base_parameters(weights, exporter.config, model)
        for tensor_slice, value in owned(mapping, parameters, model, chunk, adapters):
            own.setdefault(tensor_slice.name, []).append((tensor_slice.foreign_index, value))
    own |= {copy: own[name] for name, copy in mapping.copies.items() if copy in infos and name in own}
    senders = _who_sends(own)
    size = parse_size(args.max_shard_size)
    if args.rank != 0:
        for name in write_order(infos, size):
            if name in own:
                flat = [value().reshape(-1) for _, value in own[name]]
                dist.send(torch.cat(flat).to(torch_dtype(infos[name].dtype)), dst=0)
        return
    with new_folder(target) as folder:
        for name, tensor in write_tensors(folder, infos, size, title=f"writing {target}"):
            covered = 0
            for rank, regions in senders.get(name, {}).items():
                targets = [tensor[region] for region in regions]
                if rank == 0:
                    parts = [value() for _, value in own[name]]
                else:
                    counts = [part.numel() for part in targets]
                    received = torch.empty(sum(counts), dtype=tensor.dtype, device=torch.cuda.current_device())
                    dist.recv(received, src=rank)
                    parts = received.cpu().split(counts)
                for part, values in zip(targets, parts, strict=True):
                    part.copy_(values.reshape(part.shape))
                    covered += part.numel()
            if covered != tensor.numel():
                raise WeightMismatch([f"{name}: the ranks hold {covered} of {tensor.numel()} elements"])
        exporter.write_sidecar_files(folder)
    print(f"saved {target}", flush=True)


def owned(
    mapping: WeightMap,
    parameters: Iterable[tuple[str, Tensor]],
    model: MultimodalModel,
    chunk: nn.Module,
    adapters: Mapping[int, LoRA] | None = None,
) -> Iterator[tuple[TensorSlice, Callable[[], Tensor]]]:
    """This rank's slices, without those that data-parallel and tensor-parallel replicas of it hold too.

    Args:
        adapters: of parameters by their `id`; added when a slice's value is asked for.
    """
    groups = model.pg_collection
    rank = Rank.of(groups)
    problems: list[str] = []
    planned = plan(mapping, parameters, rank, problems, shard_of(chunk))
    if problems:
        raise WeightMismatch(problems)
    sharded = bool(_fsdp_modules(chunk))
    for name, parameter, tensor, cut in planned:
        source = mapping.sources[name]
        replica = 0 if sharded else (groups.expt_dp if source.is_expert else groups.dp_cp).rank()
        if replica == 0 and (source.sharded or (rank.expert_tp if source.is_expert else rank.tp) == 0):
            adapter = (adapters or {}).get(id(parameter))
            for tensor_slice in cut:
                if adapter is None:
                    yield tensor_slice, partial(tensor.__getitem__, tensor_slice.index)
                else:
                    yield tensor_slice, partial(merged, tensor, adapter, tensor_slice.index)


def _who_sends(own: dict[str, list[tuple[Region, Callable[[], Tensor]]]]) -> dict[str, dict[int, list[Region]]]:
    """On rank 0: tensor -> rank -> regions, in the order that the rank sends them; nothing elsewhere.

    Takes regions that an earlier rank holds too out of `own`: pipeline stages share the embedding.
    """
    contents = {name: [region for region, _ in regions] for name, regions in own.items()}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(contents, of_ranks if dist.get_rank() == 0 else None, dst=0)
    senders: dict[str, dict[int, list[Region]]] = {}
    repeated: list[set[tuple[str, str]]] = [set() for _ in of_ranks]
    if dist.get_rank() == 0:
        seen: set[tuple[str, str]] = set()
        for rank, contents in enumerate(of_ranks):
            for name, regions in contents.items():
                for region in regions:
                    key = (name, str(region))
                    if key in seen:
                        repeated[rank].add(key)
                    else:
                        seen.add(key)
                        senders.setdefault(name, {}).setdefault(rank, []).append(region)
    dist.broadcast_object_list(repeated, src=0)
    mine = repeated[dist.get_rank()]
    for name in {name for name, _ in mine}:
        own[name] = [(region, values) for region, values in own[name] if (name, str(region)) not in mine]
        if not own[name]:
            del own[name]
    return senders

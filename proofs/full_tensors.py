"""Each parameter's whole value and gradient, whatever share of them data parallelism keeps on this rank.

Plain DDP holds both whole. The distributed optimizer leaves every data rank a share of each bucket of gradients, and
Megatron-FSDP a share of each parameter and gradient. Slices of tensor, pipeline and expert parallelism stay what they
are: this rank's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from megatron.core.utils import unwrap_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from runtime.model_builder import unwrapped


def full_parameters(model_chunks: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Whole values. Collective under FSDP: every rank has to take every item.

    Args:
        model_chunks: what `megatron.training.get_model` returns, before, after or between steps.

    Yields:
        The name in the unwrapped model, and a detached tensor of the shape that the parameter has without data
        parallelism. Under FSDP it is a copy in the optimizer's dtype (float32 for a 16-bit model), and `.to()` the
        model's dtype gives what the model computes with; otherwise it is the parameter's own memory.
    """
    for chunk in model_chunks:
        if isinstance(chunk, FullyShardedDataParallel):
            for name, key, original in _fsdp_parameters(chunk):
                share = chunk.param_and_grad_buffer.dist_main_weight[key]
                yield name, gather_share(share, original.shape)
        else:
            for name, parameter in unwrapped(chunk).named_parameters():
                yield name, parameter.detach()


def full_gradients(model_chunks: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Whole gradients as the optimizer is about to get them. Collective: every rank has to take every item.

    To be called between `finalize_model_grads`, which Megatron's schedules call, and `optimizer.step()`, which clips in
    place.

    Args:
        model_chunks: as above, wrapped by DDP or Megatron-FSDP.

    Yields:
        For each parameter that has one: the name in the unwrapped model, and the gradient in the shape that the
        parameter has without data parallelism and the dtype of the buffer (DDP) or of the optimizer (FSDP).

    Raises:
        TypeError: a chunk has another wrapper, or none.
    """
    for chunk in model_chunks:
        if isinstance(chunk, FullyShardedDataParallel):
            for name, key, original in _fsdp_parameters(chunk):
                if original.requires_grad:
                    yield name, gather_share(chunk.param_and_grad_buffer.dist_main_grad[key], original.shape)
        elif isinstance(chunk, DistributedDataParallel):
            yield from _ddp_gradients(chunk)
        else:
            raise TypeError(f"{type(chunk).__name__}: no wrapper of data parallelism that keeps gradients")


def _fsdp_parameters(chunk: FullyShardedDataParallel) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Name in the unwrapped model, name in FSDP's tables, and the parameter before sharding."""
    names = {parameter: name for name, parameter in unwrapped(chunk).named_parameters()}
    # The model holds the sharded parameters between steps, the original ones during a step.
    held = dict(chunk.module.module.named_parameters())
    for key, original in chunk.module.raw_param.items():
        yield names[held[key]], key, original


def gather_share(share: DTensor, shape: torch.Size) -> Tensor:
    """A parameter's shares put together, over the data ranks only.

    Not `DTensor.full_tensor`, which takes shares for even, nor megatron-core's `uneven_dtensor_to_full_tensor`, which
    puts tensor-parallel slices together too.

    Args:
        share: what FSDP keeps, a range of the flattened parameter.
        shape: the parameter's on this rank, tensor parallelism's slice.
    """
    local = share.to_local().detach().flatten()
    data_placement, *_ = share.placements
    if (share.device_mesh.mesh_dim_names or ("",))[0] != "dp_cp":
        raise NotImplementedError("--num-distributed-optimizer-instances above 1: shares of shares aren't put together")
    if isinstance(data_placement, Replicate):
        return local.view(shape)
    group = share.device_mesh.get_group(0)
    sizes = [torch.zeros(1, dtype=torch.int64, device=local.device) for _ in range(group.size())]
    torch.distributed.all_gather(sizes, torch.tensor([local.numel()], device=local.device), group=group)
    # int() lets the host wait: this is for checkpoints and checks, not for training.
    shares = [local.new_empty(int(size)) for size in sizes]
    torch.distributed.all_gather(shares, local, group=group)
    return torch.cat(shares).view(shape)


def _ddp_gradients(chunk: DistributedDataParallel) -> Iterator[tuple[str, Tensor]]:
    """Bucket by bucket, so that one bucket at a time is held whole."""
    names = {parameter: name for name, parameter in unwrap_model(chunk).named_parameters()}
    for bucket_group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
        for bucket in bucket_group.buckets:
            gradients = bucket.grad_data
            if chunk.ddp_config.use_distributed_optimizer:
                group = bucket_group.intra_distributed_optimizer_instance_group
                own = shard_buffer(gradients, group.size())[group.rank()]
                gradients = torch.empty_like(gradients)
                torch.distributed.all_gather_into_tensor(gradients, own, group=group)
            for parameter, (start, end) in bucket.param_to_index.items():
                yield names[parameter], gradients[start:end].view(parameter.shape)

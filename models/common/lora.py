"""LoRA on megatron-core's parallel linears: y += scale * B(A(x)), with one A and one B for every HuggingFace module.

S tokens, R = modules * r, in and out of this tensor-parallel rank. What is small is communicated: with sequence
parallelism a column-parallel linear gathers A(x) [S, B, R] instead of x, and a row-parallel one scatters it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.ssm.gated_delta_net.common import _split_tensor_factory
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from models.adapters import A, Adapter, AdapterMap

if TYPE_CHECKING:
    from models.base import MultimodalModel


class LoRA(nn.Module):
    """The pair beside one weight.

    slots: places of B's rows among rows x modules of the fused output; None where one module has all rows.
    lora_A: [modules * r, in], lora_B: [rows of the modules, r]; see `models.adapters.Adapter`.

    Args:
        adapter: the table's entry.
        weight: the parameter beside which it stands, for dtype, device and marks.
        beside: that parameter's name in its module.
        scale: what B(A(x)) is multiplied by.
        dropout: share of x that is dropped in training, the same for all modules of the linear.
        sequence_parallel: the linear's.
        group: ranks that share the weight.
    """

    slots: Tensor | None

    def __init__(
        self,
        adapter: Adapter,
        weight: nn.Parameter,
        *,
        beside: str,
        scale: float,
        dropout: float,
        sequence_parallel: bool,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.beside, self.scale, self.dropout, self.group = beside, scale, dropout, group
        self.sequence_parallel = sequence_parallel
        self.by_rows, self.by_columns = adapter.by_rows, adapter.by_columns
        self.is_expert = adapter.source.is_expert
        self.modules_count = len(adapter.modules)
        size = group.size()
        self.rows = adapter.source.shape[0] // (size if self.by_rows else 1)
        a, b = list(adapter.a.shape), list(adapter.b.shape)
        a[1] //= size if self.by_columns else 1
        b[0] //= size if self.by_rows else 1
        self.lora_A = nn.Parameter(torch.empty(a, dtype=weight.dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.empty(b, dtype=weight.dtype, device=weight.device))
        self._mark(weight)
        self.b_parts = [(name, rows // (size if self.by_rows else 1)) for name, rows in adapter.b_parts]
        places = adapter.places(group.rank(), size)
        slots = torch.cat([torch.arange(low, high) * self.modules_count + module for low, high, module in places])
        in_place = self.modules_count == 1 and len(slots) == self.rows
        self.register_buffer("slots", None if in_place else slots.to(torch.cuda.current_device()), persistent=False)
        self.reset_parameters()

    def _mark(self, weight: nn.Parameter) -> None:
        """Which gradients Megatron sums over which ranks, and how FSDP and the norms tell slices from copies."""
        for parameter, dim in (
            (self.lora_A, 1 if self.by_columns else None),
            (self.lora_B, 0 if self.by_rows else None),
        ):
            vars(parameter).update(allreduce=getattr(weight, "allreduce", True))
            if dim is not None:
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
            else:
                # Its gradient is then a share, of this rank's tokens.
                vars(parameter).update(sequence_parallel=self.sequence_parallel)

    def reset_parameters(self) -> None:
        """Zero both: `initial_state` has the values, which don't depend on the layout."""
        if not self.lora_A.is_meta:
            nn.init.zeros_(self.lora_A)
            nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the adapter's part.

        Args:
            x: the linear's input, [S, B, in] or [tokens, in].
            output: the linear's, without the bias that it leaves to its caller.

        Returns:
            The sum, like `output`.
        """
        low = self._communicate(F.linear(self._drop(x), self.lora_A))
        shape = output.shape
        total = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), self.placed_b().t(), alpha=self.scale)
        return total.view(shape)

    def placed_b(self) -> Tensor:
        """[out, modules * r]: every row of the fused output reads its own module's share of A(x), and zeros else."""
        if self.slots is None:
            return self.lora_B
        spread = self.lora_B.new_zeros(self.rows * self.modules_count, self.lora_B.size(1))
        return spread.index_copy(0, self.slots, self.lora_B).view(self.rows, -1)

    def _drop(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return x
        if self.sequence_parallel or self.by_columns:
            # Each rank has other tokens, or other channels.
            with get_cuda_rng_tracker().fork():
                return F.dropout(x, self.dropout)
        return F.dropout(x, self.dropout)

    def _communicate(self, low: Tensor) -> Tensor:
        if self.group.size() == 1 or self.is_expert:
            return low
        if self.by_rows:
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self.group)
            return copy_to_tensor_model_parallel_region(low, group=self.group)
        if self.by_columns:
            if self.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(low, group=self.group)
            return reduce_from_tensor_model_parallel_region(low, group=self.group)
        return low

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """For `torch_dist`: the parts of B one by one, where TP cuts each by itself."""
        axes = ({"lora_A": 1} if self.by_columns else {}) | ({"lora_B": 0} if self.by_rows else {})
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        if len(self.b_parts) > 1:
            key = f"{prefix}lora_B"
            names, rows = zip(*self.b_parts, strict=True)
            state[key] = _split_tensor_factory(state[key], list(rows), list(names), 0)
        return state


def adapter_of(module: nn.Module) -> LoRA | None:
    """The adapter beside a layer, among its modules since megatron-core builds some without our constructors."""
    found = module._modules.get("adapter")
    return found if isinstance(found, LoRA) else None


class Adaptable(nn.Module):
    """A parallel linear that an adapter may stand beside, as its module `adapter`; a base before megatron-core's."""

    config: TransformerConfig

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The linear's own arguments and results, [S, B, in] -> ([S, B, out], bias left to the caller)."""
        output, bias = super().forward(input_, *args, **kwargs)
        adapter = adapter_of(self)
        return (output if adapter is None else adapter(input_, output)), bias

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """The linear's, and the adapter's with its own cuts."""
        state: ShardedStateDict = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        adapter = adapter_of(self)
        if adapter is not None:
            state |= adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)
        return state


class TakesAdapter(nn.Module):
    """Marks another layer that reads its module `adapter` by itself."""

    config: TransformerConfig


def attach(model: MultimodalModel, mapping: AdapterMap, parameters: Mapping[str, str]) -> None:
    """Freeze a model stage and put an adapter beside each weight of the table that the stage holds.

    Args:
        model: before Megatron wraps it.
        parameters: canonical names -> names in the model.

    Raises:
        TypeError: a weight of a layer that takes no adapter.
    """
    model.requires_grad_(False)
    groups = model.pg_collection
    for name, own in parameters.items():
        adapter = mapping.adapters.get(name)
        if adapter is None:
            continue
        module = model.get_submodule(own.rpartition(".")[0])
        if not isinstance(module, (Adaptable, TakesAdapter)):
            raise TypeError(f"{own}: {type(module).__name__} takes no LoRA adapter")
        is_expert = adapter.source.is_expert
        lora = LoRA(
            adapter,
            model.get_parameter(own),
            beside=own.rpartition(".")[2],
            scale=mapping.options.scale,
            dropout=mapping.options.dropout,
            sequence_parallel=module.config.sequence_parallel and not is_expert,
            group=groups.expt_tp if is_expert else groups.tp,
        )
        module.add_module("adapter", lora)


def initial_state(mapping: AdapterMap, seed: int) -> dict[str, Tensor]:
    """Fresh adapters as peft draws them, A uniform in +-1/sqrt(in) and B zero, float32; the same in every layout."""
    state = {}
    for name, shape in mapping.weights.tensors.items():
        if not name.endswith(A):
            state[name] = torch.zeros(shape)
            continue
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        bound = 1 / math.sqrt(shape[-1])
        state[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return state


def adapted_weights(model: nn.Module) -> Iterator[tuple[nn.Parameter, LoRA]]:
    """Each adapted weight, and the adapter beside it."""
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            holder = name.rpartition(".")[0]
            yield model.get_parameter(f"{holder}.{module.beside}"), module


@torch.no_grad()
def merged(weight: Tensor, adapter: LoRA, index: tuple[slice, ...]) -> Tensor:
    """A region of a rank's share of a weight with the adapter's part added, in float32 at least.

    Args:
        index: rows, and columns if not all.
    """
    rows, columns = (*index, slice(None))[:2]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    high, low = adapter.placed_b()[rows].to(dtype), adapter.lora_A[:, columns].to(dtype)
    return torch.addmm(weight[rows, columns].to(dtype), high, low, alpha=adapter.scale)

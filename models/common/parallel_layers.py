"""megatron-core's parallel layers, able to initialise themselves again after they were built on the meta device.

Megatron-FSDP gives a module its memory when it shards it, and then calls `reset_parameters()`, which megatron-core
0.19.2's own layers lack. What a parameter is marked with (TP slices, experts) is Megatron-FSDP's to keep: see
`runtime/patches.py`. The classes have their parents' names, by which Megatron-FSDP tells how TP slices a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name, layers
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe import shared_experts
from torch import Tensor, nn

from models.common.lora import Adaptable, TakesAdapter, adapter_of

InitMethod = Callable[[Tensor], Any]


class ColumnParallelLinear(Adaptable, layers.ColumnParallelLinear):
    """Y = XA + b, A sliced along its columns."""

    def __init__(self, *args: Any, init_method: InitMethod, **kwargs: Any) -> None:
        super().__init__(*args, init_method=init_method, **kwargs)
        self.init_method = init_method

    def reset_parameters(self) -> None:
        """Draw the weight in the stream of this TP (for an expert, EP and expert TP) rank; the bias is zero."""
        _reset(self, self.init_method)


class RowParallelLinear(Adaptable, layers.RowParallelLinear):
    """Y = XA + b, A sliced along its rows."""

    def __init__(self, *args: Any, init_method: InitMethod, **kwargs: Any) -> None:
        super().__init__(*args, init_method=init_method, **kwargs)
        self.init_method = init_method

    def reset_parameters(self) -> None:
        """Draw the weight in the stream of this TP (for an expert, EP and expert TP) rank; the bias is zero."""
        _reset(self, self.init_method)


class VocabParallelEmbedding(layers.VocabParallelEmbedding):
    """Word embedding, its rows sliced."""

    init_method: InitMethod  # set by `let_reset`: megatron-core's LanguageModelEmbedding builds its own

    def reset_parameters(self) -> None:
        """Draw the weight in the stream of this TP rank."""
        _reset(self, self.init_method)


class SharedExpertMLP(TakesAdapter, shared_experts.SharedExpertMLP):
    """The experts that every token visits, and the weight of their gate, which is whole on every rank.

    Its module `adapter` is the gate's; the linears have their own.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[S, B, H] -> the same, times the gate's sigmoid."""
        adapter = adapter_of(self)
        if adapter is None:
            return super().forward(hidden_states)
        output, _ = MLP.forward(self, hidden_states)
        return output * adapter(hidden_states, F.linear(hidden_states, self.get_parameter("gate_weight"))).sigmoid()

    def reset_parameters(self) -> None:
        """Draw the gate's weight, in the stream of the caller; the linears have their own."""
        if self.gate_weight is not None and self.config.perform_initialization:
            with torch.no_grad():
                self.config.init_method(self.gate_weight)


class ShardedConv1d(nn.Conv1d):
    """nn.Conv1d over this TP rank's channels. nn.Conv1d alone would give every TP rank the same weights."""

    def reset_parameters(self) -> None:
        """As nn.Conv1d does, in the stream of this TP rank."""
        with get_cuda_rng_tracker().fork():
            super().reset_parameters()


def let_reset(layer: nn.Module, init_method: InitMethod) -> None:
    """Make a layer that megatron-core built by itself one of the above, in place.

    GPTModel takes no class for its embedding and its output layer. Another class than megatron-core's two (Transformer
    Engine's output layer) has a `reset_parameters` of its own and stays.
    """
    ours = {
        layers.ColumnParallelLinear: ColumnParallelLinear,
        layers.VocabParallelEmbedding: VocabParallelEmbedding,
    }.get(type(layer))
    if ours is not None:
        layer.__class__ = ours
        assert isinstance(layer, ColumnParallelLinear | VocabParallelEmbedding)  # now it is
        layer.init_method = init_method


def _reset(layer: ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding, init_method: InitMethod) -> None:
    if not layer.config.perform_initialization:
        return
    tracker = get_cuda_rng_tracker()
    # Embeddings know no experts.
    is_expert = not isinstance(layer, layers.VocabParallelEmbedding) and layer.is_expert
    stream = tracker.fork(get_expert_parallel_rng_tracker_name()) if is_expert else tracker.fork()
    with stream, torch.no_grad():
        for name, parameter in layer.named_parameters(recurse=False):
            if name == "bias":
                parameter.zero_()
            else:
                init_method(parameter)

"""A stack of layers whose frozen first ones run without graph and stored activations.

Without recomputation autograd sees to that by itself. Recomputation differentiates only through inputs that ask for
gradients, so something has to ask for them in front of the first layer that is trained; nothing has to any earlier.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.recompute import checkpointed_forward
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from models.trained import trains


@dataclass(frozen=True)
class _Layers:
    """What megatron-core's `checkpointed_forward` reads of a block: some of its layers."""

    layers: list[nn.Module]
    num_layers_per_pipeline_rank: int
    config: TransformerConfig
    pg_collection: ProcessGroupCollection


class PartlyTrainedBlock(TransformerBlock):
    """megatron-core's block, which may begin with frozen layers; checkpoints and names are the parent's.

    Which parameters are trained is looked up once, by the first training step. Where fp8, fp4 or CPU offloading wrap
    layers in contexts of the parent's, the frozen ones in front are differentiated under recomputation.
    """

    def forward(
        self,
        hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[S, B, H] -> [S, B, H]; arguments as the parent's, whose input is a pipeline stage's own behind the first."""
        inputs = {
            "attention_mask": attention_mask,
            "rotary_pos_emb": rotary_pos_emb,
            "packed_seq_params": packed_seq_params,
            "padding_mask": padding_mask,
        }
        entering = hidden_states if self.pre_process else self.input_tensor
        assert entering is not None
        recomputes = self.config.recompute_granularity is not None and self.training and torch.is_grad_enabled()
        if recomputes and not entering.requires_grad and self._trained_layers:
            if len(self._trained_layers) < len(self.layers) and not self._wraps_layers():
                return self._behind_frozen(entering, inputs)
            entering.requires_grad_(True)
        return super().forward(hidden_states, **inputs, **kwargs)

    @cached_property
    def _trained_layers(self) -> list[nn.Module]:
        """The layers from the first trained one on."""
        layers = list(self.layers)
        first = next((number for number, layer in enumerate(layers) if trains(layer)), len(layers))
        return layers[first:]

    def _wraps_layers(self) -> bool:
        return bool(self.config.fp8 or self.config.fp4 or self.config.cpu_offloading)

    def _behind_frozen(self, hidden_states: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The parent's forward, in which recomputation begins at the first trained layer."""
        behind = self._trained_layers
        with get_cuda_rng_tracker().fork() if self.config.sequence_parallel else nullcontext():
            with torch.no_grad():
                for layer in list(self.layers)[: -len(behind)]:
                    hidden_states, _ = layer(hidden_states=hidden_states, **inputs)
            hidden_states.requires_grad_(True)
            if self.config.recompute_granularity == "full":
                layers = _Layers(behind, len(behind), self.config, self.pg_collection)
                hidden_states = checkpointed_forward(
                    layers,
                    hidden_states,
                    context=None,
                    context_mask=None,
                    attention_bias=None,
                    use_inner_quantization_context=False,
                    **inputs,
                )
            else:
                for layer in behind:
                    hidden_states, _ = layer(hidden_states=hidden_states, **inputs)
        if self.final_layernorm is not None:
            # Viewless, since pipeline schedules free a stage's output once it is sent.
            normed = self.final_layernorm(hidden_states)
            hidden_states = make_viewless_tensor(inp=normed, requires_grad=True, keep_graph=True)
        return hidden_states


def let_freeze_in_front(block: TransformerBlock) -> None:
    """Make a block that megatron-core built by itself a `PartlyTrainedBlock`, in place: GPTModel takes no class."""
    if type(block) is TransformerBlock:
        block.__class__ = PartlyTrainedBlock

"""The output layer, which computes losses without the logits of all tokens.

S tokens of this context-parallel rank, B rows of a batch, H hidden, V vocabulary, R tokens whose loss is wanted.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from models.common import parallel_layers
from models.common.grouped_experts import StackedLinear
from models.common.linear_cross_entropy import IGNORED, linear_cross_entropy


class ColumnParallelLinear(parallel_layers.ColumnParallelLinear):
    """megatron-core's output layer for logits; with `losses_of`, its cross-entropy in the same operation.

    Losses come out of `forward` too, because the hooks around it are what brings a sharded weight together under
    Megatron-FSDP. The class has its parent's name, by which Megatron-FSDP tells how TP slices the weight.

    Attributes:
        keep_logits: see `linear_cross_entropy`; set by the model.
    """

    keep_logits: bool = False
    # Set by megatron-core's constructor.
    weight: Tensor
    tp_group: ProcessGroup
    gradient_accumulation_fusion: bool

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        losses_of: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, or losses and hits.

        Args:
            input_: [S, B, H], S divided by TP under sequence parallelism.
            weight: [V / TP, H] to use in place of the layer's own: a tied one.
            runtime_gather_output: for logits; see megatron-core.
            losses_of: [B, S] int64 labels; None asks for logits.
            rows: [R] int64, places in the flattened [B, S] of the tokens whose loss is wanted, each once; IGNORED
                fills up. The same on all ranks of a TP group. None for all tokens.

        Returns:
            Logits [S, B, V / TP] and None; or losses [B, S] in float32 (float64 for float64) and hits [B, S] bool
            (the label has the largest logit), both zero where `rows` doesn't point.
        """
        if losses_of is None:
            return super().forward(input_, weight=weight, runtime_gather_output=runtime_gather_output)
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        labels, batch = losses_of.flatten(), losses_of.size(0)
        if rows is None:
            selected, wanted = hidden.transpose(0, 1).flatten(0, 1), labels
        else:
            place = rows.clamp(min=0)
            wanted = labels.index_select(0, place).masked_fill(rows < 0, IGNORED)
            # From b * S + s to s * B + b.
            by_token = place if batch == 1 else place % hidden.size(0) * batch + place // hidden.size(0)
            selected = hidden.flatten(0, 1).index_select(0, by_token)
        losses, hits = linear_cross_entropy(
            selected,
            self.weight if weight is None else weight,
            wanted,
            tp_group=self.tp_group,
            keep_logits=self.keep_logits,
            accumulate_main_grad=self.gradient_accumulation_fusion,
        )
        if rows is not None:
            # IGNORED entries add zeros to the first token.
            losses = losses.new_zeros(labels.shape).index_add(0, place, losses)
            hits = torch.zeros_like(labels).index_add(0, place, hits.long()).bool()
        return losses.view_as(losses_of), hits.view_as(losses_of)


def let_compute_losses(layer: parallel_layers.ColumnParallelLinear, *, keep_logits: bool) -> None:
    """Make the output layer that megatron-core's GPTModel built one of the above, in place: it takes no class for it.

    Raises:
        ValueError: the layer is another class's, or does what this one doesn't.
    """
    if type(layer) is not parallel_layers.ColumnParallelLinear:
        raise ValueError(f"the output layer is a {type(layer).__name__}; leave out --fp8-output-proj")
    refused: dict[str, Any] = {
        "--defer-embedding-wgrad-compute": layer.config.defer_embedding_wgrad_compute,
        "--gtp-weight-remat-size": vars(layer)["gtp_remat_size"] > 1,
        "--use-mup": layer.config.use_mup,
        "--cpu-offloading-num-layers": layer.config.cpu_offloading,
    }
    if given := [flag for flag, value in refused.items() if value]:
        raise ValueError(f"{', '.join(given)}: the output layer and its loss are one operation here; leave it out")
    layer.__class__ = ColumnParallelLinear
    assert isinstance(layer, ColumnParallelLinear)  # now it is
    layer.keep_logits = keep_logits


def fuse_weight_gradients(model: nn.Module) -> None:
    """Let linears, grouped experts and the output layer add weight gradients to `main_grad` where they are made.

    Set on the modules: with the same in their configuration, megatron-core's own linears refuse to be built without
    Apex, the output layer among them, which doesn't need it here.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, StackedLinear)):
            module.gradient_accumulation_fusion = True
        elif hasattr(module, "fuse_wgrad_accumulation"):  # Transformer Engine's
            vars(module)["fuse_wgrad_accumulation"] = True

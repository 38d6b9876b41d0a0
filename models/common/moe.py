"""An MoE router whose auxiliary losses act by their coefficient, whatever share of the tokens is trained.

With `--calculate-per-token-loss` Megatron divides every gradient by the trained tokens of the whole step, so an
auxiliary loss has to come in multiplied by its share of them: their mean over the step's micro-batches and data
ranks. What is left then is the coefficient times the mean of the losses. megatron-core 0.19.2 multiplies by the tokens
of the rank that aren't padding (transformer/moe/router.py:604): with a tenth of the tokens trained, tenfold.

The layer around experts that take their counts from the device (`models.common.grouped_experts`) leaves them there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor, nn


@dataclass
class StepStatistics:
    """What the routers of a model need to know of a training step.

    mean_trained_tokens: trained tokens of a micro-batch (over all its CP ranks), averaged over the step's micro-batches
        and data ranks; set before the step's first forward. One figure for the whole step, since recomputation and
        pipelining run forwards at any time within it. A tensor where a CUDA graph would freeze a number.
    """

    mean_trained_tokens: float | Tensor | None = None

    def trained_tokens(self) -> float | Tensor:
        """`mean_trained_tokens`.

        Raises:
            RuntimeError: nobody has set it.
        """
        if self.mean_trained_tokens is None:
            raise RuntimeError("the model's step.mean_trained_tokens wasn't set before this step's first forward")
        return self.mean_trained_tokens


class PerTokenLossRouter(TopKRouter):
    """megatron-core's router for a loss that is averaged over tokens; padding is left out of every statistic.

    Attributes:
        step: what the auxiliary losses weigh against; all routers of a model share one (`share_step`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        if not config.calculate_per_token_loss and (self.is_aux_loss_enabled() or config.moe_z_loss_coeff):
            raise ValueError("auxiliary losses of the MoE router need --calculate-per-token-loss here")
        self.step = StepStatistics()

    def reset_parameters(self) -> None:
        """Draw the weight; what is counted and balanced starts at zero (built on the meta device, it holds nothing)."""
        super().reset_parameters()
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[S, B, H] -> probabilities and routing map, [tokens, experts]; padding_mask: [S, B] bool, True on padding.

        Under `--moe-router-force-load-balancing` logits are random. While a CUDA graph is captured they come from the
        stream of random numbers that a graph goes on with; the parent's, which sets its state, can't be captured.
        """
        if not (self.config.moe_router_force_load_balancing and torch.cuda.is_current_stream_capturing()):
            return super().forward(input, padding_mask)
        logits = self.gating(input)
        logits = logits + (torch.randn_like(logits) - logits).detach()  # the gradient goes straight through
        return self.routing(logits, padding_mask=padding_mask)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the tokens of each expert, padding left out; megatron-core 0.19.2 (router.py:738) forgets a dimension.

        Args:
            routing_map: [tokens, experts] bool.
            padding_mask: [tokens] bool, True on padding.
        """
        super()._apply_expert_bias(routing_map, None if padding_mask is None else padding_mask.view(-1, 1))

    def attach_and_log_load_balancing_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Scale, attach and log one auxiliary loss, whose sum over the TP x CP ranks is the micro-batch's."""
        # The parent multiplies by the group's size.
        kwargs["valid_token_count"] = self.step.trained_tokens() / self.tp_cp_group.size()
        return super().attach_and_log_load_balancing_loss(*args, **kwargs)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach coefficient * mean over the micro-batch's real tokens of logsumexp(logits)^2.

        Args:
            logits: [tokens, experts] of this rank.
            padding_mask: [tokens] bool, True on padding.

        Returns:
            The logits, with the loss attached in training.
        """
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not self.training or not torch.is_grad_enabled():
            return logits
        squares = torch.logsumexp(logits, dim=-1).square()
        real = torch.ones_like(squares) if padding_mask is None else (~padding_mask).to(squares.dtype)
        tokens = real.sum()
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(tokens, group=self.tp_cp_group)
        # In an MTP layer, documents of one token have none to look at.
        loss = (squares * real).sum() / tokens.clamp(min=1)
        if self.is_mtp_layer and self.config.mtp_use_repeated_layer:
            loss = loss / self.config.mtp_num_layers
        mtp_layers = self.config.mtp_num_layers or 0
        get_moe_metrics_tracker().record(
            "z_loss",
            loss,
            self.layer_number + (self.config.num_layers if self.is_mtp_layer else 0),
            self.config.num_layers + mtp_layers,
            reduce_group=self.tp_cp_group,
        )
        return MoEAuxLossAutoScaler.apply(logits, coefficient * loss * self.step.trained_tokens())


def share_step(model: nn.Module) -> StepStatistics:
    """Give all routers of a model one `StepStatistics`, and return it."""
    step = StepStatistics()
    for module in model.modules():
        if isinstance(module, PerTokenLossRouter):
            module.step = step
    return step


class DeviceCountsMoELayer(MoELayer):
    """megatron-core's layer for experts that take their counts from the device; see `DeviceCountsDispatcher`."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if type(self.token_dispatcher) is MoEAlltoAllTokenDispatcher:  # megatron-core takes no class for it
            self.token_dispatcher.__class__ = DeviceCountsDispatcher


class DeviceCountsDispatcher(MoEAlltoAllTokenDispatcher):
    """Where a rank holds all experts whole, the host neither learns how many tokens each gets nor waits for anything.

    megatron-core 0.19.2 copies the counts to the host wherever it needs numbers of its own, and waits for them
    (transformer/moe/token_dispatcher.py:915). All-to-all's sizes have to be such numbers; one rank has no all-to-all,
    and gets its rows sorted by expert from the first permutation, so that the second, which parent and copy make, is
    left out.
    """

    tokens_per_expert: Tensor | None

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        if not self._alone() or isinstance(self.num_out_tokens, Tensor):
            # Sizes of the exchange and of what token dropping leaves: the host waits here.
            super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        return tokens_per_expert

    def dispatch_postprocess(
        self, global_input_tokens: Tensor, global_probs: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Rows [T, H] sorted by expert, tokens of each expert [E] on the device, and the rows' weights [T]."""
        if not self._alone():
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        counts, self.tokens_per_expert = self.tokens_per_expert, None
        return global_input_tokens, counts, global_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """[T, H] in the order of `dispatch_postprocess`'s argument."""
        return hidden_states if self._alone() else super().combine_preprocess(hidden_states)

    def _alone(self) -> bool:
        return self.ep_size == 1 and self.tp_size == 1

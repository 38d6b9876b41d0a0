"""The decoder: megatron-core's GPTModel with interleaved MRoPE and an MTP loss that doesn't depend on the layout.

B rows, S tokens of this context-parallel rank, H hidden, V vocabulary, K depths of MTP, R trained tokens.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_data_parallel_group
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper
from torch import Tensor

from models.common.block import let_freeze_in_front
from models.common.mrope import InterleavedMRoPE
from models.common.mtp import shift_left
from models.common.output_layer import let_compute_losses
from models.common.parallel_layers import let_reset
from models.trained import trains


class MultimodalGPTModel(GPTModel):
    """One pipeline stage of the decoder, for training. Takes GPTModel's arguments, and `keep_logits`.

    The output layer and its loss are one operation, which needs no logits of all tokens at once; see
    `models.common.linear_cross_entropy`, also for `keep_logits`. `forward` takes which tokens are trained as
    `output_processor_context`, the one argument of GPTModel's that only `_postprocess` reads: [1 + K, R] int64, for
    the next token and for each depth of MTP the places in the flattened [B, S], filled up with -1. Other losses are
    zero then. None computes every token's.

    MTP runs in training only. Its loss is a sum over tokens like the main one, so that Megatron's division by the
    step's trained tokens serves both: for depth k of K, `mtp_loss_scaling_factor` / K times the mean over the tokens
    whose (k+1)-th next one is trained, times the number of trained tokens. megatron-core counts both on the CP rank
    (transformer/multi_token_prediction.py:838), so that loss and gradient change with CP; here they are the
    micro-batch's.
    """

    def __init__(self, *args: Any, keep_logits: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.mtp_num_layers and not self.config.calculate_per_token_loss:
            raise ValueError("--mtp-num-layers needs --calculate-per-token-loss here")
        if self.position_embedding_type != "mrope":
            raise ValueError(f"position embedding {self.position_embedding_type}: this decoder is built with mrope")
        if self.post_process and self.mtp_process and self.share_embeddings_and_output_weights:
            # On a last stage that isn't the first megatron-core allocates a weight that nothing uses (the tied one is
            # the embedding's, which MTP needs here anyway) and that its checkpointing asserts to be absent.
            self.output_layer.weight = None
        if hasattr(self, "embedding"):
            let_reset(self.embedding.word_embeddings, self.config.embedding_init_method)
        if self.post_process:
            let_reset(self.output_layer, self.config.init_method)
            let_compute_losses(self.output_layer, keep_logits=keep_logits)
        let_freeze_in_front(self.decoder)
        self.rotary_pos_emb = InterleavedMRoPE(self.config.kv_channels, self.rotary_percent, self.rotary_base)

    @cached_property
    def _mtp_trains(self) -> bool:
        return trains(self.mtp)

    def _postprocess(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None,
        rotary_pos_emb: Tensor,
        *,
        mtp_in_postprocess: bool,
        loss_mask: Tensor | None,
        attention_mask: Tensor | None,
        padding_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
        runtime_gather_output: bool | None,
        extra_block_kwargs: dict[str, Any] | None,
        inference_context: Any,
        output_processor_context: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """MTP, output layer and losses; called by GPTModel.forward with its own arguments and what it computed.

        Returns:
            Hidden states [S, B, H] on a stage without output layer; with it [B, S] losses, or [B, S, V / TP] logits
            without labels.
        """
        if inference_context is not None:
            raise NotImplementedError("this decoder trains only; export the checkpoint to HF")
        if mtp_in_postprocess and self.training:
            if self.config.recompute_granularity is not None and not hidden_states.requires_grad and self._mtp_trains:
                hidden_states.requires_grad_(True)  # recomputation differentiates only through inputs that ask for it
            hidden_states = self.mtp(
                input_ids=input_ids,
                position_ids=position_ids,
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                padding_mask=padding_mask,
                embedding=self.embedding,
                **(extra_block_kwargs or {}),
            )
        if not self.post_process:
            return hidden_states

        output_weight = None
        if self.share_embeddings_and_output_weights:
            output_weight = self.shared_embedding_or_output_weight()
        rows = output_processor_context
        if self.config.mtp_num_layers and self.training:
            hidden_states, *predictions = hidden_states.chunk(1 + self.config.mtp_num_layers)
            if labels is not None:
                hidden_states = self._attach_mtp_losses(
                    hidden_states, predictions, labels, loss_mask, rows, output_weight, packed_seq_params
                )
        if labels is None:
            logits, _ = self.output_layer(
                hidden_states, weight=output_weight, runtime_gather_output=runtime_gather_output
            )
            return logits.transpose(0, 1).contiguous()
        losses, _ = self.output_layer(
            hidden_states, weight=output_weight, losses_of=labels, rows=None if rows is None else rows[0]
        )
        return losses

    def _attach_mtp_losses(
        self,
        hidden_states: Tensor,
        predictions: list[Tensor],
        labels: Tensor,
        loss_mask: Tensor | None,
        rows: Tensor | None,
        output_weight: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        """hidden_states unchanged; MTP's gradients flow when theirs do.

        Args:
            predictions: [S, B, H] of each depth.
            loss_mask: [B, S]; None trains every token.
            rows: [1 + K, R]; see the class.
        """
        cp_group = self.pg_collection.cp
        if loss_mask is None:
            loss_mask = torch.ones_like(labels, dtype=torch.float32)
        if self.config.mtp_detach_heads:
            output_weight = (self.output_layer.weight if output_weight is None else output_weight).detach()
        targets = [(labels, loss_mask)]
        for _ in predictions:
            next_labels, next_mask = shift_left(targets[-1], [0, 0], packed_seq_params, cp_group)
            targets.append((next_labels, next_mask))
        counts = torch.stack([mask.sum() for _, mask in targets])
        if cp_group.size() > 1:
            torch.distributed.all_reduce(counts, group=cp_group)
        trained, *predicted = counts.clamp(min=1).unbind()
        scale = self.config.mtp_loss_scaling_factor / self.config.mtp_num_layers

        for depth, (states, count) in enumerate(zip(predictions, predicted, strict=True)):
            depth_labels, depth_mask = targets[depth + 1]
            losses, hits = self.output_layer(
                states,
                weight=output_weight,
                losses_of=depth_labels,
                rows=None if rows is None else rows[1 + depth],
            )
            losses = losses * depth_mask
            trained_here = depth_mask > 0
            self._log_mtp(losses.detach().sum() / count, hits & trained_here, trained_here, depth)
            hidden_states = MTPLossAutoScaler.apply(hidden_states, scale * trained / count * losses)
        return hidden_states

    def log_mtp_groups(self) -> None:
        """Name the groups that MTP's log is reduced over: where a CUDA graph runs, `_log_mtp` doesn't."""
        if self.config.mtp_num_layers and self.post_process:
            tracker = MTPLossLoggingHelper.tracker
            tracker["reduce_group"], tracker["avg_group"] = self.pg_collection.cp, get_data_parallel_group()

    def _log_mtp(self, loss: Tensor, hits: Tensor, trained: Tensor, depth: int) -> None:
        """For Megatron's log: mean loss and hit rate of a depth, over CP (sum) and data ranks (mean)."""
        MTPLossLoggingHelper.save_metrics_to_tracker(
            loss,
            hits.sum().float(),
            trained.sum().float(),
            depth,
            self.config.mtp_num_layers,
            reduce_group=self.pg_collection.cp,
            avg_group=get_data_parallel_group(),
        )

"""MultimodalModel: a vision encoder in front of a GPTModel, one pipeline stage at a time.

Shapes: S sequence (the CP rank's share; the SP rank's inside the decoder), B batch, H hidden, P patches,
V vision features (P / merge_size^2), R rows that each rank's features are padded to.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from models.common.moe import share_step
from models.trained import is_adapter


def merge_features(text: Tensor, features: Tensor, vision_index: Tensor) -> Tensor:
    """Put vision features in the place of their placeholders' embeddings.

    A gather by row with static shapes, so that nothing waits for the device. A text token reads some row too and
    drops it: rows spread evenly, since one row read by all of them would serialise the backward's atomic adds.
    Each row gets one gradient that isn't zero, so the sum doesn't depend on the order of the adds.

    Args:
        text: [S, B, H] word embeddings.
        features: [V, H] of the micro-batch's images, at least one row.
        vision_index: [B, S] int64, the row of `features` for this token, -1 for text.

    Returns:
        [S, B, H] in text's dtype.
    """
    index = vision_index.t()
    spread = torch.arange(index.numel(), device=index.device).view_as(index) % features.size(0)
    is_text = index < 0
    rows = features.index_select(0, torch.where(is_text, spread, index).flatten())
    return torch.where(is_text.unsqueeze(-1), text, rows.view(*index.shape, -1).to(text.dtype))


def gather_features(features: Tensor, rows: int, group: torch.distributed.ProcessGroup) -> Tensor:
    """The features of all context-parallel ranks, each of which encoded its share of the images.

    In backward a rank gets the sum of all ranks' gradients for its rows (a reduce-scatter): each row is the embedding
    of one token on one rank, and the other ranks add zeros.

    Args:
        features: [V, H] of this rank's images.
        rows: R, at least V, the same on all ranks of the group.

    Returns:
        [ranks * R, H]: rank after rank, zeros behind each one's features.
    """
    padded = F.pad(features, (0, 0, 0, rows - features.size(0)))
    return gather_from_sequence_parallel_region(padded, group=group)


class MultimodalModel(MegatronModule):
    """One pipeline stage of a vision-language model.

    The vision encoder and the word embedding live on the first stage (`pre_process`), the output layer and MTP on
    the last. The vision encoder is any module that is called with a batch's `vision` entries as keyword arguments
    and returns [V, H] features.

    Args:
        config: the decoder's configuration; Megatron's schedules read it from here.
        language_model: this stage's part of the decoder, built with `scatter_embedding_sequence_parallel=False`.
        vision_model: the encoder on the first stage, None elsewhere, and everywhere in a model of text alone.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        language_model: GPTModel,
        vision_model: nn.Module | None,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        if vision_model is not None and not language_model.pre_process:
            raise ValueError("the vision encoder belongs on the first pipeline stage, and only there")
        self.vision_model = vision_model
        self.language_model = language_model
        self.pg_collection = pg_collection
        # Written by the forward step, read by the MoE routers.
        self.step = share_step(self)
        # LoRA: a checkpoint holds the adapters, and the base comes from its own folder.
        self.adapters_only = False
        # Megatron-FSDP's checkpoints, and any model's loading, go by these; `torch_dist` by `sharded_state_dict`.
        self.register_state_dict_post_hook(_leave_out_base)
        self.register_load_state_dict_post_hook(_miss_no_base)
        # Whether stages in front of this one train anything that its input depends on.
        self.trains_in_front = True
        # Read by Megatron's schedules, checkpointing and gradient finalisation through the wrapper.
        self.pre_process = language_model.pre_process
        self.post_process = language_model.post_process
        self.mtp_process = language_model.mtp_process
        self.vp_stage = language_model.vp_stage
        self.share_embeddings_and_output_weights = language_model.share_embeddings_and_output_weights

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight, whose gradients Megatron adds up over the first and the last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """What a `torch_dist` checkpoint holds of this stage."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {key: value for key, value in state.items() if not self.adapters_only or is_adapter(key)}

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hand the previous stage's hidden states to the decoder, for gradients only where a stage in front trains."""
        (received,) = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        if received is not None and not self.trains_in_front and torch.is_grad_enabled():
            # Megatron's schedules send a gradient back whatever it is for; the stage in front drops it.
            received.grad = torch.zeros_like(received)
            received = received.detach()
        self.language_model.set_input_tensor(received)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        vision_index: Tensor,
        vision: dict[str, Tensor | int] | None,
        feature_rows: int | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        trained_rows: Tensor | None = None,
        padding_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            input_ids: [B, S] int64.
            position_ids: [3, B, S] int64 for MRoPE, or what the decoder's position embedding takes.
            vision_index: [B, S] int64; see `merge_features`.
            vision: keyword arguments of the vision encoder; read on the first stage only, None without an encoder.
            feature_rows: R, when the context-parallel ranks share the images; None when `vision` has all of them.
            labels: [B, S] int64, already shifted; None asks for logits.
            loss_mask: [B, S] float32, 1 where the label is trained; MTP's loss needs it here.
            trained_rows: [1 + K, R] int64, places in the flattened [B, S] of the tokens whose next (k further) token is
                trained, -1 behind them; a decoder may compute these losses alone. None computes all.
            padding_mask: [B, S] bool, True on padding, which MoE routers leave out of their statistics.
            packed_seq_params: THD documents; None in BSHD.

        Returns:
            [B, S] loss per token on the last stage ([B, S, vocabulary / TP] logits without labels), hidden states
            [S, B, H] on the others.
        """
        decoder_input = None
        if self.pre_process:
            decoder_input = self._embed(input_ids, position_ids, vision_index, vision, feature_rows)
        if padding_mask is not None and self.config.sequence_parallel:
            # GPTModel scatters the mask only where it embeds the tokens itself.
            padding_mask = (
                scatter_to_sequence_parallel_region(padding_mask.t().contiguous(), group=self.pg_collection.tp)
                .t()
                .contiguous()
            )
        return self.language_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=None,
            decoder_input=decoder_input,
            labels=labels,
            loss_mask=loss_mask,
            output_processor_context=trained_rows,  # GPTModel hands it to its _postprocess as it is
            padding_mask=padding_mask,
            packed_seq_params=packed_seq_params,
        )

    def _embed(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        vision_index: Tensor,
        vision: dict[str, Tensor | int] | None,
        feature_rows: int | None,
    ) -> Tensor:
        if (self.vision_model is None) != (vision is None):
            raise ValueError(
                "a batch's images are for the first pipeline stage's vision encoder: one is there without the other"
            )
        merged = self.language_model.embedding(input_ids=input_ids, position_ids=position_ids)
        if self.vision_model is not None and vision is not None:
            features = self.vision_model(**vision)
            if feature_rows is not None:
                features = gather_features(features, feature_rows, self.pg_collection.cp)
            merged = merge_features(merged, features, vision_index)
        if self.config.sequence_parallel:
            merged = scatter_to_sequence_parallel_region(merged, group=self.pg_collection.tp)
        return merged


def _leave_out_base(model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """A hook on `state_dict()`: of a LoRA run's model, the adapters alone."""
    assert isinstance(model, MultimodalModel)
    if model.adapters_only:
        for key in [key for key in state if key.startswith(prefix) and not is_adapter(key)]:
            del state[key]


def _miss_no_base(model: nn.Module, found: Any) -> None:
    """A hook on `load_state_dict()`: what `_leave_out_base` leaves out isn't missed."""
    assert isinstance(model, MultimodalModel)
    if model.adapters_only:
        found.missing_keys[:] = [key for key in found.missing_keys if is_adapter(key)]

"""Multi-token prediction over packed documents and context parallelism.

Depth k predicts token i + k + 1 at token i, from the hidden state of depth k - 1 there and the embedding of token
i + k. What token i + k is, is decided by `shift_left`: the k-th next token of the same document, wherever it is.

B rows, S tokens of this context-parallel rank, H hidden, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from torch import Tensor

from models.backends.documents import document_index
from models.context_parallel import gathered_index, partition_index


def shift_left(
    tensors: Sequence[Tensor],
    fills: Sequence[float],
    packed_seq_params: PackedSeqParams | None,
    cp_group: torch.distributed.ProcessGroup,
) -> list[Tensor]:
    """Replace each token's entry by that of the next token of its document.

    megatron-core's `roll_tensor` goes through documents one by one, on the host, with two messages for each between
    neighbouring CP ranks. Here one all-gather serves all tensors and documents; entries are small.

    Args:
        tensors: [B, S] each, this CP rank's tokens; integers below 2^53, bools, or floats.
        fills: what the last token of a document gets, per tensor.
        packed_seq_params: THD documents, not divided by CP; None for one document per row.

    Returns:
        New tensors of the same shapes and dtypes.
    """
    cu_seqlens = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
    stacked = torch.stack([tensor.double() for tensor in tensors])  # [tensors, B, S]
    ranks = cp_group.size()
    length = stacked.size(-1) * ranks
    if ranks > 1:
        parts = [torch.empty_like(stacked) for _ in range(ranks)]
        torch.distributed.all_gather(parts, stacked, group=cp_group)
        order = gathered_index(ranks, length=length, cu_seqlens=cu_seqlens, device=stacked.device)
        stacked = torch.cat(parts, dim=-1).index_select(-1, order)
    is_last = torch.arange(length, device=stacked.device) == length - 1
    if cu_seqlens is not None:
        document = document_index(cu_seqlens, length)
        is_last |= document != document.roll(-1)
    shifted = stacked.roll(-1, dims=-1)
    if ranks > 1:
        mine = partition_index(cp_group.rank(), ranks, length=length, cu_seqlens=cu_seqlens, device=stacked.device)
        shifted, is_last = shifted.index_select(-1, mine), is_last.index_select(-1, mine)
    return [
        moved.masked_fill(is_last, fill).to(tensor.dtype)
        for moved, fill, tensor in zip(shifted, fills, tensors, strict=True)
    ]


class PackedMTPLayer(MultiTokenPredictionLayer):
    """megatron-core's MTP layer with its parameters; what is different is how it finds the next token.

    The next token's embedding is the word embedding of its id, for image placeholders too: the last pipeline stage
    has no vision features. The embedding is built without scattering over sequence parallelism (the vision features
    go in first), so it is scattered here.
    """

    def _get_embeddings(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        embedding: Callable[..., Tensor],
        hidden_states: Tensor,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """Move on by one token.

        Args:
            input_ids: [B, S] of the depth before.
            position_ids: unused by word embeddings; handed on.
            hidden_states: [S, B, H] of the depth before, S divided by TP under sequence parallelism.
            padding_mask: [B, S] like hidden_states; True where the router shouldn't look.

        Returns:
            input_ids, position_ids, padding_mask and embeddings of this depth, and hidden_states. A token without a
            next one is padding to this depth's router, however much padding follows it.
        """
        if padding_mask is None:
            (input_ids,) = shift_left([input_ids], [0], packed_seq_params, self.cp_group)
        else:
            padding_mask = self._gather(padding_mask)
            input_ids, padding_mask = shift_left([input_ids, padding_mask], [0, True], packed_seq_params, self.cp_group)
            padding_mask = self._scatter(padding_mask.t()).t()
        embedded = self._scatter(embedding(input_ids=input_ids, position_ids=position_ids))
        if self.config.mtp_detach_heads:
            embedded = embedded.detach()
        if not hidden_states.requires_grad:
            hidden_states.requires_grad_(True)  # recomputation differentiates only through inputs that ask for it
        return input_ids, position_ids, padding_mask, embedded, hidden_states

    def _gather(self, padding_mask: Tensor) -> Tensor:
        """[B, S / TP] -> [B, S] under sequence parallelism."""
        if not self.config.sequence_parallel:
            return padding_mask
        by_token = padding_mask.t().to(torch.uint8).contiguous()
        gathered = gather_from_sequence_parallel_region(
            by_token, tensor_parallel_output_grad=False, group=self.tp_group
        )
        return gathered.t().bool()

    def _scatter(self, by_token: Tensor) -> Tensor:
        """[S, ...] -> [S / TP, ...] under sequence parallelism."""
        if not self.config.sequence_parallel:
            return by_token
        return scatter_to_sequence_parallel_region(by_token.contiguous(), group=self.tp_group)

"""Scaled dot-product attention over rows or packed documents, with context parallelism.

S tokens of a row, B rows, T packed tokens, N documents, M tokens of the longest, D head dim; query heads are a
multiple of key/value heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import tensor_a2a_cp2hp, tensor_a2a_hp2cp
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from models.backends.documents import DocumentRows, document_index
from models.context_parallel import gathered_index, partition_index

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
_FULL = (AttnMaskType.no_mask, AttnMaskType.padding)


class TorchAttention(MegatronModule):
    """megatron-core's core attention, by `scaled_dot_product_attention`.

    Padding counts as part of the document that it follows: under a causal mask no real token sees it. Without one,
    documents must not have any.

    Context parallelism exchanges heads for tokens where the key/value heads divide by CP, and otherwise gathers keys
    and values over CP; `cp_comm_type` "a2a" and "all_gather" insist on one. Queries come and outputs go in the CP
    rank's zigzag order.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        *,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        if config.attention_dropout:
            raise ValueError(f"--attention-dropout {config.attention_dropout}: the torch backend has none; set it to 0")
        if attn_mask_type not in _CAUSAL + _FULL:
            raise ValueError(f"the torch backend has no attention mask of type {attn_mask_type.name}")
        self.causal = attn_mask_type in _CAUSAL
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.cp_group = pg_collection.cp
        self.cp_comm_type = cp_comm_type

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [S, B, heads, D], or [T, heads, D] with packed_seq_params; this CP rank's tokens.
            key, value: the same with key/value heads.
            attention_mask: must be None; the mask is causal or full, per document.
            packed_seq_params: documents, not divided by CP; max_seqlen_q is a host integer.

        Returns:
            [S, B, heads * D], or [T, heads * D].
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("the torch backend takes documents (packed_seq_params), no attention mask or bias")
        packed = packed_seq_params if packed_seq_params is not None and packed_seq_params.qkv_format == "thd" else None
        if packed is not None:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        cu_seqlens = None if packed is None else packed.cu_seqlens_q
        longest = None if packed is None else packed.max_seqlen_q

        if self.cp_group.size() == 1:
            output = self._attend(query, key, value, cu_seqlens, longest)
        elif self._exchange_heads(key.size(2)):
            output = self._attend_own_heads(query, key, value, cu_seqlens, longest)
        else:
            output = self._attend_own_queries(query, key, value, cu_seqlens, longest)
        output = output.flatten(2)
        return output if packed is None else output.squeeze(1)

    def _exchange_heads(self, kv_heads: int) -> bool:
        divides = kv_heads % self.cp_group.size() == 0
        if self.cp_comm_type == "a2a" and not divides:
            raise ValueError(
                f"--cp-comm-type a2a: {kv_heads} key/value heads per tensor-parallel rank don't divide by "
                f"--context-parallel-size {self.cp_group.size()}; use all_gather"
            )
        return divides and self.cp_comm_type != "all_gather"

    def _attend_own_heads(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None, longest: int | None
    ) -> Tensor:
        """A share of the heads over the whole sequence, and back."""
        cp = self.cp_group.size()
        heads = [x.size(2) // cp for x in (query, key, value)]
        # One exchange for all three: each rank's heads side by side.
        mixed = torch.cat([x.unflatten(2, (cp, -1)) for x in (query, key, value)], dim=3).flatten(2)
        mixed = tensor_a2a_cp2hp(mixed, 0, -1, self.cp_group, undo_attention_load_balancing=False)
        length = mixed.size(0)
        order = gathered_index(cp, length=length, cu_seqlens=cu_seqlens, device=mixed.device)
        mixed = mixed.index_select(0, order).unflatten(2, (sum(heads), -1))
        query_heads, key_heads, value_heads = mixed.split(heads, dim=2)
        output = self._attend(query_heads, key_heads, value_heads, cu_seqlens, longest).flatten(2)
        output = output.index_select(0, order.argsort())
        output = tensor_a2a_hp2cp(output, 0, -1, self.cp_group, redo_attention_load_balancing=False)
        return output.unflatten(2, query.shape[2:])

    def _attend_own_queries(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None, longest: int | None
    ) -> Tensor:
        """All heads, this rank's queries against the keys and values of all ranks."""
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        gathered = gather_from_sequence_parallel_region(torch.cat((key, value), dim=2), group=self.cp_group)
        length = gathered.size(0)
        order = gathered_index(cp, length=length, cu_seqlens=cu_seqlens, device=query.device)
        key, value = gathered.index_select(0, order).chunk(2, dim=2)
        position = partition_index(rank, cp, length=length, cu_seqlens=cu_seqlens, device=query.device)
        return self._attend(query, key, value, cu_seqlens, longest, position)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor | None,
        longest: int | None,
        position: Tensor | None = None,
    ) -> Tensor:
        """[S, B, heads, D] queries against [S', B, kv heads, D] -> [S, B, heads, D].

        Args:
            position: [S] where the queries are among the keys, if they aren't the same tokens; CP's order.
        """
        if cu_seqlens is None:
            mask = None
            if self.causal and position is not None:
                mask = position[:, None] >= torch.arange(key.size(0), device=key.device)
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return self._sdpa(query, key, value, mask).permute(2, 0, 1, 3)
        assert longest is not None  # the batch gives both or neither
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        documents = cu_seqlens.numel() - 1
        if documents * longest**2 <= key.size(0) ** 2:
            output = self._attend_rows(query, key, value, cu_seqlens, longest, position)
        else:  # a few long documents among many short ones: rows would be mostly padding
            output = self._attend_pack(query, key, value, cu_seqlens, position)
        return output.unsqueeze(1)

    def _attend_rows(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        position: Tensor | None,
    ) -> Tensor:
        """One row per document: time and memory N x M^2 and N x M."""
        kv_rows = DocumentRows.of(cu_seqlens, key.size(0), longest)
        query_rows = kv_rows
        if position is not None:
            cp = key.size(0) // query.size(0)
            query_rows = DocumentRows.of(cu_seqlens // cp, query.size(0), longest // cp)
        mask = self._row_mask(kv_rows, query_rows, cu_seqlens, position)
        query, key, value = (
            layout.to_rows(x).transpose(1, 2) for layout, x in ((query_rows, query), (kv_rows, key), (kv_rows, value))
        )
        return query_rows.to_tokens(self._sdpa(query, key, value, mask).transpose(1, 2))

    def _row_mask(
        self, kv_rows: DocumentRows, query_rows: DocumentRows, cu_seqlens: Tensor, position: Tensor | None
    ) -> Tensor | None:
        place = torch.arange(kv_rows.token.size(1), device=cu_seqlens.device)
        if not self.causal:
            # The first place stays visible in an empty document: a row without any key would be NaN.
            return ((place < kv_rows.lengths[:, None]) | (place == 0))[:, None, None, :]
        if position is None:
            return None
        within = query_rows.to_rows(position) - cu_seqlens[:-1, None]  # [N, M / CP]
        return ((within[..., None] >= place) | (place == 0)).unsqueeze(1)

    def _attend_pack(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, position: Tensor | None
    ) -> Tensor:
        """One row with a block-diagonal mask: time and memory T^2."""
        key_position = torch.arange(key.size(0), device=key.device)
        key_document = document_index(cu_seqlens, key.size(0))
        if position is None:
            position = key_position
        mask = key_document[position][:, None] == key_document
        if self.causal:
            mask &= position[:, None] >= key_position
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        return self._sdpa(query, key, value, mask).squeeze(0).transpose(0, 1)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[rows, heads, tokens, D]; without a mask, causal if this attention is."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=self.causal and mask is None,
            scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )

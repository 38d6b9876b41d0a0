"""Self-attention that rotates queries and keys by angles of its own tokens.

S tokens of this context-parallel rank (T packed ones with B = 1), B rows, H hidden, D head dim, R rotated channels.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import jit
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


@jit.jit_fuser  # a kernel instead of ten; megatron-core's switch for what it compiles
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R channels of each head, channel i with channel i + R / 2, in the dtype of cos and sin.

    Args:
        x: [S, B, heads, D].
        cos, sin: [S, B or 1, 1, R] of the R / 2 angles, twice.

    Returns:
        [S, B, heads, D] in x's dtype.
    """
    rotated, rest = x.split((cos.size(-1), x.size(-1) - cos.size(-1)), dim=-1)
    first, second = rotated.to(cos.dtype).chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


class RotarySelfAttention(SelfAttention):
    """megatron-core's self-attention with its parameters, training only, BSHD and THD alike.

    `rotary_pos_emb` holds the angles of the tokens at hand, so that nothing needs to know which tokens those are:
    megatron-core's own rotary code in THD copies cu_seqlens to the host in every layer. Any backend's core attention
    fits; with or without output gate and query/key norms.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.fine_grained_activation_offloading and self.config.offload_modules:
            raise ValueError(
                "--fine-grained-activation-offloading isn't built for this attention; use --recompute-granularity"
            )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: int | None = None,
        *,
        inference_params: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One layer without norm and residual.

        Args:
            hidden_states: [S, B, H], S divided by TP under sequence parallelism.
            rotary_pos_emb: [S, B or 1, 1, R] float32 angles, S not divided by TP.
            packed_seq_params: documents, not divided by CP.

        Returns:
            [S, B, H] like the input, and the output projection's bias, if any.

        Raises:
            NotImplementedError: called for inference.
        """
        if inference_context is not None or inference_params is not None:
            raise NotImplementedError("this attention keeps no keys and values; export the checkpoint to HF")
        query, key, value, *gate = self.get_query_key_value_tensors(
            hidden_states, output_gate=self.config.attention_output_gate
        )
        if rotary_pos_emb is not None:
            cos, sin = rotary_pos_emb.cos(), rotary_pos_emb.sin()
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if packed:
            query, key, value = (x.squeeze(1) for x in (query, key, value))
        attend = (
            self._checkpointed_attention_forward
            if self.checkpoint_core_attention and self.training
            else self._run_core_attention
        )
        output = attend(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=self.attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )
        if packed:
            output = output.reshape(output.size(0), 1, -1)
        if gate:
            output = self._apply_output_gate(output, gate[0])
        return self.linear_proj(output)

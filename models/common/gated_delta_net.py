"""GatedDeltaNet over rows and packed documents, with the kernels that the device has.

S tokens of the context-parallel rank (all of them between the two exchanges), B rows, H hidden, T packed tokens,
N documents.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.gated_delta_net import (
    GatedDeltaNet,
    get_parameter_local_cp,
    tensor_a2a_cp2hp,
    tensor_a2a_hp2cp,
)
from megatron.core.tensor_parallel import CheckpointWithoutOutput, get_cuda_rng_tracker
from torch import Tensor, nn

from models.common.gdn_kernels import TORCH_KERNELS, kernels_for
from models.common.packed import PackedDocuments
from models.common.parallel_layers import ShardedConv1d
from models.context_parallel import gathered_index


class PackedGatedDeltaNet(GatedDeltaNet):
    """megatron-core's GatedDeltaNet with its parameters and checkpoint layout, and a forward of its own.

    What differs: the convolution and the memory restart at every document with torch's kernels too; nothing waits for
    the device; `A_log`, `dt_bias` and the output norm's weight are float32 whatever the model's dtype, because their
    values move by less than bfloat16 resolves.
    """

    conv1d: nn.Conv1d

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        marks = vars(self.conv1d.weight)
        self.conv1d = ShardedConv1d(
            in_channels=self.conv_dim_local_tp,
            out_channels=self.conv_dim_local_tp,
            bias=self.conv_bias,
            kernel_size=self.conv_kernel_dim,
            groups=self.conv_dim_local_tp,
            padding=self.conv_kernel_dim - 1,
            device=torch.cuda.current_device(),
            dtype=self.config.params_dtype,
        )
        for parameter in self.conv1d.parameters():
            vars(parameter).update(marks)

    def _setup_variant_attrs(self) -> None:
        super()._setup_variant_attrs()
        # Only to satisfy the constructor, which refuses None; the forward chooses by the device of its input.
        self.gated_delta_rule = TORCH_KERNELS.gated_delta_rule

    def reset_parameters(self) -> None:
        """Initialise A_log = log U(A_init_range) and dt_bias = 1 in float32; the convolution does it by itself."""
        for parameter in (self.A_log, self.dt_bias):
            parameter.data = parameter.data.to(torch.float32)
        if not self.config.perform_initialization:
            return
        with get_cuda_rng_tracker().fork(), torch.no_grad():
            self.dt_bias.fill_(1.0)
            self.A_log.uniform_(*self.A_init_range).log_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedGatedDeltaNet:
        """Move or cast, but never cast `A_log`, `dt_bias` and the output norm's weight to 16 bits.

        `Float16Module` casts by `module.bfloat16()`, which comes through here with every parameter and gradient.
        """
        wide = [self.A_log, self.dt_bias, *self.out_norm.parameters()]
        wide += [parameter.grad for parameter in wide if parameter.grad is not None]

        def keep_wide(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if any(tensor is kept for kept in wide) and result.dtype.itemsize < tensor.dtype.itemsize:
                return tensor.to(result.device)
            return result

        return super()._apply(keep_wide, recurse)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """One layer without norm and residual.

        Args:
            hidden_states: [S, B, H], S divided by TP under sequence parallelism; B = 1 for packed documents.
            attention_mask: unused, as are the rotary arguments in kwargs that TransformerLayer passes to any attention.
            packed_seq_params: documents, not divided by CP, each a multiple of 2 * CP tokens; None for one per row.

        Returns:
            [S, B, H] like the input, and the output projection's bias, if any.

        Raises:
            NotImplementedError: called for inference.
        """
        if inference_context is not None:
            raise NotImplementedError("GatedDeltaNet keeps no state for inference here; export the checkpoint to HF")
        packed = packed_seq_params if packed_seq_params is not None and packed_seq_params.qkv_format == "thd" else None
        cu_seqlens = None if packed is None else packed.cu_seqlens_q
        chunks = packed.chunk_indices if isinstance(packed, PackedDocuments) else None

        projected, _ = self.in_proj(hidden_states)
        projected, order = self._gather_sequence(projected, cu_seqlens)
        core, gate = self._mix(projected.transpose(0, 1), cu_seqlens, chunks)
        finish = partial(self._gated_norm, order=order)
        if not self.recompute_norm_out:
            return self.out_proj(finish(core, gate))
        checkpoint = CheckpointWithoutOutput()
        normed = checkpoint.checkpoint(finish, core, gate)
        output, bias = self.out_proj(normed)
        checkpoint.discard_output_and_register_recompute(output)
        return output, bias

    def _gather_sequence(self, projected: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[S, B, sections] of all this TP rank's heads -> a share of the heads over the whole sequence, in order.

        Returns:
            The tensor, and where its tokens were among the ranks' parts (None without context parallelism).
        """
        if self.cp_size == 1:
            return projected, None
        sections = projected.split(self.in_proj_split_sections, dim=-1)
        # Each rank's share of every section side by side, so that one exchange serves all six.
        by_rank = torch.cat([section.unflatten(-1, (self.cp_size, -1)) for section in sections], dim=-1).flatten(-2)
        group = self.pg_collection.cp
        gathered = tensor_a2a_cp2hp(by_rank, 0, -1, group, undo_attention_load_balancing=False)
        order = gathered_index(self.cp_size, length=gathered.size(0), cu_seqlens=cu_seqlens, device=gathered.device)
        return gathered.index_select(0, order), order

    def _mix(self, projected: Tensor, cu_seqlens: Tensor | None, chunks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolution and gated delta rule over the whole sequence.

        Args:
            projected: [B, S, q k v z b a], with this rank's heads.

        Returns:
            [B, S, value heads, value head dim] twice: the rule's output and the output gate z.
        """
        kernels = kernels_for(
            projected.device, self.config.transformer_impl, deterministic=self.config.deterministic_mode
        )
        qkv, gate, beta, alpha = projected.split(self.feat_dim_split, dim=-1)
        sections = (self.qk_dim_local_tp, self.qk_dim_local_tp, self.v_dim_local_tp)
        weight = get_parameter_local_cp(self.conv1d.weight, 0, self.pg_collection.cp, sections)
        qkv = kernels.causal_conv(qkv, weight.squeeze(1), cu_seqlens, chunks)

        query, key, value = (x.unflatten(-1, (-1, head_dim)) for x, head_dim in self._split_qkv(qkv))
        repeats = self.num_value_heads // self.num_key_heads
        if repeats > 1:
            query, key = (x.repeat_interleave(repeats, dim=2) for x in (query, key))
        decay_rate, dt_bias = (get_parameter_local_cp(x, 0, self.pg_collection.cp) for x in (self.A_log, self.dt_bias))
        g, beta = self._compute_g_and_beta(decay_rate, dt_bias, alpha, beta)
        core = kernels.gated_delta_rule(query, key, value.contiguous(), g, beta.contiguous(), cu_seqlens, chunks)
        return core, gate.unflatten(-1, (-1, self.value_head_dim))

    def _split_qkv(self, qkv: Tensor) -> list[tuple[Tensor, int]]:
        keys = self.qk_dim_local_tp // self.cp_size
        parts = qkv.split((keys, keys, self.v_dim_local_tp // self.cp_size), dim=-1)
        return list(zip(parts, (self.key_head_dim, self.key_head_dim, self.value_head_dim), strict=True))

    def _gated_norm(self, core: Tensor, gate: Tensor, order: Tensor | None) -> Tensor:
        """out_norm(core) * silu(gate), back to this rank's tokens and all this TP rank's heads: [S, B, values]."""
        normed = self._apply_gated_norm(core, gate).view(*core.shape[:2], -1).transpose(0, 1)
        if order is None:
            return normed.contiguous()
        normed = normed.index_select(0, order.argsort())
        return tensor_a2a_hp2cp(normed, 0, -1, self.pg_collection.cp, redo_attention_load_balancing=False)

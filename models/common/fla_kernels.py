"""GatedDeltaNet's two operations in flash-linear-attention's Triton kernels, told where the chunks of documents are.

flash-linear-attention's own calls find the chunks from cu_seqlens on the host, which waits for the device, and remember
them for that tensor object: a buffer that is filled anew, as CUDA graphs need it, would silently get the chunks of the
documents before. Its forward and backward functions take them as an argument; these are autograd functions over them.

T packed tokens, H value heads, K, V head dims, N documents, G chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from fla.modules.convolution import causal_conv1d
from fla.modules.l2norm import l2norm_bwd, l2norm_fwd
from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, chunk_indices: Tensor | None) -> Tensor:
    """See `models.common.gdn_kernels.GDNKernels`."""
    return causal_conv1d(x=x, weight=weight, activation="silu", cu_seqlens=cu_seqlens, chunk_indices=chunk_indices)[0]


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> Tensor:
    """See `models.common.gdn_kernels.GDNKernels`."""
    inputs = [x.contiguous() for x in (q, k, v, g, beta)]
    return _GatedDeltaRule.apply(*inputs, cu_seqlens, chunk_indices)


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        cu_seqlens: Tensor | None,
        chunk_indices: Tensor | None,
    ) -> Tensor:
        q, q_rstd = l2norm_fwd(q)
        k, k_rstd = l2norm_fwd(k)
        scale = k.size(-1) ** -0.5
        g, output, solved, _, _ = chunk_gated_delta_rule_fwd(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            scale=scale,
            initial_state=None,
            output_final_state=False,
            cu_seqlens=cu_seqlens,
            chunk_indices=chunk_indices,
        )
        ctx.save_for_backward(q, q_rstd, k, k_rstd, v, g, beta, solved, cu_seqlens, chunk_indices)
        ctx.scale = scale
        return output.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        q, q_rstd, k, k_rstd, v, g, beta, solved, cu_seqlens, chunk_indices = ctx.saved_tensors
        q_grad, k_grad, v_grad, beta_grad, g_grad, _ = chunk_gated_delta_rule_bwd(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            A=solved,
            scale=ctx.scale,
            initial_state=None,
            do=output_grad.contiguous(),
            dht=None,
            cu_seqlens=cu_seqlens,
            chunk_indices=chunk_indices,
        )
        q_grad = l2norm_bwd(q, q_rstd, q_grad)
        k_grad = l2norm_bwd(k, k_rstd, k_grad)
        return q_grad.to(q), k_grad.to(k), v_grad.to(v), g_grad.to(g), beta_grad.to(beta), None, None

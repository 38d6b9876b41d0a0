"""The two operations of GatedDeltaNet that know of documents: a short causal convolution and the gated delta rule.

In torch for any device and dtype (the reference), and in flash-linear-attention's Triton for CUDA. Both restart at
every document's first token, and neither waits for the device in our code.

The rule keeps a D_k x D_v memory S per head and, token by token (Yang et al., "Gated Delta Networks", 2024):

    S = exp(g) S;   S = S + k outer beta (v - S^T k);   o = S^T q / sqrt(D_k)

B rows, T tokens, N documents, H value heads, K = D_k, V = D_v head dims, C tokens of a chunk, G chunks of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from models.backends.documents import chunk_indices, document_index
from models.common.kernel_check import relative_errors, what_is_wrong

NORM_EPSILON = 1e-6
# Tokens of a chunk of flash-linear-attention's kernels, which they are compiled for.
FLA_CHUNK = 64
# The fastest on CPU for heads of 16 (16 to 64 are within 25% of each other).
CHUNK_SIZE = 32


@dataclass(frozen=True)
class GDNKernels:
    """One implementation of both operations.

    causal_conv: (x [B, T, channels], weight [channels, taps], documents) -> silu(convolution) [B, T, channels].
    gated_delta_rule: (q, k [B, T, H, K], v [B, T, H, V], g, beta [B, T, H], documents) -> [B, T, H, V]; q and k
        are normalised inside.

    documents is what follows as two arguments: cu_seqlens, [N + 1] int32 with B = 1, or None: each row is a document;
    and chunk_indices, [G, 2] int32 or None (`models.common.packed.PackedDocuments`), which torch's kernels don't need.
    """

    causal_conv: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    gated_delta_rule: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def kernels_for(device: torch.device, transformer_impl: str, *, deterministic: bool = False) -> GDNKernels:
    """flash-linear-attention's kernels beside Transformer Engine where they are installed, torch's otherwise.

    Args:
        transformer_impl: "local" is torch throughout: the reference, in any dtype.
        deterministic: torch's in any case; Triton's backward adds in any order.
    """
    if device.type != "cuda" or transformer_impl == "local" or deterministic:
        return TORCH_KERNELS
    return _fla_kernels() or TORCH_KERNELS


def causal_conv(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Depthwise convolution over the last `taps` tokens of the same document, then SiLU.

    Args:
        x: [B, T, channels].
        weight: [channels, taps], the last tap for the token itself.
        cu_seqlens: see `GDNKernels`.

    Returns:
        [B, T, channels] in x's dtype, computed in float32 at least.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    taps = weight.to(compute).unbind(1)
    length = x.size(1)
    document = None if cu_seqlens is None else document_index(cu_seqlens, length)
    inputs = x.to(compute)
    output = inputs * taps[-1]
    for back, tap in enumerate(reversed(taps[:-1]), 1):
        past = F.pad(inputs, (0, 0, back, 0))[:, :length]
        if document is not None:
            same = document == F.pad(document, (back, 0), value=-1)[:length]
            past = past * same.unsqueeze(1)
        output = output + past * tap
    return F.silu(output).to(x.dtype)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None, chunk_size: int = CHUNK_SIZE
) -> Tensor:
    """The rule in chunks of C tokens: matrix products inside a chunk, a scan over the G chunks' memories.

    Chunks don't follow documents. Where a document starts inside a chunk, what is before and what is after it don't
    see each other, and the memory that the chunk was handed reaches only the tokens before it.

    Args:
        q, k, v, g, beta, cu_seqlens: see `GDNKernels`; g <= 0.

    Returns:
        [B, T, H, V] in v's dtype, computed in float32 at least.
    """
    compute = torch.promote_types(v.dtype, torch.float32)
    length, key_dim = k.shape[1], k.shape[-1]
    q = _normalise(q.to(compute)) * key_dim**-0.5
    k = _normalise(k.to(compute))
    q, k, values, decay, beta = (_to_chunks(x.to(compute), chunk_size) for x in (q, k, v, g, beta))
    beta = beta.unsqueeze(-1)
    pairs, carried, kept = _document_masks(cu_seqlens, length, chunk_size, q.device)

    log_decay = decay.cumsum(-1)  # [B, G, H, C], from the chunk's start
    end = log_decay[..., -1:]
    # Masked before exp: above the diagonal the exponent is positive and may overflow.
    pair_decay = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill(~pairs, -torch.inf).exp()
    from_start = (log_decay.exp() * carried).unsqueeze(-1)
    to_end = ((end - log_decay).exp() * kept).unsqueeze(-1)

    # What each token writes depends on what the earlier ones of the chunk wrote: a unit lower triangular system, for
    # the writes into an empty memory and for their change per unit of the memory handed over.
    system = beta * (k @ k.mT) * pair_decay
    right = torch.cat((beta * values, beta * k * from_start), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    writes, corrections = solved.split((values.size(-1), key_dim), dim=-1)

    outgoing = (k * to_end).mT
    survival = (end.exp() * carried[..., -1:]).unsqueeze(-1)
    transition = survival * torch.eye(key_dim, dtype=compute, device=k.device) - outgoing @ corrections
    memory = _scan(transition, outgoing @ writes)  # [B, G, H, K, V] at each chunk's start
    written = writes - corrections @ memory
    output = (q * from_start) @ memory + ((q @ k.mT) * pair_decay) @ written
    return output.transpose(2, 3).flatten(1, 2)[:, :length].to(v.dtype)


def _normalise(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPSILON)


def _to_chunks(x: Tensor, chunk_size: int) -> Tensor:
    """[B, T, H, ...] -> [B, G, H, C, ...]; zeros behind the end."""
    missing = -x.size(1) % chunk_size
    padded = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return padded.unflatten(1, (-1, chunk_size)).transpose(2, 3).contiguous()


def _document_masks(
    cu_seqlens: Tensor | None, length: int, chunk_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens of a chunk touch which.

    Returns:
        pairs: [G or 1, 1, C, C], the column's token comes no later and is of the same document.
        carried: [G or 1, 1, C], the token's document was going on when the chunk started.
        kept: [G or 1, 1, C], the token's document goes on to the chunk's end.
    """
    causal = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=device).tril()
    if cu_seqlens is None:
        everything = causal.new_ones(1, 1, chunk_size)
        return causal[None, None], everything, everything
    padded = length + -length % chunk_size
    document = document_index(cu_seqlens, padded).view(-1, 1, chunk_size)
    pairs = causal & (document.unsqueeze(-1) == document.unsqueeze(-2))
    last = document[..., -1:]
    before = F.pad(last[:-1], (0, 0, 0, 0, 1, 0), value=-1)
    return pairs, document == before, document == last


def _scan(transition: Tensor, written: Tensor) -> Tensor:
    """S_0 = 0, S_{i+1} = transition_i S_i + written_i over the chunks.

    Args:
        transition: [B, G, H, K, K].
        written: [B, G, H, K, V].

    Returns:
        [B, G, H, K, V], S_i for each chunk i.
    """
    batch, _, heads, key_dim, value_dim = written.shape
    state = written.new_zeros(batch * heads, key_dim, value_dim)
    states = []
    for step, added in zip(transition.unbind(1), written.unbind(1), strict=True):
        states.append(state)
        state = torch.baddbmm(added.flatten(0, 1), step.flatten(0, 1), state)
    return torch.stack(states, dim=1).view(batch, heads, -1, key_dim, value_dim).transpose(1, 2)


TORCH_KERNELS = GDNKernels(
    lambda x, weight, cu_seqlens, _: causal_conv(x, weight, cu_seqlens),
    lambda q, k, v, g, beta, cu_seqlens, _: gated_delta_rule(q, k, v, g, beta, cu_seqlens),
)


@functools.cache
def _fla_kernels() -> GDNKernels | None:
    if find_spec("fla") is None:
        return None
    from models.common import fla_kernels

    return GDNKernels(fla_kernels.causal_conv, fla_kernels.gated_delta_rule)


@dataclass(frozen=True)
class GDNSizes:
    """What one rank's kernels work on."""

    heads: int
    key_dim: int
    value_dim: int
    channels: int  # of the convolution


@functools.cache
def check_fla_gradients(sizes: GDNSizes) -> None:
    """Compare flash-linear-attention's outputs and gradients on this GPU with torch's, on documents of a few lengths.

    Some versions of Triton compile its backward of the gated rule wrongly on Hopper, without any error.
    At the model's own sizes, since Triton compiles and tunes for them: two minutes the first time on a machine, which
    the first step would take otherwise, and a second from then on.

    Raises:
        RuntimeError: a tensor differs by more than bfloat16's rounding explains; the message names it.
    """
    kernels = _fla_kernels()
    if kernels is None:
        return
    device = torch.device("cuda", torch.cuda.current_device())
    if wrong := what_is_wrong(kernel_errors(kernels, sizes, device), FLA_TOLERANCE):
        import fla
        import triton

        raise RuntimeError(
            f"flash-linear-attention {fla.__version__} with Triton {triton.__version__} computes GatedDeltaNet wrongly "
            f"on this {torch.cuda.get_device_name(device)}: relative to the torch reference (bfloat16 explains "
            f"{FLA_TOLERANCE}) {wrong}. Install tilelang, or a "
            "Triton outside [3.4, 3.7.1); --deterministic-mode runs torch's kernels instead"
        )


# Several times what bfloat16 inputs and intermediate results cost; the known defect is of order 1.
FLA_TOLERANCE = 0.03


def kernel_errors(kernels: GDNKernels, sizes: GDNSizes, device: torch.device) -> dict[str, float]:
    """Relative errors of bfloat16 outputs and gradients against torch's in float64, by name; NaN where they are NaN."""
    # The last document is empty, and behind the chunks there is one that isn't there: as where sizes are static.
    lengths = (1, 130, 3, 130, 56, 0)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    chunks = F.pad(chunk_indices(lengths, FLA_CHUNK), (0, 0, 0, 1), value=0)
    chunks[-1, 0] = len(lengths) - 1
    chunks = chunks.to(device)
    inputs = _check_inputs(device, sizes, length=320)
    expected = _outputs_and_gradients(TORCH_KERNELS, [x.double() for x in inputs], cu_seqlens, chunks)
    actual = _outputs_and_gradients(kernels, inputs, cu_seqlens, chunks)
    return relative_errors(actual, expected)


def _check_inputs(device: torch.device, sizes: GDNSizes, length: int) -> list[Tensor]:
    """x of the convolution, its weight, and q, k, v, g, beta of the rule; bfloat16 but for g."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    wide = [normal(1, length, sizes.heads, dim) for dim in (sizes.key_dim, sizes.key_dim, sizes.value_dim)]
    rates = [normal(1, length, sizes.heads) for _ in range(2)]
    inputs = [
        normal(1, length, sizes.channels),
        normal(sizes.channels, 4),
        *wide,
        -F.softplus(rates[0]),
        rates[1].sigmoid(),
    ]
    return [x if index == 5 else x.bfloat16() for index, x in enumerate(inputs)]


def _outputs_and_gradients(
    kernels: GDNKernels, inputs: list[Tensor], cu_seqlens: Tensor, chunks: Tensor
) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    x, weight, q, k, v, g, beta = leaves
    conv = kernels.causal_conv(x, weight, cu_seqlens, chunks)
    rule = kernels.gated_delta_rule(q, k, v, g, beta, cu_seqlens, chunks)
    gradients = torch.autograd.grad(_weighted_sum(conv) + _weighted_sum(rule), leaves)
    names = ("x", "weight", "q", "k", "v", "g", "beta")
    return {
        "convolution": conv.detach(),
        "rule": rule.detach(),
        **{f"gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)},
    }


def _weighted_sum(x: Tensor) -> Tensor:
    return (x.flatten() * torch.linspace(-1, 1, x.numel(), device=x.device)).sum()

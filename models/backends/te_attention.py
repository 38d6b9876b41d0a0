"""Transformer Engine's attention for this model on this machine: is a fused one there, and does it compute rightly?

Imports Transformer Engine only when asked. T packed tokens, D head dim.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.common.kernel_check import relative_errors, what_is_wrong

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SLOW = "NVTE_UNFUSED_ATTN"  # "0": Transformer Engine doesn't fall back to plain matrix products


@dataclass(frozen=True)
class AttentionSizes:
    """What one rank's attention works on; packed: THD documents rather than rows; causal: or every token sees all."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    packed: bool
    causal: bool = True

    def __str__(self) -> str:
        return f"{self.heads} heads of {self.head_dim}, {self.kv_heads} KV heads, {self.dtype}"


def check_fused_attention(sizes: AttentionSizes) -> None:
    """Run a few tokens through `transformer_engine.pytorch.DotProductAttention` with its slow fallback forbidden.

    Transformer Engine says nothing when it falls back, and has no context parallelism there.

    Raises:
        RuntimeError: no fused or flash attention takes these sizes here; the message says what to look at.
    """
    # Zeros: the random state of the run stays as it is.
    query, key, value = (
        torch.zeros(64, heads, sizes.head_dim, dtype=sizes.dtype, device="cuda", requires_grad=True)
        for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    )
    try:
        with _environment({SLOW: "0"}):
            te_attention(sizes)(query, key, value, [64]).sum().backward()
    except ValueError as error:
        raise RuntimeError(
            f"Transformer Engine has no fused attention for {sizes} on this machine: {error} {_cudnn_advice()}Without "
            "one, attention is many times slower and has no context parallelism; accept that with --allow-slow-kernels"
        ) from error


# (queries, keys, values [T, heads, D], lengths of documents that add up to T) -> [T, heads, D]
Attention = Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]


def te_attention(sizes: AttentionSizes) -> Attention:
    """Transformer Engine's attention as megatron-core calls it; rows are of one document."""
    from transformer_engine.pytorch import DotProductAttention

    kind = "causal" if sizes.causal else "no_mask"
    if sizes.packed:
        kind = "padding_causal" if sizes.causal else "padding"
    attention = DotProductAttention(
        sizes.heads,
        sizes.head_dim,
        num_gqa_groups=sizes.kv_heads,
        attention_dropout=0.0,
        attn_mask_type=kind,
        qkv_format="thd" if sizes.packed else "sbhd",
    )

    def attend(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        if not sizes.packed:
            output = attention(*(x.unsqueeze(1) for x in (query, key, value)))
        else:
            cu_seqlens = torch.tensor([0, *lengths], device=query.device).cumsum(0, dtype=torch.int32)
            documents: dict[str, Any] = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens}
            documents |= {"max_seqlen_q": max(lengths), "max_seqlen_kv": max(lengths)}
            output = attention(query, key, value, **documents)
        return output.reshape(query.shape)

    return attend


def torch_attention(sizes: AttentionSizes) -> Attention:
    """The same by torch's operator, one document after the other, in any dtype: the reference."""

    def attend(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        documents = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True)
        outputs = [
            F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=sizes.causal, enable_gqa=True)[0]
            for q, k, v in documents
        ]
        return torch.cat(outputs, dim=1).transpose(0, 1)

    return attend


# Several times what bfloat16 inputs and intermediate results cost.
CHECK_TOLERANCE = 0.03
# Megatron's --attention-backend in the variables that Transformer Engine reads.
_CHOICES = {
    "auto": {},
    "flash": {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "0"},
    "fused": {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1"},
    "unfused": {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0"},
}


@functools.cache
def check_attention(whose: str, sizes: AttentionSizes, backend: str) -> None:
    """Compare Transformer Engine's attention and its gradients on this GPU with torch's in float64: about a second.

    Args:
        whose: for the message.
        backend: `--attention-backend`; nothing of Transformer Engine runs with "local".

    Raises:
        RuntimeError: a tensor differs by more than 16-bit rounding explains; the message names it.
    """
    if backend not in _CHOICES:
        return
    device = torch.device("cuda", torch.cuda.current_device())
    with _environment(_CHOICES[backend]):
        errors = attention_errors(te_attention(sizes), sizes, device)
    if wrong := what_is_wrong(errors, CHECK_TOLERANCE):
        others = ", ".join(name for name in _CHOICES if name not in ("auto", backend))
        raise RuntimeError(
            f"Transformer Engine computes the {whose}'s attention ({sizes}) wrongly on this "
            f"{torch.cuda.get_device_name(device)}: relative to torch in float64 (rounding explains {CHECK_TOLERANCE}) "
            f"{wrong}. Try another --attention-backend ({others}), or --transformer-impl local"
        )


def attention_errors(attention: Attention, sizes: AttentionSizes, device: torch.device) -> dict[str, float]:
    """Relative errors of outputs and gradients against torch's in float64, by name; NaN where they are NaN."""
    lengths = [1, 130, 4, 249] if sizes.packed else [384]
    generator = torch.Generator(device).manual_seed(0)
    heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads, sizes.heads)
    *inputs, grad = (
        torch.randn(sum(lengths), count, sizes.head_dim, generator=generator, device=device).to(sizes.dtype)
        for count in heads
    )
    results = []
    for attend, dtype in ((torch_attention(sizes), torch.float64), (attention, sizes.dtype)):
        query, key, value = (x.to(dtype).detach().requires_grad_() for x in inputs)
        output = attend(query, key, value, lengths)
        results.append([output.detach(), *torch.autograd.grad(output, (query, key, value), grad.to(dtype))])
    names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
    exact, actual = (dict(zip(names, tensors, strict=True)) for tensors in results)
    return relative_errors(actual, exact)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _cudnn_advice(maps: Path = Path("/proc/self/maps")) -> str:
    """A sentence if this process has loaded the libraries of two cuDNNs, which then refuse each other; else nothing."""
    files = {Path(line.split()[-1]) for line in maps.read_text().splitlines() if "libcudnn" in line}
    folders = sorted({str(file.parent) for file in files})
    if len(folders) < 2:
        return ""
    # torch opens libcudnn.so.9; Transformer Engine's core opens libcudnn.so, which pip's cuDNN doesn't have.
    return (
        f"Two cuDNNs are loaded, from {' and '.join(folders)}: make a folder with a link named libcudnn.so to torch's "
        "libcudnn.so.9 and put it first in LD_LIBRARY_PATH. "
    )

"""Does Transformer Engine have a fused attention for this model on this machine? Imports it only when asked."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

SLOW = "NVTE_UNFUSED_ATTN"  # "0": Transformer Engine doesn't fall back to plain matrix products


@dataclass(frozen=True)
class AttentionSizes:
    """What one rank's attention works on; packed: THD documents rather than rows."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    packed: bool


def check_fused_attention(sizes: AttentionSizes) -> None:
    """Run a few tokens through `transformer_engine.pytorch.DotProductAttention` with its slow fallback forbidden.

    Transformer Engine says nothing when it falls back, and has no context parallelism there.

    Raises:
        RuntimeError: no fused or flash attention takes these sizes here; the message says what to look at.
    """
    from transformer_engine.pytorch import DotProductAttention

    tokens = 64
    attention = DotProductAttention(
        sizes.heads,
        sizes.head_dim,
        num_gqa_groups=sizes.kv_heads,
        attention_dropout=0.0,
        attn_mask_type="padding_causal" if sizes.packed else "causal",
        qkv_format="thd" if sizes.packed else "sbhd",
    )
    shape = (tokens,) if sizes.packed else (tokens, 1)
    # Zeros: the random state of the run stays as it is.
    query, key, value = (
        torch.zeros(*shape, heads, sizes.head_dim, dtype=sizes.dtype, device="cuda", requires_grad=True)
        for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    )
    documents: dict[str, torch.Tensor | int] = {}
    if sizes.packed:
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
        documents = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens}
        documents |= {"max_seqlen_q": tokens, "max_seqlen_kv": tokens}
    try:
        with _no_fallback():
            attention(query, key, value, **documents).sum().backward()
    except ValueError as error:
        raise RuntimeError(
            f"Transformer Engine has no fused attention for {sizes.heads} heads of {sizes.head_dim}, {sizes.kv_heads} "
            f"KV heads, {sizes.dtype} on this machine: {error} {_cudnn_advice()}Without one, attention is many times "
            "slower and has no context parallelism; accept that with --allow-slow-kernels"
        ) from error


@contextmanager
def _no_fallback() -> Iterator[None]:
    before = os.environ.get(SLOW)
    os.environ[SLOW] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SLOW]
        else:
            os.environ[SLOW] = before


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

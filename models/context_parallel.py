"""Which tokens a context-parallel rank holds.

A sequence is cut into 2 * CP chunks, and rank r gets the chunks r and 2 * CP - 1 - r: under a causal mask early and
late tokens then cost every rank the same. In BSHD the sequence is a row; in THD each document is cut by itself.
The order is Transformer Engine's (`thd_get_partitioned_indices`), so its attention and ours agree on it. Nothing
here waits for the device.

S tokens of a row (THD: T of all documents), B rows, N documents.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_alignment(*, cp_size: int, tp_size: int, sequence_parallel: bool) -> int:
    """What every THD document's padded length is a multiple of: 2 * CP chunks, each split over sequence parallelism."""
    chunks = 2 * cp_size if cp_size > 1 else 1
    return chunks * (tp_size if sequence_parallel else 1)


def partition_index(
    cp_rank: int, cp_size: int, *, length: int, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """Positions in the full sequence of the tokens that a rank holds, in the rank's order.

    Two documents of 8 and 4 tokens, two ranks, so 4 chunks of 2 and of 1 token:

        token      0 1 | 2 3 | 4 5 | 6 7 || 8 | 9 | 10 | 11
        chunk       0     1     2     3     0   1   2    3
        rank 0     0 1               6 7    8            11     -> [0, 1, 6, 7, 8, 11]
        rank 1           2 3   4 5              9  10           -> [2, 3, 4, 5, 9, 10]

    In the code, for rank 0: `offset` 0..5 counts its tokens; `starts` [0, 4, 6] are where the documents' shares begin;
    within a share the first half is chunk 0, the second half skips the chunks 1 and 2.

    Args:
        length: S of the full sequence.
        cu_seqlens: [N + 1] int32 of documents whose lengths are multiples of 2 * cp_size; None for one sequence.

    Returns:
        [S / cp_size] int64.

    Raises:
        ValueError: length isn't a multiple of 2 * cp_size. (Documents aren't looked at: that would wait for them.)
    """
    if length % (2 * cp_size):
        raise ValueError(
            f"a sequence of {length} tokens can't be cut into 2 x {cp_size} chunks for context parallelism; "
            f"make --seq-length a multiple of {2 * cp_size}"
        )
    offset = torch.arange(length // cp_size, device=device)  # in the rank's tokens, then in the document's share
    start: Tensor | int = 0
    chunk: Tensor | int = length // (2 * cp_size)
    if cu_seqlens is not None:
        full_starts = cu_seqlens.long()
        starts = full_starts // cp_size
        document = torch.searchsorted(starts[1:], offset, right=True)
        offset = offset - starts[document]
        chunk = (starts[document + 1] - starts[document]) // 2
        start = full_starts[document]
    # The first half of a share is chunk r; the second, already one chunk in, is chunk 2 * CP - 1 - r.
    skipped = torch.where(offset < chunk, cp_rank, 2 * cp_size - 2 - cp_rank)
    return start + offset + skipped * chunk


def gathered_index(cp_size: int, *, length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """The inverse: [S] int64 such that the ranks' parts, one after another, taken by it are the full sequence."""
    parts = [
        partition_index(rank, cp_size, length=length, cu_seqlens=cu_seqlens, device=device) for rank in range(cp_size)
    ]
    return torch.cat(parts).argsort()

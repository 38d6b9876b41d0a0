"""Which tokens a context-parallel rank holds, and which images it encodes.

A sequence is cut into 2 * CP chunks, and rank r gets the chunks r and 2 * CP - 1 - r: under a causal mask early and
late tokens then cost every rank the same. In BSHD the sequence is a row; in THD each document is cut by itself.
The order is Transformer Engine's (`thd_get_partitioned_indices`), so its attention and ours agree on it. Nothing
here waits for the device.

Images are spread over the ranks whoever holds their tokens: each is encoded once, and the ranks' features are gathered
(`models.base.gather_features`).

S tokens of a row (THD: T of all documents), B rows, N documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

if TYPE_CHECKING:
    from data.batch import Batch


def document_alignment(*, cp_size: int, tp_size: int, sequence_parallel: bool) -> int:
    """What every THD document's padded length is a multiple of: 2 * CP chunks, each split over sequence parallelism."""
    chunks = 2 * cp_size if cp_size > 1 else 1
    return chunks * (tp_size if sequence_parallel else 1)


def partition_index(
    cp_rank: int, cp_size: int, *, length: int, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """Places in the full sequence of the tokens that a rank holds, in the rank's order.

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


def partition_images(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Spread images over ranks: the costliest first, each to the rank with the least so far.

    The costliest rank gets at most 4/3 - 1/(3 * ranks) of what the best spread gives it (Graham, "Bounds on
    multiprocessing timing anomalies", 1969). Computed alike everywhere, so that no rank has to be told.

    Args:
        costs: of each image, in any unit.

    Returns:
        The images of each rank, in ascending order; some may have none.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for image in sorted(range(len(costs)), key=lambda image: -costs[image]):
        rank = min(range(ranks), key=lambda rank: (loads[rank], len(shares[rank])))
        loads[rank] += costs[image]
        shares[rank].append(image)
    return [sorted(share) for share in shares]


def partition_batch(batch: Batch, cp_group: ProcessGroup) -> Batch:
    """This rank's tokens of a batch, and its images where they are shared.

    cu_seqlens and the statistics stay the whole batch's.

    Raises:
        ValueError: the images are shared by another number of ranks, or the tokens can't be cut.
    """
    vision = batch.vision
    if vision is not None and batch.feature_rows is not None:
        if len(vision) != cp_group.size():
            raise ValueError(f"images shared by {len(vision)} ranks in a context-parallel group of {cp_group.size()}")
        vision = (vision[cp_group.rank()],)
    if cp_group.size() == 1:
        return batch
    index = partition_index(
        cp_group.rank(),
        cp_group.size(),
        length=batch.input_ids.size(-1),
        cu_seqlens=batch.cu_seqlens,
        device=batch.input_ids.device,
    )
    return replace(
        batch,
        input_ids=batch.input_ids.index_select(-1, index),
        labels=batch.labels.index_select(-1, index),
        loss_mask=batch.loss_mask.index_select(-1, index),
        padding_mask=batch.padding_mask.index_select(-1, index),
        position_ids=batch.position_ids.index_select(-1, index),
        vision_index=batch.vision_index.index_select(-1, index),
        vision=vision,
    )

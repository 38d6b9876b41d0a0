"""What `linear_cross_entropy` does to a chunk of logits, as two Triton kernels: each reads the chunk once.

torch's own operations would go through the chunk six times forward and five times backward. R rows, C columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 4096  # per step of a program
_WARPS = 8


def add_chunk(
    logits: Tensor, columns: Tensor, start: int, maximum: Tensor, total: Tensor, target: Tensor, best: Tensor
) -> None:
    """Take a chunk into the rows' statistics, in place; see `linear_cross_entropy._Statistics`.

    Args:
        logits: [R, C] contiguous; 16 or 32 bits.
        columns: [R] int64, the labels' columns; outside of the chunk for most.
        start: the chunk's first column.
        maximum, total, target: [R] float32.
        best: [R] int64.
    """
    if logits.numel():
        _add_chunk[(logits.size(0),)](
            logits, columns, start, logits.size(1), maximum, total, target, best, BLOCK=_COLUMNS, num_warps=_WARPS
        )


def logits_to_grads(logits: Tensor, columns: Tensor, start: int, maximum: Tensor, total: Tensor, scale: Tensor) -> None:
    """Replace logits by scale * (softmax - one at the label), in place.

    Args:
        logits: [R, C] contiguous; 16 or 32 bits.
        columns: [R] int64, the labels' columns.
        start: the chunk's first column.
        maximum, total: [R] float32, largest logit of the whole vocabulary and sum of exp(logit - maximum).
        scale: [R] float32, gradient of each row's loss; a row with 0 becomes zeros whatever it holds.
    """
    if logits.numel():
        grid = (logits.size(0), triton.cdiv(logits.size(1), _COLUMNS))
        _logits_to_grads[grid](
            logits, columns, start, logits.size(1), maximum, total, scale, BLOCK=_COLUMNS, num_warps=_WARPS
        )


@triton.jit(do_not_specialize=["start", "width"])
def _add_chunk(  # type: ignore[no-untyped-def]  # Triton types it by its arguments
    logits, columns, start, width, maximum, total, target, best, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * width
    largest = tl.load(maximum + row)
    weight = tl.load(total + row)
    winner = tl.load(best + row)
    for first in range(0, width, BLOCK):
        places = first + tl.arange(0, BLOCK)
        values = tl.load(base + places, mask=places < width, other=-float("inf")).to(tl.float32)
        of_block = tl.max(values, axis=0)
        # The first of equal logits, in the block and over blocks.
        place = tl.min(tl.where(values == of_block, places, width), axis=0)
        winner = tl.where(of_block > largest, (start + place).to(tl.int64), winner)
        new = tl.maximum(largest, of_block)
        weight = weight * tl.exp(largest - new) + tl.sum(tl.exp(values - new), axis=0)
        largest = new
    tl.store(maximum + row, largest)
    tl.store(total + row, weight)
    tl.store(best + row, winner)
    label = tl.load(columns + row) - start
    if (label >= 0) & (label < width):
        tl.store(target + row, tl.load(base + label).to(tl.float32))


@triton.jit(do_not_specialize=["start", "width"])
def _logits_to_grads(  # type: ignore[no-untyped-def]  # Triton types it by its arguments
    logits, columns, start, width, maximum, total, scale, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    address = logits + row.to(tl.int64) * width + places
    inside = places < width
    factor = tl.load(scale + row)
    label = tl.load(columns + row) - start
    values = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    grads = tl.exp(values - tl.load(maximum + row)) / tl.load(total + row) - tl.where(places == label, 1.0, 0.0)
    grads = tl.where(factor == 0.0, 0.0, grads * factor)
    tl.store(address, grads.to(logits.dtype.element_ty), mask=inside)

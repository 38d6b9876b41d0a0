"""Context-parallel partition against a plain reference, Megatron's own for BSHD, and its inverse."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from megatron.core.utils import get_batch_on_this_cp_rank
from toy_data import PAD, ToyInputs, sample

from data.batch import Batch, collate, partition_batch, partition_images
from models.context_parallel import (
    document_alignment,
    gathered_index,
    partition_index,
)

CPU = torch.device("cpu")


def plain_zigzag(lengths: list[int], cp_rank: int, cp_size: int) -> list[int]:
    """For each document, its chunks r and 2 * CP - 1 - r."""
    places: list[int] = []
    start = 0
    for length in lengths:
        size = length // (2 * cp_size)
        for chunk in (cp_rank, 2 * cp_size - 1 - cp_rank):
            places += range(start + chunk * size, start + (chunk + 1) * size)
        start += length
    return places


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("chunks", [[1], [5], [1, 1, 1], [2, 7, 1, 3], [3, 0, 4]])
def test_thd_partition_equals_the_plain_one(cp_size: int, chunks: list[int]) -> None:
    lengths = [count * 2 * cp_size for count in chunks]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    for rank in range(cp_size):
        index = partition_index(rank, cp_size, length=sum(lengths), cu_seqlens=cu_seqlens, device=CPU)
        assert index.dtype == torch.int64
        assert index.tolist() == plain_zigzag(lengths, rank, cp_size)


def test_thd_partition_by_hand() -> None:
    """Documents of 8 and 4 tokens on 2 ranks; the order of Transformer Engine's thd_get_partitioned_indices."""
    cu_seqlens = torch.tensor([0, 8, 12], dtype=torch.int32)
    parts = [partition_index(rank, 2, length=12, cu_seqlens=cu_seqlens, device=CPU).tolist() for rank in (0, 1)]
    assert parts == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]


class Group:
    """What a partition asks of a process group, for a rank that has no others."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def batch(packed: bool, cp_size: int, vision_ranks: int = 1) -> Batch:
    alignment = document_alignment(cp_size=cp_size, tp_size=1, sequence_parallel=False)
    samples = [sample(list(range(10, 10 + length)), [1] * length, name=f"toy/{length}") for length in (11, 3, 16)] + [
        sample([7] * 9 + [9, 9, 8], [1] * 12, [[1, 2, 4]])
    ]
    return collate(
        [[one] for one in samples],
        ToyInputs(),
        alignment=alignment,
        packed=packed,
        seq_len=24,
        dtype=torch.float32,
        pad_token_id=PAD,
        context_ranks=cp_size,
        vision_ranks=vision_ranks,
    )


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_each_rank_knows_its_trained_rows(packed: bool, cp_size: int) -> None:
    whole = batch(packed, cp_size)
    borders = whole.cu_seqlens.tolist() if packed else [0, whole.input_ids.size(1)]
    mask, further = whole.loss_mask, ToyInputs.further_tokens
    assert whole.trained_rows.shape[:2] == (cp_size, 1 + further)
    for depth in range(1 + further):
        for rank in range(cp_size):
            mine = partition_batch(replace(whole, loss_mask=mask), Group(rank, cp_size))
            rows = mine.trained_rows[0, depth]
            assert rows[rows >= 0].tolist() == mine.loss_mask.flatten().nonzero().flatten().tolist()
            assert (rows[(rows >= 0).sum() :] == -1).all()
        # One token on inside each document.
        moved = [F.pad(mask[:, a + 1 : b], (0, 1)) for a, b in pairwise(borders)]
        mask = torch.cat(moved, dim=1)


def test_a_batch_without_a_trained_token_has_a_row_of_padding() -> None:
    empty = collate(
        [[sample([5, 6], [0, 0])]],
        ToyInputs(),
        alignment=1,
        packed=True,
        seq_len=8,
        dtype=torch.float32,
        pad_token_id=PAD,
    )
    assert empty.trained_rows.shape == (1, 3, 64)
    assert (empty.trained_rows == -1).all()


@pytest.mark.parametrize("cp_size", [2, 4])
def test_bshd_partition_equals_megatrons(cp_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group.size())
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: group.rank())
    whole = batch(packed=False, cp_size=cp_size)
    for rank in range(cp_size):
        group = Group(rank, cp_size)
        ours = partition_batch(whole, group)
        sequences = {name: getattr(whole, name) for name in SEQUENCE_FIELDS if name != "position_ids"}
        theirs = get_batch_on_this_cp_rank({**sequences, "cu_seqlens": None}, is_hybrid_cp=False, cp_group=group)
        for name in sequences:
            assert torch.equal(getattr(ours, name), theirs[name]), name
        for axis in range(3):
            rows = get_batch_on_this_cp_rank(
                {"position_ids": whole.position_ids[axis], "cu_seqlens": None}, is_hybrid_cp=False, cp_group=group
            )
            assert torch.equal(ours.position_ids[axis], rows["position_ids"])


SEQUENCE_FIELDS = ("input_ids", "labels", "loss_mask", "padding_mask", "position_ids", "vision_index")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cp_size", [2, 4])
def test_the_ranks_parts_are_the_batch(packed: bool, cp_size: int) -> None:
    whole = batch(packed, cp_size)
    length = whole.input_ids.size(1)
    back = gathered_index(cp_size, length=length, cu_seqlens=whole.cu_seqlens, device=CPU)
    parts = [partition_batch(whole, Group(rank, cp_size)) for rank in range(cp_size)]
    for name in SEQUENCE_FIELDS:
        joined = torch.cat([getattr(part, name) for part in parts], dim=-1)
        assert joined.size(-1) == length
        assert not torch.equal(joined, getattr(whole, name)), name
        assert torch.equal(joined[..., back], getattr(whole, name)), name
    for part in parts:
        for field in fields(Batch):
            if field.name not in (*SEQUENCE_FIELDS, "trained_rows"):
                assert getattr(part, field.name) is getattr(whole, field.name)


def test_one_rank_keeps_its_batch() -> None:
    whole = batch(packed=True, cp_size=1)
    assert partition_batch(whole, Group(0, 1)) is whole


def test_a_length_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"24 tokens can't be cut into 2 x 5 chunks.*--seq-length a multiple of 10"):
        partition_batch(batch(packed=False, cp_size=1), Group(0, 5))


def test_partition_never_waits_for_the_device() -> None:
    """On the meta device, whatever reads a value fails."""
    meta = torch.device("meta")
    cu_seqlens = torch.empty(5, dtype=torch.int32, device=meta)
    assert partition_index(0, 2, length=32, cu_seqlens=cu_seqlens, device=meta).shape == (16,)
    assert partition_index(1, 2, length=32, cu_seqlens=None, device=meta).shape == (16,)


@pytest.mark.parametrize(
    ("cp_size", "tp_size", "sequence_parallel", "alignment"),
    [(1, 1, False, 1), (1, 4, False, 1), (1, 4, True, 4), (2, 1, False, 4), (2, 4, False, 4), (2, 4, True, 16)],
)
def test_document_alignment(cp_size: int, tp_size: int, sequence_parallel: bool, alignment: int) -> None:
    assert document_alignment(cp_size=cp_size, tp_size=tp_size, sequence_parallel=sequence_parallel) == alignment


@pytest.mark.parametrize(
    ("costs", "ranks", "shares"),
    [
        ([], 2, [[], []]),
        ([5], 3, [[0], [], []]),
        ([1, 9, 1, 1], 2, [[1], [0, 2, 3]]),  # one huge image
        ([3, 3, 2, 2, 2], 2, [[0, 2, 4], [1, 3]]),
        ([0, 0, 0, 0, 0], 2, [[0, 2, 4], [1, 3]]),  # an architecture that doesn't count its encoder
        ([4, 4, 4], 1, [[0, 1, 2]]),
    ],
)
def test_images_go_to_the_rank_with_the_least(costs: list[float], ranks: int, shares: list[list[int]]) -> None:
    assert partition_images(costs, ranks) == shares


def test_each_rank_keeps_its_images() -> None:
    shared = batch(packed=True, cp_size=2, vision_ranks=2)
    for rank in range(2):
        assert partition_batch(shared, Group(rank, 2)).vision == (shared.vision[rank],)


def test_a_batch_for_other_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch for 4 context-parallel ranks in a group of 2"):
        partition_batch(batch(packed=True, cp_size=4), Group(0, 2))


@pytest.mark.parametrize("cp_size", [1, 4])
def test_images_shared_by_another_number_of_ranks_are_refused(cp_size: int) -> None:
    with pytest.raises(ValueError, match=f"images shared by 2 ranks in a context-parallel group of {cp_size}"):
        partition_batch(batch(packed=True, cp_size=4, vision_ranks=2), Group(0, cp_size))

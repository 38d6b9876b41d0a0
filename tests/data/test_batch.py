"""Batches against lists written by hand. ids: 9 is an image token (2 x 2 patches), 99 padding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_data import PAD, ToyInputs, sample

from data.batch import Batch, collate, flatten, unflatten
from data.reader import HEADER_BYTES
from data.sample import Sample
from models.qwen35_vl.configuration import VARIANTS
from models.qwen35_vl.inputs import Qwen35VLInputs

# Three documents: an image in the middle, one token, two images side by side of unequal grids.
MIDDLE = sample([5, 9, 6, 7], [0, 0, 1, 1], [[1, 2, 2]], name="toy/middle", first_pixel=100)
ONE = sample([8], [1], name="toy/one")
ADJACENT = sample([9, 9, 9, 4, 3], [0, 0, 0, 0, 1], [[1, 4, 2], [1, 2, 2]], name="toy/adjacent", first_pixel=200)


def make(packs: Sequence[Sequence[Sample]], **changes: object) -> Batch:
    arguments = {
        "alignment": 1,
        "packed": True,
        "seq_len": 8,
        "dtype": torch.float32,
        "pad_token_id": PAD,
    } | changes
    return collate(packs, ToyInputs(), **arguments)


def check(batch: Batch, **expected: list) -> None:
    for name, value in expected.items():
        assert getattr(batch, name).tolist() == value, name


def test_thd_row() -> None:
    batch = make([[MIDDLE, ONE], [ADJACENT]])
    check(
        batch,
        input_ids=[[5, 9, 6, 7, 8, 9, 9, 9, 4, 3]],
        labels=[[9, 6, 7, PAD, PAD, 9, 9, 4, 3, PAD]],
        loss_mask=[[0, 1, 1, 0, 0, 0, 0, 0, 1, 0]],
        padding_mask=[[False] * 10],
        vision_index=[[-1, 0, -1, -1, -1, 1, 2, 3, -1, -1]],
        cu_seqlens=[0, 4, 5, 10],
    )
    assert batch.position_ids.tolist() == [
        [[0, 1, 2, 3, 0, 0, 1, 2, 3, 4]],
        [[0, 10, 20, 30, 0, 0, 10, 20, 30, 40]],
        [[0, 100, 200, 300, 0, 0, 100, 200, 300, 400]],
    ]
    assert batch.max_seqlen == 5
    assert batch.vision[0]["pixel_values"][:, 0].tolist() == [*range(100, 104), *range(200, 212)]
    assert batch.vision[0]["cu_seqlens"].tolist() == [0, 4, 12, 16]
    assert batch.vision[0]["max_seqlen"] == 8
    stats = batch.stats
    assert (stats.documents, stats.tokens, stats.trained_tokens, stats.padding_tokens) == (3, 10, 3, 0)
    assert (stats.images, stats.patches, stats.flops) == (3, 16, 16 + 1 + 25 + 16)


def test_thd_documents_are_padded_to_the_alignment() -> None:
    batch = make([[MIDDLE, ONE, ADJACENT]], alignment=4)
    check(
        batch,
        input_ids=[[5, 9, 6, 7, 8, PAD, PAD, PAD, 9, 9, 9, 4, 3, PAD, PAD, PAD]],
        labels=[[9, 6, 7, PAD, PAD, PAD, PAD, PAD, 9, 9, 4, 3, PAD, PAD, PAD, PAD]],
        loss_mask=[[0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]],
        padding_mask=[[False] * 5 + [True] * 3 + [False] * 5 + [True] * 3],
        vision_index=[[-1, 0, -1, -1, -1, -1, -1, -1, 1, 2, 3, -1, -1, -1, -1, -1]],
        cu_seqlens=[0, 4, 8, 16],
    )
    assert batch.position_ids[0].tolist() == [[0, 1, 2, 3, 0, 0, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0]]
    assert batch.max_seqlen == 8
    assert (batch.stats.tokens, batch.stats.padding_tokens) == (10, 6)
    assert batch.stats.flops == 16 + 1 + 25 + 16  # padding apart


def test_bshd_rows() -> None:
    batch = make([[MIDDLE], [ADJACENT]], packed=False, seq_len=6, alignment=4)
    check(
        batch,
        input_ids=[[5, 9, 6, 7, PAD, PAD], [9, 9, 9, 4, 3, PAD]],
        labels=[[9, 6, 7, PAD, PAD, PAD], [9, 9, 4, 3, PAD, PAD]],
        loss_mask=[[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]],
        padding_mask=[[False] * 4 + [True] * 2, [False] * 5 + [True]],
        vision_index=[[-1, 0, -1, -1, -1, -1], [1, 2, 3, -1, -1, -1]],
    )
    assert batch.position_ids.tolist() == [
        [[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 0]],
        [[0, 10, 20, 30, 0, 0], [0, 10, 20, 30, 40, 0]],
        [[0, 100, 200, 300, 0, 0], [0, 100, 200, 300, 400, 0]],
    ]
    assert batch.cu_seqlens is None
    assert batch.max_seqlen == 6
    assert (batch.stats.tokens, batch.stats.padding_tokens, batch.stats.flops) == (9, 3, 16 + 25 + 16)


def test_dtypes() -> None:
    batch = make([[MIDDLE]], dtype=torch.bfloat16)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.vision_index.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32
    assert batch.padding_mask.dtype == torch.bool
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.vision[0]["pixel_values"].dtype == torch.bfloat16


def test_the_feature_at_an_index_is_the_placeholders() -> None:
    """Pixel rows tell which sample and patch a feature was made of."""
    batch = make([[ADJACENT, ONE], [MIDDLE]])
    features = batch.vision[0]["pixel_values"][:, 0].view(-1, 4).mean(-1)  # one merged patch: 4 rows
    placeholders = batch.vision_index[0] >= 0
    assert (batch.input_ids[0][placeholders] == ToyInputs.image_token_id).all()
    assert features[batch.vision_index[0][placeholders]].tolist() == [201.5, 205.5, 209.5, 101.5]


def test_without_an_image_the_encoder_gets_one_merged_patch_of_zeros() -> None:
    batch = make([[ONE]], dtype=torch.bfloat16)
    assert batch.vision_index.tolist() == [[-1]]
    assert batch.vision[0]["pixel_values"].shape == (4, 3)
    assert batch.vision[0]["pixel_values"].dtype == torch.bfloat16
    assert not batch.vision[0]["pixel_values"].any()
    assert batch.vision[0]["cu_seqlens"].tolist() == [0, 4]
    assert (batch.stats.images, batch.stats.patches, batch.stats.flops) == (0, 0, 1)


def test_ranks_share_the_images() -> None:
    """ADJACENT's first image (8 patches) against the two of 4: a rank each; the index follows the images there."""
    batch = make([[MIDDLE, ONE], [ADJACENT]], vision_ranks=2)
    first, second = batch.vision
    assert first["pixel_values"][:, 0].tolist() == [*range(200, 208)]
    assert second["pixel_values"][:, 0].tolist() == [*range(100, 104), *range(208, 212)]
    assert (first["cu_seqlens"].tolist(), second["cu_seqlens"].tolist()) == ([0, 8], [0, 4, 8])
    assert batch.feature_rows == 2
    check(batch, vision_index=[[-1, 2, -1, -1, -1, 0, 1, 3, -1, -1]])
    stats = batch.stats
    assert (stats.images, stats.patches, stats.busiest_patches, stats.mean_patches) == (3, 16, 8, 8.0)
    assert_equal(unflatten(flatten(batch)), batch)


def test_more_ranks_than_images() -> None:
    """Ranks without an image encode a patch of zeros, whose features no token reads."""
    batch = make([[ADJACENT]], vision_ranks=3)
    assert [share["pixel_values"].size(0) for share in batch.vision] == [8, 4, 4]
    assert not batch.vision[2]["pixel_values"].any()
    assert batch.feature_rows == 2
    check(batch, vision_index=[[0, 1, 2, -1, -1]])
    assert (batch.stats.patches, batch.stats.busiest_patches, batch.stats.mean_patches) == (12, 8, 16 / 3)


def test_ranks_share_no_image() -> None:
    batch = make([[ONE]], vision_ranks=2)
    assert [share["pixel_values"].size(0) for share in batch.vision] == [4, 4]
    assert batch.feature_rows == 1
    assert batch.vision_index.tolist() == [[-1]]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shared_features_reach_the_same_tokens(ranks: int, packed: bool) -> None:
    """Each feature is the number of its first pixel row: gathered from any number of ranks, the tokens see the same."""
    packs = [[ADJACENT], [MIDDLE], [ONE], [sample([9] * 6 + [1], [1] * 7, [[1, 2, 2], [2, 2, 4], [1, 2, 2]])]]
    batch, alone = (make(packs, packed=packed, vision_ranks=n) for n in (ranks, 1))
    assert alone.feature_rows is None
    rows = alone.vision[0]["pixel_values"].size(0) // 4 if ranks == 1 else batch.feature_rows
    gathered = torch.full((ranks, rows), torch.nan)
    for rank, share in enumerate(batch.vision):
        features = share["pixel_values"][::4, 0]
        gathered[rank, : len(features)] = features
    placeholders = alone.vision_index >= 0
    assert torch.equal(batch.vision_index >= 0, placeholders)
    expected = alone.vision[0]["pixel_values"][::4, 0][alone.vision_index[placeholders]]
    assert torch.equal(gathered.flatten()[batch.vision_index[placeholders]], expected)


def test_the_header_of_many_ranks_fits() -> None:
    """As many ranks as the architecture's key heads allow."""
    inputs = Qwen35VLInputs(VARIANTS["397b_a17b"])
    batch = collate(
        [[replace(ONE, pixel_values=torch.zeros(0, inputs.patch_dim))]],
        inputs,
        alignment=32,
        packed=True,
        seq_len=32,
        dtype=torch.bfloat16,
        pad_token_id=PAD,
        vision_ranks=VARIANTS["397b_a17b"].linear_num_key_heads,
    )
    assert len(flatten(batch).header) < HEADER_BYTES / 2  # numbers of real batches are longer


def test_the_first_token_of_a_document_is_nobodys_target() -> None:
    """`trained` marks it, but no token before it in its document predicts it."""
    batch = make([[sample([1, 2], [1, 1]), sample([3, 4], [1, 1])]])
    check(batch, labels=[[2, PAD, 4, PAD]], loss_mask=[[1, 0, 1, 0]])
    assert batch.stats.trained_tokens == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (sample([1] * 9, [1] * 9, name="toy/bad"), "toy/bad: 9 tokens; .* at most --seq-length 8"),
        (sample([], [], name="toy/bad"), "toy/bad: 0 tokens; .* at least 1"),
        (sample([1, 2], [1], name="toy/bad"), "toy/bad: 1 marks of trained tokens for 2 tokens"),
        (
            sample([9, 9, 1], [0, 0, 1], [[1, 2, 2]], name="toy/bad"),
            r"toy/bad: 2 image tokens \(id 9\) for 1 features of its image grids \[\[1, 2, 2\]\]",
        ),
        (
            replace(MIDDLE, pixel_values=torch.zeros(3, 3)),
            r"toy/middle: pixel_values are \(3, 3\); .* say \(4, 3\)",
        ),
        (
            replace(MIDDLE, pixel_values=torch.zeros(4, 5)),
            r"toy/middle: pixel_values are \(4, 5\); .* say \(4, 3\)",
        ),
    ],
)
def test_a_sample_that_contradicts_itself_is_refused_by_name(bad: Sample, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([[ONE, bad]])


@pytest.mark.parametrize("packed", [True, False])
def test_flat_batches_hold_everything(packed: bool) -> None:
    batch = make([[MIDDLE], [ONE], [ADJACENT]], packed=packed, dtype=torch.bfloat16)
    flat = flatten(batch)
    assert flat.buffer.dtype == torch.uint8 and flat.buffer.dim() == 1
    again = unflatten(flat)
    assert_equal(again, batch)
    storage = flat.buffer.untyped_storage().data_ptr()
    assert again.input_ids.untyped_storage().data_ptr() == storage  # views, not copies
    assert again.vision[0]["pixel_values"].untyped_storage().data_ptr() == storage


def test_batches_are_saved_by_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False
    )  # set by runtime/patches.py; this file is our own
    batch = unflatten(flatten(make([[MIDDLE], [ONE]])))
    torch.save(batch, tmp_path / "batch.pt")
    assert_equal(torch.load(tmp_path / "batch.pt", weights_only=False), batch)


def test_a_copy_shares_the_tensors() -> None:
    batch = make([[MIDDLE]])
    copied = copy.copy(batch)
    assert copied is not batch
    assert copied.vision[0]["pixel_values"] is batch.vision[0]["pixel_values"]


def test_a_stage_without_the_encoder_gets_no_pixels() -> None:
    batch = make([[MIDDLE]])
    elsewhere = make([[replace(MIDDLE, pixel_values=torch.zeros(0, 3))]], with_vision=False)
    flat = flatten(elsewhere)
    assert unflatten(flat).vision is None
    assert_equal(unflatten(flat), replace(batch, vision=None))
    assert flat.buffer.nbytes < flatten(batch).buffer.nbytes


def assert_equal(left: Batch, right: Batch) -> None:
    for name in ("input_ids", "labels", "loss_mask", "padding_mask", "position_ids", "vision_index", "cu_seqlens"):
        one, other = getattr(left, name), getattr(right, name)
        if other is None:
            assert one is None
        else:
            assert one.dtype == other.dtype and torch.equal(one, other), name
    assert (left.max_seqlen, left.feature_rows, left.stats) == (right.max_seqlen, right.feature_rows, right.stats)
    assert (left.vision is None) == (right.vision is None)
    for one, other in zip(left.vision or (), right.vision or (), strict=True):
        assert one.keys() == other.keys()
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert torch.equal(one["cu_seqlens"], other["cu_seqlens"])
        assert one["max_seqlen"] == other["max_seqlen"]

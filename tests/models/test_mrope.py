"""MRoPE positions against transformers' get_rope_index, angles against its rotary module."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from models.common.mrope import InterleavedMRoPE, position_ids
from models.qwen35_vl.configuration import VARIANTS
from tests.hf_reference import IMAGE, VIDEO, hf_config, modeling_qwen3_5, token_types

TINY = VARIANTS["tiny"]
IDS = TINY.token_ids
MERGE = TINY.vision.spatial_merge_size
LAYOUTS = 200


class _RopeIndex:
    """get_rope_index reads nothing of Qwen3_5Model but its config."""

    config = hf_config(TINY)
    get_rope_index = modeling_qwen3_5.Qwen3_5Model.get_rope_index
    get_vision_position_ids = modeling_qwen3_5.Qwen3_5Model.get_vision_position_ids


def hf_positions(input_ids: Tensor, images: list[list[int]], videos: list[list[int]]) -> Tensor:
    positions, _ = _RopeIndex().get_rope_index(
        input_ids[None],
        token_types(input_ids, TINY)[None],
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
    )
    return positions[:, 0]


def tokens_of(grid: list[int]) -> int:
    return grid[0] * grid[1] * grid[2] // MERGE**2


def random_layout(seed: int) -> tuple[list[int], list[list[int]], list[int]]:
    """A document: token ids, grids in document order, and the kind of each grid."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    tokens: list[int] = []
    grids, kinds = [], []
    wrap = bool(draw(0, 1))  # with vision_start and vision_end, or bare: media first and last in the document

    def text(low: int) -> None:
        tokens.extend(draw(1, 1000) for _ in range(draw(low, 9)))

    def run(token: int, count: int) -> None:
        tokens.extend([IDS.vision_start] * wrap + [token] * count + [IDS.vision_end] * wrap)

    text(0)
    for _ in range(draw(0, 6)):
        kind = VIDEO if draw(0, 3) == 0 else IMAGE
        # HF sees a run of one kind as one image: bare ones need text between them, wrapped ones may be adjacent.
        text(0 if wrap or not tokens else 1)
        grid = [draw(1, 3) if kind == VIDEO or draw(0, 4) == 0 else 1, MERGE * draw(1, 7), MERGE * draw(1, 7)]
        grids.append(grid)
        kinds.append(kind)
        if kind == IMAGE:
            run(IDS.image, tokens_of(grid))
            continue
        for frame in range(grid[0]):
            if frame:
                text(1)  # the timestamp
            run(IDS.video, tokens_of([1, *grid[1:]]))
    if not tokens or draw(0, 1):
        text(1)
    return tokens, grids, kinds


def positions_of(tokens: list[int], grids: list[list[int]]) -> Tensor:
    return position_ids(
        torch.tensor(tokens),
        torch.tensor(grids, dtype=torch.int64).view(-1, 3),
        image_token_id=IDS.image,
        video_token_id=IDS.video,
        spatial_merge_size=MERGE,
    )


def test_positions_equal_hf_on_random_layouts():
    seen = set()
    for seed in range(LAYOUTS):
        tokens, grids, kinds = random_layout(seed)
        images = [grid for grid, kind in zip(grids, kinds, strict=True) if kind == IMAGE]
        videos = [grid for grid, kind in zip(grids, kinds, strict=True) if kind == VIDEO]
        expected = hf_positions(torch.tensor(tokens), images, videos)
        assert torch.equal(positions_of(tokens, grids), expected), (seed, grids, kinds)
        seen.add((min(len(images), 2), min(len(videos), 2)))
        seen.update({("first", tokens[0] == IDS.image), ("last", tokens[-1] == IDS.image)})
        ends = [IDS.image, IDS.vision_end, IDS.vision_start, IDS.image]
        seen.add(("adjacent", any(tokens[i : i + 4] == ends for i in range(len(tokens)))))
    # The draw holds what it should: none, one and several of each kind, an image first, last, next to another.
    assert seen >= {(images, videos) for images in range(3) for videos in range(3)}
    assert seen >= {("first", True), ("last", True), ("adjacent", True)}


@pytest.mark.parametrize(
    ("tokens", "grids", "expected"),
    [
        ([5, 6, 7], [], [[0, 1, 2]] * 3),
        # One image of 2 x 3 merged patches between text: text goes on after its larger side.
        (
            [5, *[IDS.image] * 6, 7],
            [[1, 2 * MERGE, 3 * MERGE]],
            [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]],
        ),
        # A video of two frames, a timestamp between them: each frame starts where the text before it ended.
        (
            [*[IDS.video] * 2, 9, *[IDS.video] * 2],
            [[2, MERGE, 2 * MERGE]],
            [[0, 0, 2, 3, 3], [0, 0, 2, 3, 3], [0, 1, 2, 3, 4]],
        ),
    ],
)
def test_positions_by_hand(tokens: list[int], grids: list[list[int]], expected: list[list[int]]):
    assert positions_of(tokens, grids).tolist() == expected


@pytest.mark.parametrize(
    ("tokens", "grids", "message"),
    [
        ([5, IDS.image], [], "1 runs of image placeholders for 0 image grids"),
        ([5], [[1, 4, 4]], "0 runs of image placeholders for 1 image grids"),
        ([5, IDS.image], [[1, 4, 4]], r"run 0 .* has 1 tokens; its grid of \[1, 2, 2\] merged patches needs 4"),
        ([IDS.video], [[2, 2, 2]], "leave 0 grids and 1 video frames over"),
        ([IDS.video, 5, IDS.video], [[1, 2, 2]], "2 runs of placeholders are more than 1 grids have"),
    ],
)
def test_placeholders_that_do_not_match_the_grids_are_refused(tokens: list[int], grids: list[list[int]], message: str):
    with pytest.raises(ValueError, match=message):
        positions_of(tokens, grids)


@pytest.mark.parametrize("variant", ["tiny", "9b"])
def test_angles_equal_hf(variant: str):
    architecture = VARIANTS[variant]
    rotary = modeling_qwen3_5.Qwen3_5TextRotaryEmbedding(hf_config(architecture).text_config)
    positions = torch.randint(0, 30_000, (3, 2, 50), generator=torch.Generator().manual_seed(0))
    cos, sin = rotary(torch.zeros(1), positions)  # [B, S, D]

    ours = InterleavedMRoPE(architecture.kv_channels, architecture.rotary_percent, rotary_base=architecture.rotary_base)
    angles = ours(positions, architecture.mrope_section)
    assert angles.shape == (50, 2, 1, int(architecture.kv_channels * architecture.rotary_percent))
    assert angles.dtype == torch.float32
    assert torch.equal(angles.squeeze(2).transpose(0, 1).cos(), cos)
    assert torch.equal(angles.squeeze(2).transpose(0, 1).sin(), sin)


def test_a_section_that_does_not_fill_the_rotary_dimension_is_refused():
    ours = InterleavedMRoPE(TINY.kv_channels, TINY.rotary_percent, rotary_base=TINY.rotary_base)
    with pytest.raises(ValueError, match=r"mrope_section \(1, 1, 1\) sums to 3; the rotary dimension 8 needs 4"):
        ours(torch.zeros(3, 1, 1, dtype=torch.int64), dataclasses.replace(TINY, mrope_section=(1, 1, 1)).mrope_section)

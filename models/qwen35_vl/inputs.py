"""What Qwen3.5-VL computes from token ids and grids alone, in the loader's workers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from models.common.mrope import position_ids
from models.qwen35_vl.configuration import Qwen35VLConfig, Qwen35VLVisionConfig
from models.qwen35_vl.flops import FlopCount
from models.spec import BatchShape
from models.trained import EVERYTHING, Trained


@dataclass(frozen=True)
class Qwen35VLInputs:
    """`models.spec.ModelInputs` for Qwen3.5-VL; FLOPs are those of what is trained."""

    config: Qwen35VLConfig
    trained: Trained = EVERYTHING

    @cached_property
    def flop_count(self) -> FlopCount:
        return FlopCount.of(self.config, self.trained)

    @property
    def image_token_id(self) -> int:
        if self.config.language_model_only:
            return self.config.vocab_size  # no token stands for an image
        return self.config.token_ids.image

    @property
    def video_token_id(self) -> int:
        return self.image_token_id if self.config.language_model_only else self.config.token_ids.video

    @property
    def merge_size(self) -> int:
        return self.config.vision.spatial_merge_size

    @property
    def patch_dim(self) -> int:
        return self.config.vision.patch_dim

    @property
    def patch_size(self) -> int:
        return self.config.vision.patch_size

    @property
    def further_tokens(self) -> int:
        return self.config.mtp_num_layers

    def position_ids(self, input_ids: Tensor, grid_thw: Tensor) -> Tensor:
        return position_ids(
            input_ids,
            grid_thw,
            image_token_id=self.image_token_id,
            video_token_id=self.video_token_id,
            spatial_merge_size=self.merge_size,
        )

    def vision_inputs(self, grid_thw: Tensor) -> dict[str, Tensor | int]:
        return vision_inputs(grid_thw, self.config.vision)

    def pad_vision(self, vision: dict[str, Tensor | int], patches: int, frames: int) -> dict[str, Tensor | int] | None:
        return pad_vision_inputs(vision, patches, frames)

    def flops(self, shape: BatchShape) -> float:
        return self.flop_count.of_batch(shape)


def vision_inputs(grid_thw: Tensor, vision: Qwen35VLVisionConfig) -> dict[str, Tensor | int]:
    """What `VisionEncoder.forward` takes besides the pixels, from the grids alone. Runs in the loader's workers.

    Args:
        grid_thw: [I, 3] int64 patches in time, height and width, at least one image; height and width are
            multiples of the merge size.

    Returns:
        position_index: [P, 4] int64 rows of the position table around each patch.
        position_weight: [P, 4] float32 their bilinear weights.
        patch_position: [P, 2] int64 row and column of each patch in its image, for the 2D rotary.
        cu_seqlens: [F + 1] int32 where each frame begins; a frame is one attention segment.
        max_seqlen: patches of the largest frame.

    Raises:
        ValueError: a grid that the patch merger can't take, by its index.
    """
    merge = vision.spatial_merge_size
    for index, (time, height, width) in enumerate(grid_thw.tolist()):
        if min(time, height, width) < 1 or height % merge or width % merge:
            raise ValueError(
                f"grid {index} is {time} x {height} x {width} patches; height and width must be multiples of "
                f"the merge size {merge}"
            )
    position_index, position_weight = get_vision_interpolation_indices_and_weights(
        grid_thw,
        num_grid_per_side=round(vision.num_position_embeddings**0.5),
        mode="bilinear",
        align_corners=True,
        spatial_merge_size=merge,
    )
    return {
        "position_index": position_index,
        "position_weight": position_weight,
        "patch_position": get_vision_position_ids(grid_thw, merge),
        "cu_seqlens": get_vision_cu_seqlens(grid_thw),
        "max_seqlen": int((grid_thw[:, 1] * grid_thw[:, 2]).max()),
    }


def pad_vision_inputs(vision: dict[str, Tensor | int], patches: int, frames: int) -> dict[str, Tensor | int] | None:
    """`vision_inputs` and pixel_values of static sizes.

    The patches that are added are zeros in frames of their own, as many as they need to be no larger than the largest
    real one: attention costs the square of a frame. Frames that are still missing are empty.

    Returns:
        The arguments with [patches, ...] tensors, cu_seqlens [frames + 1], max_seqlen = patches; None where they
        don't fit.
    """
    borders, largest = vision["cu_seqlens"], vision["max_seqlen"]
    assert isinstance(borders, Tensor) and isinstance(largest, int)  # as `vision_inputs` makes them
    count = int(borders[-1])
    missing = patches - count
    added = [*range(count + largest, patches, largest), patches] if missing > 0 else []
    if missing < 0 or len(borders) - 1 + len(added) > frames:
        return None
    empty = frames + 1 - len(borders) - len(added)
    padded = {
        name: F.pad(value, (0, 0, 0, missing)) if isinstance(value, Tensor) and name != "cu_seqlens" else value
        for name, value in vision.items()
    }
    ends = torch.tensor(added + [patches] * empty, dtype=borders.dtype)
    return {**padded, "cu_seqlens": torch.cat([borders, ends]), "max_seqlen": patches}

"""What Qwen3.5-VL computes from token ids and grids alone, in the loader's workers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models.qwen35_vl.configuration import Qwen35VLConfig
from models.qwen35_vl.flops import batch_flops
from models.qwen35_vl.mrope import position_ids
from models.qwen35_vl.vision_encoder import vision_inputs
from models.spec import BatchShape


@dataclass(frozen=True)
class Qwen35VLInputs:
    """`models.spec.ModelInputs` for Qwen3.5-VL."""

    config: Qwen35VLConfig

    @property
    def image_token_id(self) -> int:
        return self.config.token_ids.image

    @property
    def merge_size(self) -> int:
        return self.config.vision.spatial_merge_size

    @property
    def patch_dim(self) -> int:
        vision = self.config.vision
        return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    @property
    def patch_size(self) -> int:
        return self.config.vision.patch_size

    def position_ids(self, input_ids: Tensor, grid_thw: Tensor) -> Tensor:
        return position_ids(input_ids, grid_thw, self.config.token_ids, self.merge_size)

    def vision_inputs(self, grid_thw: Tensor) -> dict[str, Tensor | int]:
        return vision_inputs(grid_thw, self.config.vision)

    def flops(self, shape: BatchShape) -> float:
        return batch_flops(self.config, shape)

"""One conversation, tokenised once: what packs and batches are made of.

Shape letters: L tokens of the sample, P patches, I images, D values of a patch (channels * temporal * patch²).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One conversation, ready to be packed.

    input_ids: [L] int64, image placeholders already expanded (one id per merged patch).
    trained: [L] bool, this token is a target (answer and `<|im_end|>`); data/batch.py does the shift.
    pixel_values: [P, D] in the training dtype, P may be 0.
    grid_thw: [I, 3] int64, patches in time, height and width of each image; I may be 0.
    id: names the sample in error messages, for example "receipts/train/17".
    """

    input_ids: Tensor
    trained: Tensor
    pixel_values: Tensor
    grid_thw: Tensor
    id: str

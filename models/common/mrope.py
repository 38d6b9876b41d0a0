"""Interleaved multimodal RoPE: a token's three positions (time, height, width) and its rotary angles.

Positions follow transformers' `Qwen3_5Model.get_rope_index`, angles its `Qwen3_5TextRotaryEmbedding`.
Shapes: L tokens of one document, I images or videos, R runs of equal modality, S sequence, B batch,
D rotary channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

TEXT, IMAGE, VIDEO = 0, 1, 2


def position_ids(
    input_ids: Tensor, grid_thw: Tensor, *, image_token_id: int, video_token_id: int, spatial_merge_size: int
) -> Tensor:
    """Positions of one document's tokens.

    Text counts on by one in all three axes. An image's placeholders keep the position where the image starts
    and add their own time, row and column in the merged grid; the text behind it goes on after the larger side
    of the grid. A video has one run of placeholders per frame (timestamps stand between them), and each frame
    is placed like an image.

    Tensor operations over all tokens at once: a document with a hundred images costs what one with none does.

    Args:
        input_ids: [L] int64 with placeholders expanded, one per merged patch.
        grid_thw: [I, 3] int64 patches in time, height and width, in the order in which they appear.
        image_token_id, video_token_id: the ids of the placeholders.
        spatial_merge_size: patches per side of a merged patch.

    Returns:
        [3, L] int64.

    Raises:
        ValueError: placeholders that don't match the grids, with the run and both counts.
    """
    modality = torch.zeros_like(input_ids)
    modality.masked_fill_(input_ids == image_token_id, IMAGE)
    modality.masked_fill_(input_ids == video_token_id, VIDEO)
    kinds, lengths = torch.unique_consecutive(modality, return_counts=True)
    is_text = kinds == TEXT

    # Text runs keep a grid of ones and never look at it.
    grids = torch.ones(kinds.numel(), 3, dtype=torch.int64)
    grids[~is_text] = _grid_of_each_run(kinds[~is_text].tolist(), grid_thw)
    grids[:, 1:] //= torch.where(is_text, 1, spatial_merge_size).unsqueeze(1)
    _check_run_lengths(lengths, grids, is_text)

    advance = torch.where(is_text, lengths, grids[:, 1:].amax(dim=1))
    start = advance.cumsum(0) - advance
    first_token = lengths.cumsum(0) - lengths

    run = torch.repeat_interleave(lengths)  # [L]: the run that each token is in
    within = torch.arange(input_ids.numel()) - first_token[run]
    height, width = grids[run, 1], grids[run, 2]
    axes = torch.stack((within // (height * width), within // width % height, within % width))
    return torch.where(is_text[run], within, axes) + start[run]


def _grid_of_each_run(kinds: Sequence[int], grid_thw: Tensor) -> Tensor:
    """[R, 3]: the grid of each run of placeholders; a video's grid serves one run per frame."""
    if VIDEO not in kinds:
        if len(kinds) != len(grid_thw):
            raise ValueError(f"{len(kinds)} runs of image placeholders for {len(grid_thw)} image grids")
        return grid_thw
    rows: list[list[int]] = []
    waiting = grid_thw.tolist()
    frame, frames_left = [1, 1, 1], 0
    for kind in kinds:
        if kind == VIDEO and frames_left:
            frames_left -= 1
            rows.append(frame)
            continue
        if not waiting:
            raise ValueError(f"{len(kinds)} runs of placeholders are more than {len(grid_thw)} grids have")
        time, height, width = waiting.pop(0)
        if kind == VIDEO:
            frame, frames_left = [1, height, width], time - 1
        rows.append(frame if kind == VIDEO else [time, height, width])
    if waiting or frames_left:
        raise ValueError(
            f"{len(kinds)} runs of placeholders leave {len(waiting)} grids and {frames_left} video frames over"
        )
    return torch.tensor(rows, dtype=torch.int64)


def _check_run_lengths(lengths: Tensor, grids: Tensor, is_text: Tensor) -> None:
    wrong = (~is_text & (lengths != grids.prod(dim=1))).nonzero().flatten().tolist()
    if wrong:
        run = wrong[0]
        raise ValueError(
            f"run {int((~is_text[:run]).sum())} of image or video placeholders has {int(lengths[run])} tokens; its "
            f"grid of {grids[run].tolist()} merged patches needs {int(grids[run].prod())}"
        )


class InterleavedMRoPE(nn.Module):
    """Rotary angles whose channels take time, height and width in turn: THWTHW…, then T where the others end.

    Stands in for megatron-core's `MultimodalRotaryEmbedding`, which lays the three sections one after another. The
    positions come already partitioned for context parallelism, so nothing is sliced here. The inverse frequencies are
    computed in each forward, in float32 on the positions' device: a tensor kept as an attribute would neither follow
    `.to()` nor survive building the model on the meta device.
    """

    def __init__(self, kv_channels: int, rotary_percent: float, rotary_base: int = 10_000) -> None:
        super().__init__()
        self.rotary_dim = int(kv_channels * rotary_percent)
        self.rotary_base = rotary_base

    def forward(
        self,
        position_ids: Tensor,
        mrope_section: Sequence[int],
        cp_group: torch.distributed.ProcessGroup | None = None,
    ) -> Tensor:
        """Angles of this rank's tokens.

        Args:
            position_ids: [3, B, S] int64, this CP rank's share.
            mrope_section: channels of time, height and width; their sum is D / 2.
            cp_group: unused; GPTModel passes it to every rotary embedding.

        Returns:
            [S, B, 1, D] float32, the D / 2 angles twice (for `rotate_half`).
        """
        if sum(mrope_section) * 2 != self.rotary_dim:
            raise ValueError(
                f"mrope_section {tuple(mrope_section)} sums to {sum(mrope_section)}; the rotary dimension "
                f"{self.rotary_dim} needs {self.rotary_dim // 2}"
            )
        device = position_ids.device
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=device) / self.rotary_dim
        inv_freq = 1.0 / self.rotary_base**exponents
        channel = torch.arange(self.rotary_dim // 2, device=device)
        axis = torch.zeros_like(channel)
        for which in (1, 2):
            axis += which * ((channel % 3 == which) & (channel < 3 * mrope_section[which]))
        # A product per element, where HF has a matrix product over one column: the same on any device, TF32 or not.
        angles = position_ids.index_select(0, axis).permute(2, 1, 0).float() * inv_freq  # [S, B, D / 2]
        return torch.cat((angles, angles), dim=-1).unsqueeze(2)

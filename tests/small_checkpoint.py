"""Checkpoints of three tensors, as megatron leaves them."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from runtime import checkpoints

logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.ERROR)


def write(folder: Path, iteration: int, *, last_file: bool = True, value: float = 0.0) -> Path:
    """A checkpoint as megatron leaves it, in torch_dist format."""
    path = folder / checkpoints.folder_name(iteration)
    state = {"weight": torch.full((8, 4), value), "bias": torch.zeros(3, dtype=torch.bfloat16), "step": iteration}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    if last_file:
        (path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    data = folder / checkpoints.DATA / path.name / "mp_rank_00"
    data.mkdir(parents=True)
    (data / "train_dataloader_dprank000.pt").write_bytes(b"state")
    return path

"""HuggingFace folders with random weights, as released ones look: config.json, safetensors shards, an index."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.qwen35_vl.configuration import Qwen35VLConfig
from models.qwen35_vl.hf_weights import ExpertStorage, default_dtype, weight_map

INDEX = "model.safetensors.index.json"


def random_tensors(
    architecture: Qwen35VLConfig, layout: ExpertStorage | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """All tensors of a folder, in released folders' dtypes; small enough to train with."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    return {
        name: (0.02 * torch.randn(shape, generator=generator)).to(dtypes[default_dtype(name)])
        for name, shape in weight_map(architecture, layout).tensors.items()
    }


def write_folder(
    path: Path, architecture: Qwen35VLConfig, tensors: dict[str, Tensor] | None = None, shards: int = 1
) -> dict[str, Tensor]:
    """Write a folder and return its tensors (random ones by default); one shard has no index, as transformers does."""
    tensors = random_tensors(architecture) if tensors is None else tensors
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(architecture.to_hf()))
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return tensors
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def read_folder(path: Path) -> dict[str, Tensor]:
    """All tensors, by the safetensors library."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Names, shapes, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name], tensor), name

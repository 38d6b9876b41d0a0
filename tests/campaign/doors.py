"""By which doors files from outside come in, each as its program calls it, in one process without Megatron."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from arguments import preflight
from models import ModelConfig, ModelSpec
from models.adapters import AdapterMap, lora_of_args
from models.qwen35_vl.configuration import VARIANTS, Qwen35VLConfig
from runtime import checkpoints
from tests.campaign.cases import INDEX
from tests.command_lines import LAPTOP
from tests.hf_folders import random_tensors
from tests.small_checkpoint import write as write_checkpoint
from weights.adapter import AdapterFolder, write_adapter
from weights.checkpoint import CheckpointTensors, export_checkpoint, import_folder
from weights.folder import TensorInfo, torch_dtype, write_tensors

ARCHITECTURE = VARIANTS["tiny"].replace(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=64,
    mtp_num_layers=1,
    vision=VARIANTS["tiny"].vision.__class__(
        num_layers=1, hidden_size=64, num_attention_heads=4, ffn_hidden_size=64, num_position_embeddings=64
    ),
)
BASE = ("--micro-batch-size", "1", "--seq-length", "1024", "--train-iters", "1", "--lr", "1e-3")


def write_sound_folder(folder: Path, architecture: Qwen35VLConfig = ARCHITECTURE) -> None:
    """As --save-hf does: two shards with an index and checksums, config, tokenizer, processor, template."""
    import json

    from data.receipts.processor import processor_for

    folder.mkdir(parents=True)
    config = architecture.to_hf()
    processor_for(config).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(architecture)
    names = {torch_dtype(name): name for name in ("F32", "BF16")}
    infos = {name: TensorInfo(tuple(tensor.shape), names[tensor.dtype]) for name, tensor in tensors.items()}
    half = sum(tensor.nbytes for tensor in tensors.values()) * 2 // 3
    for name, view in write_tensors(folder, infos, half, title="", quiet=True):
        view.copy_(tensors[name])
    assert (folder / INDEX).exists()


# Beside an adapter's files: the folder that it is an adapter of.
BASE_LINK = "base"


def write_sound_adapter(folder: Path, base: Path) -> None:
    """A LoRA adapter on a HuggingFace folder, as --save-adapter writes it, with a link to that folder in it."""
    spec, config, adapters = _adapted(base)
    state = {name: torch.ones(shape) for name, shape in adapters.weights.tensors.items()}
    write_adapter(folder, state, adapters, spec.table.mapping(config, ()).tensors, None)
    (folder / BASE_LINK).symlink_to(base)


def _adapted(base: Path, rank: int = 2) -> tuple[ModelSpec, ModelConfig, AdapterMap]:
    lines = preflight([*BASE, "--load-hf", str(base), "--lora-rank", str(rank)], LAPTOP, 1)
    return lines.spec, lines.config, lora_of_args(lines.args, lines.spec, lines.config)


def write_sound_checkpoint(folder: Path) -> None:
    """Two checkpoints of three tensors."""
    for iteration in (2, 4):
        write_checkpoint(folder, iteration, value=iteration)
    (folder / checkpoints.TRACKER).write_text("4")


def linked(source: Path, target: Path) -> Path:
    """A copy by hard links: a case replaces files and never writes into one."""
    return Path(shutil.copytree(source, target, copy_function=os.link, symlinks=True))


def _architecture_only(folder: Path) -> None:
    preflight([*BASE, "--hf-config", str(folder)], LAPTOP, 1)


def _load_hf(folder: Path) -> None:
    preflight([*BASE, "--load-hf", str(folder)], LAPTOP, 1)


def _import(folder: Path) -> None:
    import_folder(folder, folder.parent / "imported", quiet=True)


def _generate(folder: Path) -> None:
    from evaluation.model import HfModel

    HfModel.load(folder)


def _processor_flag(folder: Path) -> None:
    preflight([*BASE, "--model-variant", "tiny", "--hf-processor-path", str(folder)], LAPTOP, 1)


def _processor(folder: Path) -> None:
    from data.processor import read_processor

    read_processor(str(folder))


def _export(folder: Path) -> None:
    """A folder of checkpoints; or a HuggingFace folder, as the hf/ of sound checkpoints."""
    if (folder / checkpoints.TRACKER).exists():
        (folder / "hf").mkdir()
    else:
        root = folder.parent / "checkpoints"
        root.mkdir()
        write_sound_checkpoint(root)
        folder = folder.rename(root / "hf").parent
    export_checkpoint(folder, folder.parent / "exported", quiet=True)


def _load(folder: Path) -> None:
    preflight([*BASE, "--model-variant", "tiny", "--load", str(folder)], LAPTOP, 1)


def _pretrained(folder: Path) -> None:
    preflight([*BASE, "--model-variant", "tiny", "--pretrained-checkpoint", str(folder)], LAPTOP, 1)


def _read(folder: Path) -> None:
    """What the preflight looks at, and then every tensor, as the exporter reads them.

    Raises:
        ValueError: what was refused.
        AssertionError: other values than were written.
    """
    if problem := checkpoints.problem(folder, checkpoints.choose(folder, None, "torch_dist"), "torch_dist"):
        raise ValueError(problem)
    checkpoint = folder / "iter_0000004"
    tensors = CheckpointTensors(checkpoint)
    expected = {"weight": torch.full((8, 4), 4.0), "bias": torch.zeros(3, dtype=torch.bfloat16)}
    shapes = {key: tuple(entry.size) for key, entry in tensors.metadata.items()}
    if shapes != {key: tuple(tensor.shape) for key, tensor in expected.items()}:  # as export and strict loading do
        raise ValueError(f"{checkpoint}: holds {shapes}")
    for key, tensor in expected.items():
        found = tensors.read(key, (0,) * tensor.dim(), tuple(tensor.shape))
        assert torch.equal(found.to(tensor.dtype), tensor), f"{key} was read with other values"


def _load_adapter(folder: Path) -> None:
    flags = ("--load-hf", str(folder / BASE_LINK), "--load-adapter", str(folder))
    preflight([*BASE, *flags], LAPTOP, 1)


def _adapter(folder: Path) -> None:
    adapter = AdapterFolder.open(folder)
    adapter.read(_adapted(folder / BASE_LINK, adapter.options.rank)[2])


DOORS: dict[str, Callable[[Path], None]] = {
    "--hf-config": _architecture_only,
    "--load-hf": _load_hf,
    "import": _import,
    "generate": _generate,
    "--hf-processor-path": _processor_flag,
    "processor": _processor,
    "export": _export,
    "--load": _load,
    "--pretrained-checkpoint": _pretrained,
    "read": _read,
    "--load-adapter": _load_adapter,
    "adapter": _adapter,
}

"""Folders in small that imitate the released generations: names, dtypes, storage of experts, config keys, small files.

What is imitated is public knowledge about Qwen3.5, 3.6 and 3.8; no released folder is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.qwen35_vl.configuration import VARIANTS, Qwen35VLConfig
from models.qwen35_vl.hf_weights import ExpertStorage, weight_map

SMALL_VIT = replace(VARIANTS["tiny"].vision, num_layers=1, num_position_embeddings=64)
DENSE = VARIANTS["tiny"].replace(vision=SMALL_VIT)
MOE = VARIANTS["tiny_moe"].replace(vision=SMALL_VIT)
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Generation:
    """One kind of released folder.

    wide: ends of names that are stored in F32; the rest is BF16.
    shards: with an index, however few.
    processor_config: transformers 5's one file; else transformers 4's preprocessor_config.json and its companions.
    """

    architecture: Qwen35VLConfig
    storage: ExpertStorage
    wide: tuple[str, ...]
    shards: int
    processor_config: bool


_WIDE = ("linear_attn.A_log", "linear_attn.norm.weight")
GENERATIONS = {
    "3.5-0.8B": Generation(DENSE, ExpertStorage(), _WIDE, 1, processor_config=False),
    "3.5-35B-A3B": Generation(MOE, ExpertStorage(True, False), _WIDE, 3, processor_config=False),
    "3.6-35B-A3B": Generation(MOE, ExpertStorage(True, True), (), 4, processor_config=True),
    "3.8-27B": Generation(DENSE.replace(tie_word_embeddings=False), ExpertStorage(), (), 5, processor_config=False),
    "3.8-text": Generation(MOE.language_model(), ExpertStorage(True, True), (), 2, processor_config=False),
}


def config_of(architecture: Qwen35VLConfig) -> dict[str, Any]:
    """A config.json with the keys that releases have, ours in another order than we write them."""
    config = architecture.to_hf()
    if architecture.language_model_only:
        return _text_config_of(architecture, config)
    text = _text_config_of(architecture, config["text_config"])
    del text["tie_word_embeddings"]  # at the top alone
    moe = "_moe" if architecture.is_moe else ""
    vision = {
        **config["vision_config"],
        "model_type": f"qwen3_5{moe}",
        "deepstack_visual_indexes": [],
        "initializer_range": 0.02,
    }
    return {
        "architectures": config["architectures"],
        "image_token_id": architecture.token_ids.image,
        "model_type": f"qwen3_5{moe}",
        "text_config": text,
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": architecture.token_ids.video,
        "vision_config": vision,
        "vision_end_token_id": architecture.token_ids.vision_end,
        "vision_start_token_id": architecture.token_ids.vision_start,
    }


def _text_config_of(architecture: Qwen35VLConfig, text: dict[str, Any]) -> dict[str, Any]:
    rope = text.pop("rope_parameters")
    text = {
        **dict(sorted(text.items())),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": 1014,
        "full_attention_interval": architecture.full_attention_interval,
        "mlp_only_layers": [],
        "mtp_use_dedicated_embeddings": False,
        "rope_parameters": dict(reversed(rope.items())),
        "use_cache": True,
    }
    if architecture.is_moe:
        text |= {"output_router_logits": False, "router_aux_loss_coef": 0.001}
    return text


def tensors_of(generation: Generation, seed: int = 0) -> dict[str, Tensor]:
    """All tensors, random, small enough to train with; those near 1 with bits that bfloat16 hasn't, where F32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in weight_map(generation.architecture, generation.storage).tensors.items():
        values = 0.02 * torch.randn(shape, generator=generator)
        if name.endswith(_WIDE):
            values += 1
        tensors[name] = values if name.endswith(generation.wide or ("/",)) else values.bfloat16()
    return tensors


def write_generation(path: Path, name: str) -> dict[str, Tensor]:
    """Write the folder and return its tensors."""
    generation = GENERATIONS[name]
    tensors = tensors_of(generation)
    path.mkdir(parents=True)
    # Four blanks: a copy keeps what a rewriting would lose.
    (path / "config.json").write_text(json.dumps(config_of(generation.architecture), indent=4))
    _write_shards(path, tensors, generation.shards)
    write_small_files(path, generation)
    return tensors


def _write_shards(path: Path, tensors: Mapping[str, Tensor], shards: int) -> None:
    places = {}
    for shard in range(shards):
        file = f"model.safetensors-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_small_files(path: Path, generation: Generation) -> None:
    """Tokenizer, processor, generation settings, a README: in the style of transformers 4 or 5; no processor for text
    alone."""
    from data.processor_files import VISION_TOKENS
    from data.receipts.processor import build_processor

    config = generation.architecture.replace(language_model_only=False).to_hf()
    processor = build_processor("tiny", {name: config[name] for name in VISION_TOKENS})
    processor.save_pretrained(path)
    if not generation.processor_config:
        (path / "processor_config.json").unlink()
        if not generation.architecture.language_model_only:
            processor.image_processor.save_pretrained(path)
            processor.video_processor.save_pretrained(path)
        model = json.loads((path / "tokenizer.json").read_text())["model"]
        (path / "vocab.json").write_text(json.dumps(model["vocab"]))
        (path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
        # In this file alone, as many folders of transformers 4 have it.
        settings = json.loads((path / "tokenizer_config.json").read_text())
        settings["chat_template"] = (path / "chat_template.jinja").read_text()
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        (path / "chat_template.jinja").unlink()
    settings = {"do_sample": True, "eos_token_id": [1016, 1014], "pad_token_id": 1014, "temperature": 1.0}
    (path / "generation_config.json").write_text(json.dumps(settings))
    (path / "README.md").write_text("# A model\n")


def small_files(path: Path) -> dict[str, bytes]:
    """Every file but weights, their index and checksums."""
    return {
        file.name: file.read_bytes()
        for file in path.iterdir()
        if file.suffix != ".safetensors" and file.name not in (INDEX, "checksums.json")
    }

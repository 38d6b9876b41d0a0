"""A HuggingFace folder as export leaves it, with random weights: model, config, tokenizer and processor."""

from __future__ import annotations

from pathlib import Path

from data.processor_files import VISION_TOKENS
from data.receipts.processor import build_processor
from models.qwen35_vl.configuration import Qwen35VLConfig
from tests.hf_reference import build_hf


def write_trained_folder(path: Path, architecture: Qwen35VLConfig) -> Path:
    build_hf(architecture).save_pretrained(path)
    config = architecture.to_hf()
    build_processor("tiny", {name: config[name] for name in VISION_TOKENS}).save_pretrained(path)
    return path

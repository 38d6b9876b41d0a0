"""What a processor's files say, without torch and transformers: the launcher's preflight reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# HF's config.json name of an id -> the token that must have it.
VISION_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}


def vocab_size(config: Mapping[str, Any]) -> int:
    """Rows of the embedding that a `config.json` describes."""
    return config["text_config"]["vocab_size"]

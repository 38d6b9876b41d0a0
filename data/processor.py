"""The HuggingFace processor of a run: read, and checked against the model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, ProcessorMixin

from data.processor_files import VISION_TOKENS, vocab_size
from data.receipts.processor import processor_for
from data.sample import TURN_END, TURN_START, image_token
from weights.schema import description_problems


def load_processor(args: Namespace, config: Mapping[str, Any]) -> ProcessorMixin:
    """The processor of a run: `--hf-processor-path`'s, or the one built here for the model's vocabulary.

    Args:
        config: the model's `config.json` (`ModelSpec.hf_config`).

    Raises:
        ValueError: the processor can't serve the model; the message names the flag and the fix.
    """
    path = args.hf_processor_path
    processor = processor_for(config) if path is None else read_processor(path)
    check_processor(processor, config, path)
    return processor


def read_processor(path: str, flag: str = "--hf-processor-path") -> ProcessorMixin:
    """A HF processor from a folder or the hub, fit for training: with a padding token and the tokens we rely on.

    Args:
        flag: what gave the path, for messages.

    Raises:
        ValueError: it can't be read, or lacks an image processor, an image token, turn markers or any token to
            pad with.
    """
    if Path(path).expanduser().is_dir() and (problems := description_problems(Path(path).expanduser())):
        raise ValueError(f"{flag} {path}: {'; '.join(problems)}")
    try:
        # Never True, never asked for: None would ask on standard input whether to run the folder's code.
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {path}: {error}") from error
    if not isinstance(processor, ProcessorMixin) or "image_processor" not in processor.get_attributes():
        raise ValueError(f"{flag} {path}: it has no image processor; give a vision-language model's")
    tokenizer = processor.tokenizer
    vocabulary = tokenizer.get_vocab()
    for token in (image_token(processor)[0], TURN_START, TURN_END):
        if token not in vocabulary:
            raise ValueError(
                f"{flag} {path}: its tokenizer has no {token} token; give a processor of the Qwen-VL family"
            )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"{flag} {path}: its tokenizer has neither a pad nor an EOS token; "
                "set pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def check_processor(processor: ProcessorMixin, config: Mapping[str, Any], path: str | None) -> None:
    """Refuse a processor that speaks of other ids or patches than the model.

    Args:
        processor: see `read_processor` and `build_processor`.
        config: the model's `config.json`, `--image-token-id` already in it.
        path: `--hf-processor-path`, for the message.

    Raises:
        ValueError: naming the flag and the fix.
    """
    if problem := contradiction(processor, config):
        where = "the built processor" if path is None else f"--hf-processor-path {path}"
        raise ValueError(
            f"{where}: {problem}; give the processor of the model that --model-variant or --hf-config names; "
            "--image-token-id overrides the model's id of the image token and must be the processor's"
        )


def contradiction(processor: ProcessorMixin, config: Mapping[str, Any]) -> str | None:
    """How a processor's ids or patches differ from a model's `config.json`; None if they don't."""
    for name, token in VISION_TOKENS.items():
        token = image_token(processor)[0] if name == "image_token_id" else token
        found = processor.tokenizer.get_vocab().get(token)
        if name in config and found != config[name]:
            return f"{token} is id {found}, the model's {name} is {config[name]}"
    highest = max(processor.tokenizer.get_vocab().values())
    if highest >= vocab_size(config):
        return f"ids up to {highest} for a vocabulary of {vocab_size(config)} rows"
    image_processor, vision = processor.image_processor, config["vision_config"]
    theirs = (image_processor.patch_size, image_processor.merge_size, image_processor.temporal_patch_size)
    ours = tuple(vision[name] for name in ("patch_size", "spatial_merge_size", "temporal_patch_size"))
    if theirs != ours:
        return f"patch, merge and temporal sizes {theirs}, the model's are {ours}"
    return None

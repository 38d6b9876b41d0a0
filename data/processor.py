"""The HuggingFace processor of a run: read, and checked against the model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
)
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from data.bounded import template_problem
from data.processor_files import TURN_END, ProcessorFacts, contradicts, no_token
from data.receipts.processor import processor_for
from data.template import image_token
from weights.check import is_text_only
from weights.folder import has_processor
from weights.schema import description_problems

# Both end an answer in Qwen3.5's generation_config.json: a turn's end, and a document's.
STOP_TOKENS = (TURN_END, "<|endoftext|>")


def load_processor(args: Namespace, config: Mapping[str, Any]) -> ProcessorMixin:
    """The processor of a run: `--hf-processor-path`'s, or the one built here for the model's vocabulary.

    Args:
        config: the model's `config.json` (`ModelConfig.to_hf`).

    Raises:
        ValueError: the processor can't serve the model; the message names the flag and the fix.
    """
    path = args.hf_processor_path
    processor = processor_for(config) if path is None else read_processor(path, text_only=is_text_only(config))
    check_processor(processor, config, path)
    return processor


def read_processor(path: str, flag: str = "--hf-processor-path", *, text_only: bool = False) -> ProcessorMixin:
    """A HF processor from a folder or the hub, fit for training: with a padding token and the tokens we rely on.

    Args:
        flag: what gave the path, for messages.
        text_only: a tokenizer by itself will do.

    Raises:
        ValueError: it can't be read, or lacks an image processor, an image token, turn markers, a chat template or any
            token to pad with.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() and (problems := description_problems(folder)):
        raise ValueError(f"{flag} {path}: {'; '.join(problems)}")
    # AutoProcessor would look for the processor that a tokenizer was once saved with.
    reader = AutoTokenizer if text_only and folder.is_dir() and not has_processor(folder) else AutoProcessor
    try:
        # Never True, never asked for: None would ask on standard input whether to run the folder's code.
        processor = reader.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises that very class
        raise ValueError(f"{flag} {path}: {_culprit(folder)}{error}") from error
    if text_only and isinstance(processor, PreTrainedTokenizerBase):
        processor = _with_images(processor)
    if not isinstance(processor, ProcessorMixin) or "image_processor" not in processor.get_attributes():
        raise ValueError(f"{flag} {path}: it has no image processor; give a vision-language model's")
    _use_areas(processor.image_processor, f"{flag} {path}")
    if processor.chat_template is None:
        # Folders of transformers 4 may have it in tokenizer_config.json alone.
        processor.chat_template = processor.tokenizer.chat_template
    if problem := template_problem(processor):
        raise ValueError(f"{flag} {path}: {problem}")
    tokenizer = processor.tokenizer
    if (token := facts_of(processor).missing_token()) is not None:
        raise ValueError(f"{flag} {path}: {no_token(token)}")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"{flag} {path}: its tokenizer has neither a pad nor an EOS token; "
                "set pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def _culprit(folder: Path) -> str:
    """The file that a processor can't be read over, for a message; empty if it isn't the tokenizer's own."""
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            Tokenizer.from_file(str(file))
        except Exception:  # the tokenizers library raises that very class
            return "tokenizer.json can't be read: "
    return ""


def _with_images(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """A tokenizer as a processor, whose image processor nobody asks: text-only models refuse samples with images."""
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )


def stop_ids(processor: ProcessorMixin) -> list[int]:
    """Ids that end an answer, the turn's end first."""
    tokenizer = processor.tokenizer
    vocabulary = tokenizer.get_vocab()
    known = [vocabulary[token] for token in STOP_TOKENS if token in vocabulary]
    return list(dict.fromkeys([*known, *({tokenizer.eos_token_id} - {None})]))


def generation_settings(processor: ProcessorMixin) -> dict[str, Any]:
    """What generation_config.json has to say for answers to end: `eos_token_id`, a list, and `pad_token_id`."""
    return {"eos_token_id": stop_ids(processor), "pad_token_id": processor.tokenizer.pad_token_id}


def _use_areas(image_processor: Any, where: str) -> None:
    """Write an image processor's limits as shortest_edge and longest_edge, which HF's own code reads as areas.

    Raises:
        ValueError: its size says something else.
    """
    size = dict(image_processor.size)
    if size.keys() == {"min_pixels", "max_pixels"}:
        size = {"shortest_edge": size["min_pixels"], "longest_edge": size["max_pixels"]}
        image_processor.size = size
    if size.keys() != {"shortest_edge", "longest_edge"}:
        raise ValueError(
            f"{where}: preprocessor_config.json (or processor_config.json), key 'size': {size}; expected shortest_edge "
            "and longest_edge, the least and the most pixels of an image"
        )


def check_processor(processor: ProcessorMixin, config: Mapping[str, Any], path: str | None) -> None:
    """Refuse a processor that speaks of other ids or patches than the model.

    Args:
        processor: see `read_processor` and `build_processor`.
        config: the model's `config.json`, `--image-token-id` already in it.
        path: `--hf-processor-path`, for the message.

    Raises:
        ValueError: naming the flag and the fix.
    """
    if problem := facts_of(processor).contradiction(config):
        where = "the built processor" if path is None else f"--hf-processor-path {path}"
        raise ValueError(f"{where}: {contradicts(problem)}")


def facts_of(processor: ProcessorMixin) -> ProcessorFacts:
    """What `data.processor_files` reads from a folder, of a loaded processor."""
    images = processor.image_processor
    sizes = {name: getattr(images, name) for name in ("patch_size", "merge_size", "temporal_patch_size")}
    return ProcessorFacts(processor.tokenizer.get_vocab(), image_token(processor)[0], sizes)

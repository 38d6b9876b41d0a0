"""The HuggingFace processor: loaded and checked, or built here without any download.

What is built is a `Qwen3VLProcessor`, the class that transformers maps `qwen3_5` to: Qwen3.5's tokenizer class and
pre-tokenisation with a small byte-level vocabulary trained on the spot, Qwen3.5's special tokens, a chat template
that writes what Qwen3.5's writes, and its image processor. Two layouts say where the special tokens sit: `tiny` in
1,024 rows, `full` at Qwen3.5's own ids in 248,320 rows (the ids in between are unused).
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AddedToken, AutoProcessor, ProcessorMixin, Qwen2VLImageProcessor, Qwen3VLProcessor
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from data.receipt_values import corpus
from data.sample import TURN_END, TURN_START

# Samples are tokenised in forked loader workers, where the tokenizer's own threads would only warn.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PAD = "<|endoftext|>"
REASONING = ("<think>", "</think>")  # added, but not special: decoding keeps them
# HF's config.json name of an id -> the token that must have it.
VISION_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}


@dataclass(frozen=True)
class Layout:
    """Where special tokens sit, and how small an image may be.

    vocab_size: rows of the embedding that the ids must fit.
    ids: of the tokens that only the processor knows; the vision tokens' ids come from the model.
    min_pixels, max_pixels: default area that images are resized into.
    """

    vocab_size: int
    ids: Mapping[str, int]
    min_pixels: int
    max_pixels: int = 16_777_216


LAYOUTS: Mapping[str, Layout] = {
    "tiny": Layout(
        vocab_size=1024,
        ids={
            "<think>": 1012,
            "</think>": 1013,
            PAD: 1014,
            TURN_START: 1015,
            TURN_END: 1016,
            "<|vision_pad|>": 1019,
        },
        min_pixels=4096,  # 4 vision tokens
    ),
    "full": Layout(
        vocab_size=248320,
        ids={
            PAD: 248044,
            TURN_START: 248045,
            TURN_END: 248046,
            "<|vision_pad|>": 248055,
            "<think>": 248068,
            "</think>": 248069,
        },
        min_pixels=65536,  # Qwen3.5's: 64 vision tokens
    ),
}

# Writes what Qwen3.5's template writes for system, user and assistant turns with images, the empty reasoning block
# after the last question included. Tools aren't supported.
CHAT_TEMPLATE = """\
{%- macro written(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content or [] -%}
      {%- if part.type == 'image' -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part.type == 'video' -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- elif part.type == 'text' -%}
        {{- part.text -}}
      {%- else -%}
        {{- raise_exception('a part of type ' ~ part.type ~ ' is neither image, video nor text') -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set question = namespace(last=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set question.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if question.last < 0 -%}{{- raise_exception('there is no user message') -}}{%- endif -%}
{%- for message in messages -%}
  {%- set text = written(message.content) | trim -%}
  {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
  {%- if message.role == 'assistant' -%}
    {%- set reasoning = '' -%}
    {%- if message.reasoning_content is string -%}
      {%- set reasoning = message.reasoning_content -%}
    {%- elif '</think>' in text -%}
      {%- set reasoning = text.split('</think>')[0].split('<think>')[-1] -%}
      {%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {%- if loop.index0 > question.last -%}
      {{- '<think>\\n' ~ (reasoning | trim) ~ '\\n</think>\\n\\n' -}}
    {%- endif -%}
  {%- elif message.role == 'system' -%}
    {%- if not loop.first -%}{{- raise_exception('a system message comes first') -}}{%- endif -%}
  {%- elif message.role != 'user' -%}
    {{- raise_exception('role ' ~ message.role ~ ' is neither system, user nor assistant') -}}
  {%- endif -%}
  {{- text ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n<think>\\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}{{- '\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""


def load_processor(args: Namespace) -> ProcessorMixin:
    """The processor of a run: `--hf-processor-path`'s, or the one built here for the model's vocabulary.

    Raises:
        ValueError: the processor can't serve the model; the message names the flag and the fix.
    """
    from models import MODEL_REGISTRY

    config = MODEL_REGISTRY[args.model_arch].hf_config(args)
    if args.hf_processor_path is not None:
        processor = read_processor(args.hf_processor_path)
    else:
        vision = config["vision_config"]
        processor = build_processor(
            "tiny" if _vocab_size(config) <= LAYOUTS["tiny"].vocab_size else "full",
            {name: config[name] for name in VISION_TOKENS},
            patch_size=vision["patch_size"],
            merge_size=vision["spatial_merge_size"],
            temporal_patch_size=vision["temporal_patch_size"],
        )
    check_processor(processor, config, args.hf_processor_path)
    return processor


def read_processor(path: str, flag: str = "--hf-processor-path") -> ProcessorMixin:
    """A HF processor from a folder or the hub, fit for training: with a padding token and the tokens we rely on.

    Args:
        flag: what gave the path, for messages.

    Raises:
        ValueError: it can't be read, or lacks an image processor, an image token, turn markers or any token to
            pad with.
    """
    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {path}: {error}") from error
    if not isinstance(processor, ProcessorMixin) or "image_processor" not in processor.get_attributes():
        raise ValueError(f"{flag} {path}: it has no image processor; give a vision-language model's")
    tokenizer = processor.tokenizer
    vocabulary = tokenizer.get_vocab()
    for token in (processor.image_token, TURN_START, TURN_END):
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
        token = processor.image_token if name == "image_token_id" else token
        found = processor.tokenizer.get_vocab().get(token)
        if name in config and found != config[name]:
            return f"{token} is id {found}, the model's {name} is {config[name]}"
    highest = max(processor.tokenizer.get_vocab().values())
    if highest >= _vocab_size(config):
        return f"ids up to {highest} for a vocabulary of {_vocab_size(config)} rows"
    image_processor, vision = processor.image_processor, config["vision_config"]
    theirs = (image_processor.patch_size, image_processor.merge_size, image_processor.temporal_patch_size)
    ours = tuple(vision[name] for name in ("patch_size", "spatial_merge_size", "temporal_patch_size"))
    if theirs != ours:
        return f"patch, merge and temporal sizes {theirs}, the model's are {ours}"
    return None


def build_processor(
    layout: str,
    vision_ids: Mapping[str, int],
    *,
    patch_size: int = 16,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
) -> Qwen3VLProcessor:
    """Qwen3.5's processor with a small vocabulary, the same at every call; takes a fraction of a second.

    `len(processor.tokenizer)` counts tokens, not rows: the highest id is larger.

    Args:
        layout: "tiny" or "full", see `LAYOUTS`.
        vision_ids: ids of the model's vision tokens by their names in `config.json` (the keys of VISION_TOKENS).
        patch_size, merge_size, temporal_patch_size: the model's.

    Raises:
        ValueError: an id that another token has, or none of the layout's rows.
    """
    place = LAYOUTS[layout]
    added = {**place.ids, **{VISION_TOKENS[name]: token_id for name, token_id in vision_ids.items()}}
    tokenizer = _build_tokenizer(added, place.vocab_size)
    patches = {
        "patch_size": patch_size,
        "merge_size": merge_size,
        "temporal_patch_size": temporal_patch_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    size = {"shortest_edge": place.min_pixels, "longest_edge": place.max_pixels}
    return Qwen3VLProcessor(
        # size, not min_pixels: transformers 5.17 writes the latter into the class's own default
        image_processor=Qwen2VLImageProcessor(size=size, **patches),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**patches),
        chat_template=CHAT_TEMPLATE,
    )


def _build_tokenizer(added: Mapping[str, int], rows: int) -> Qwen3_5Tokenizer:
    """Byte-level BPE in the ids below the added tokens', and these at their ids."""
    limit = min(added.values())
    if len(set(added.values())) < len(added) or max(added.values()) >= rows:
        raise ValueError(f"special ids {dict(added)} must differ and lie below {rows}")
    pipeline = Qwen3_5Tokenizer()._tokenizer  # Qwen3.5's normaliser and pre-tokeniser
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = pipeline.normalizer, pipeline.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if limit < len(alphabet):
        raise ValueError(f"special id {limit} is one of the {len(alphabet)} bytes' ids; give a higher one")
    trainer = trainers.BpeTrainer(
        vocab_size=min(limit, LAYOUTS["tiny"].ids["<think>"]), initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(corpus(), trainer)
    model = json.loads(trained.to_str())["model"]
    special = [token for token in added if token not in REASONING]
    tokenizer = Qwen3_5Tokenizer(
        vocab={**model["vocab"], **added},
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token=TURN_END,
        pad_token=PAD,
        extra_special_tokens=[token for token in special if token not in (PAD, TURN_END)],
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in REASONING])
    return tokenizer


def _vocab_size(config: Mapping[str, Any]) -> int:
    return config["text_config"]["vocab_size"]

"""A processor for receipts, built here without any download.

It is a `Qwen3VLProcessor`, the class that transformers maps `qwen3_5` to: Qwen3.5's tokenizer class and
pre-tokenisation with a small byte-level vocabulary trained on the spot, Qwen3.5's special tokens, a chat template
that writes what Qwen3.5's writes, and its image processor. Two vocabularies say which ids the special tokens have:
`tiny` in 1,024 rows, `full` Qwen3.5's own ids in 248,320 rows (the ids in between are unused).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AddedToken, Qwen2VLImageProcessor, Qwen3VLProcessor
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from data.processor_files import TURN_END, TURN_START, VISION_TOKENS, vocab_size
from data.receipts.values import corpus
from weights.check import is_text_only

PAD = "<|endoftext|>"
REASONING = ("<think>", "</think>")  # added, but not special: decoding keeps them


@dataclass(frozen=True)
class TokenIds:
    """Ids of a vocabulary's special tokens, and how small an image may be.

    vocab_size: rows of the embedding that the ids must fit.
    ids: of the tokens that only the processor knows; the vision tokens' ids come from the model.
    vision_ids: of the vision tokens where the model, one of text alone, doesn't know them; see `build_processor`.
    min_pixels, max_pixels: default area that images are resized into.
    """

    vocab_size: int
    ids: Mapping[str, int]
    vision_ids: Mapping[str, int]
    min_pixels: int
    max_pixels: int = 16_777_216


TOKEN_IDS: Mapping[str, TokenIds] = {
    "tiny": TokenIds(
        vocab_size=1024,
        ids={
            "<think>": 1012,
            "</think>": 1013,
            PAD: 1014,
            TURN_START: 1015,
            TURN_END: 1016,
            "<|vision_pad|>": 1019,
        },
        vision_ids=dict(zip(VISION_TOKENS, (1017, 1018, 1020, 1021), strict=True)),
        min_pixels=4096,  # 4 vision tokens
    ),
    "full": TokenIds(
        vocab_size=248320,
        ids={
            PAD: 248044,
            TURN_START: 248045,
            TURN_END: 248046,
            "<|vision_pad|>": 248055,
            "<think>": 248068,
            "</think>": 248069,
        },
        vision_ids=dict(zip(VISION_TOKENS, (248053, 248054, 248056, 248057), strict=True)),
        min_pixels=65536,  # Qwen3.5's: 64 vision tokens
    ),
}

# Writes what Qwen3.5's template writes for system, user and assistant turns with images, the empty reasoning block
# after the last question included. Tools are described, called and answered in the same places and marks as there.
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
{%- if tools -%}
  {{- '<|im_start|>system\\n# Tools\\n\\n<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' ~ (tool | tojson) -}}{%- endfor -%}
  {{- '\\n</tools>' -}}
  {%- if messages[0].role == 'system' -%}{{- '\\n\\n' ~ (written(messages[0].content) | trim) -}}{%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set text = written(message.content) | trim -%}
  {%- if message.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\\n<tool_response>\\n' ~ text ~ '\\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
    {%- continue -%}
  {%- elif message.role == 'system' and loop.first and tools -%}
    {%- continue -%}
  {%- endif -%}
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
    {%- set calls = namespace(text=text) -%}
    {%- for call in message.tool_calls or [] -%}
      {%- set function = call.function if call.function is defined else call -%}
      {%- set calls.text = calls.text ~ ('\\n\\n' if loop.first and calls.text else '\\n' if not loop.first else '')
          ~ '<tool_call>\\n<function=' ~ function.name ~ '>\\n' -%}
      {%- for name, value in (function.arguments or {}).items() -%}
        {%- set calls.text = calls.text ~ '<parameter=' ~ name ~ '>\\n' ~ (value if value is string else value | tojson)
            ~ '\\n</parameter>\\n' -%}
      {%- endfor -%}
      {%- set calls.text = calls.text ~ '</function>\\n</tool_call>' -%}
    {%- endfor -%}
    {%- set text = calls.text -%}
  {%- elif message.role == 'system' -%}
    {%- if not loop.first -%}{{- raise_exception('a system message comes first') -}}{%- endif -%}
  {%- elif message.role != 'user' -%}
    {{- raise_exception('role ' ~ message.role ~ ' is neither system, user, assistant nor tool') -}}
  {%- endif -%}
  {{- text ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n<think>\\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}{{- '\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""


def processor_for(config: Mapping[str, Any]) -> Qwen3VLProcessor:
    """The processor for a model: the vocabulary that its embedding has the rows for, its ids and its patches.

    Args:
        config: the model's `config.json` (`ModelSpec.hf_config`).
    """
    vocabulary = "tiny" if vocab_size(config) <= TOKEN_IDS["tiny"].vocab_size else "full"
    if is_text_only(config):
        return build_processor(vocabulary, TOKEN_IDS[vocabulary].vision_ids)
    vision = config["vision_config"]
    return build_processor(
        vocabulary,
        {name: config[name] for name in VISION_TOKENS},
        patch_size=vision["patch_size"],
        merge_size=vision["spatial_merge_size"],
        temporal_patch_size=vision["temporal_patch_size"],
    )


def build_processor(
    vocabulary: str,
    vision_ids: Mapping[str, int],
    *,
    patch_size: int = 16,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
) -> Qwen3VLProcessor:
    """Qwen3.5's processor with a small vocabulary, the same at every call; takes a fraction of a second.

    `len(processor.tokenizer)` counts tokens, not rows: the highest id is larger.

    Args:
        vocabulary: "tiny" or "full", see `TOKEN_IDS`.
        vision_ids: ids of the model's vision tokens by their names in `config.json` (the keys of VISION_TOKENS).
        patch_size, merge_size, temporal_patch_size: the model's.

    Raises:
        ValueError: an id that another token has, or none of the vocabulary's rows.
    """
    token_ids = TOKEN_IDS[vocabulary]
    added = {**token_ids.ids, **{VISION_TOKENS[name]: token_id for name, token_id in vision_ids.items()}}
    tokenizer = _build_tokenizer(added, token_ids.vocab_size)
    patches = {
        "patch_size": patch_size,
        "merge_size": merge_size,
        "temporal_patch_size": temporal_patch_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    size = {"shortest_edge": token_ids.min_pixels, "longest_edge": token_ids.max_pixels}
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
    pipeline = Qwen3_5Tokenizer().backend_tokenizer  # Qwen3.5's normaliser and pre-tokeniser
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = pipeline.normalizer, pipeline.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if limit < len(alphabet):
        raise ValueError(f"special id {limit} is one of the {len(alphabet)} bytes' ids; give a higher one")
    trainer = trainers.BpeTrainer(
        vocab_size=min(limit, TOKEN_IDS["tiny"].ids["<think>"]), initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(corpus(), trainer)
    model = json.loads(trained.to_str())["model"]
    special = [token for token in added if token not in REASONING]
    merges: Any = [tuple(pair) for pair in model["merges"]]  # as BPE takes them; the constructor is hinted otherwise
    tokenizer = Qwen3_5Tokenizer(
        vocab={**model["vocab"], **added},
        merges=merges,
        eos_token=TURN_END,
        pad_token=PAD,
        extra_special_tokens=[token for token in special if token not in (PAD, TURN_END)],
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in REASONING])
    return tokenizer

"""One conversation, tokenised once: what packs and batches are made of.

    messages -> chat template (once) -> pieces: special tokens and the text between them -> ids, trained tokens

Text between special tokens is tokenised piece by piece, as HF tokenizers themselves do after splitting at special
tokens, so the ids are HF's; but a piece's text is never searched for special tokens, so "<|im_end|>" typed by a
user stays text. Turns are known from the template's own markers, never by looking for the answer's text.

Shape letters: L tokens of the sample, P patches, I images, D values of a patch (channels * temporal * patch²).
"""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from data.bounded import longest_text, render
from data.conversation import Conversation, Message
from data.images import PixelLimits, open_image, patch_dim, patch_grid, process_images
from data.processor_files import TURN_END, TURN_START

if TYPE_CHECKING:
    from transformers import ProcessorMixin

ANSWER_START = "assistant\n"
# Qwen3.5's template puts this before an answer without reasoning. At inference the prompt brings it along
# (enable_thinking=False), so it isn't trained; a block that holds reasoning is.
EMPTY_REASONING = "<think>\n\n</think>\n\n"
# Stands inside a special token that is only text while the template runs: from Unicode's private use area.
_BREAK = "\ue000"


@dataclass(frozen=True)
class Sample:
    """One conversation, ready to be packed.

    input_ids: [L] int64, image placeholders already expanded (one id per merged patch).
    trained: [L] bool, this token is a target (answer and `<|im_end|>`); data/batch.py does the shift.
    pixel_values: [P, D] in the training dtype, P may be 0; [0, D] in a dataset `without_pixels`.
    grid_thw: [I, 3] int64, patches in time, height and width of each image; I may be 0.
    id: names the sample in error messages, for example "receipts/train/17".
    """

    input_ids: Tensor
    trained: Tensor
    pixel_values: Tensor
    grid_thw: Tensor
    id: str


@dataclass(frozen=True)
class SampleOptions:
    """How conversations become samples.

    seq_len: tokens of a sample at most.
    min_pixels, max_pixels: area that images are resized into; None is the processor's own limit.
    dtype: of pixel_values.
    strict_special_mask: train no special token, not even `<|im_end|>` (the in-tree example's rule).
    pixels: False leaves pixel_values empty and decodes no image.
    """

    seq_len: int
    min_pixels: int | None = None
    max_pixels: int | None = None
    dtype: torch.dtype = torch.float32
    strict_special_mask: bool = False
    pixels: bool = True

    @classmethod
    def of(cls, args: Namespace) -> SampleOptions:
        """The command line's."""
        return cls(
            seq_len=args.seq_length,
            min_pixels=args.min_pixels,
            max_pixels=args.max_pixels,
            dtype=args.params_dtype,
            strict_special_mask=args.strict_special_mask,
        )


class Outcome(StrEnum):
    """What became of a conversation; anything but WHOLE is counted for the log."""

    WHOLE = ""
    CUT = "last turns left out: too long"
    TOO_LONG = "dropped: first question and answer too long"
    UNTRAINED = "dropped: nothing to train on"


@dataclass(frozen=True)
class Encoded:
    """A conversation before its pixels are touched.

    input_ids, trained: one entry per token; empty when dropped.
    images: those of the turns that were kept.
    grids: patches of each of these images in time, height and width.
    """

    input_ids: list[int]
    trained: list[bool]
    images: list[Image.Image]
    grids: list[tuple[int, int, int]]
    outcome: Outcome

    @property
    def patches(self) -> list[int]:
        return [prod(grid) for grid in self.grids]


def build_sample(
    conversation: Conversation, processor: ProcessorMixin, options: SampleOptions
) -> tuple[Sample | None, Outcome]:
    """Tokenise a conversation and process its images.

    A conversation longer than `options.seq_len` loses its last exchanges with their images, and is dropped when the
    first alone is too long: an answer never stays without an image it was given for, and no image is cut.

    Returns:
        The sample, or None when it is dropped, and what became of the conversation.

    Raises:
        ValueError: a malformed message, an image with a side more than 200 times the other, or a template that
            doesn't place the images; the message names the sample.
    """
    encoded = encode(conversation, processor, options)
    if encoded.outcome in (Outcome.TOO_LONG, Outcome.UNTRAINED):
        return None, encoded.outcome
    image_processor = processor.image_processor
    limits = PixelLimits.of(image_processor, options.min_pixels, options.max_pixels)
    if options.pixels:
        pixel_values, grid_thw = process_images(encoded.images, image_processor, limits, options.dtype)
    else:
        pixel_values = torch.empty(0, patch_dim(image_processor), dtype=options.dtype)
        grid_thw = torch.tensor(encoded.grids, dtype=torch.int64).view(-1, 3)
    sample = Sample(
        input_ids=torch.tensor(encoded.input_ids, dtype=torch.int64),
        trained=torch.tensor(encoded.trained, dtype=torch.bool),
        pixel_values=pixel_values,
        grid_thw=grid_thw,
        id=conversation.id,
    )
    placeholders = int((sample.input_ids == image_token(processor)[1]).sum())
    features = int(grid_thw.prod(-1).sum()) // image_processor.merge_size**2
    expected = [list(grid) for grid in encoded.grids]
    if placeholders != features or grid_thw.tolist() != expected:
        raise ValueError(
            f"{conversation.id}: {placeholders} image placeholders for {features} vision features "
            f"(grids {grid_thw.tolist()}, {expected} expected)"
        )
    return sample, encoded.outcome


def image_token(processor: ProcessorMixin) -> tuple[str, int]:
    """The token that stands for one vision feature, and its id."""
    # Every vision-language processor has them; their base class in transformers doesn't declare them.
    return processor.image_token, processor.image_token_id  # type: ignore[attr-defined]


def encode(conversation: Conversation, processor: ProcessorMixin, options: SampleOptions) -> Encoded:
    """Tokens of a conversation, and which images they stand for; reads images' sizes, not their pixels.

    Raises:
        ValueError: as `build_sample`.
    """
    messages = [_checked(message, conversation.id) for message in conversation.messages]
    limits = PixelLimits.of(processor.image_processor, options.min_pixels, options.max_pixels)
    for kept in _lengths_to_try(messages):
        images = _images(messages[:kept], conversation.id)
        grids = []
        for number, image in enumerate(images):
            try:
                grids.append(patch_grid(image, processor.image_processor, limits))
            except ValueError as error:
                size = f"{image.width} x {image.height} pixels"
                raise ValueError(f"{conversation.id}: image {number} of {size}: {error}") from error
        patches = [prod(grid) for grid in grids]
        tokens = _tokenise(messages[:kept], patches, processor, conversation.id, options.seq_len)
        if tokens is None or len(tokens[0]) > options.seq_len:
            continue
        input_ids, trained = tokens
        if options.strict_special_mask:
            never = _never_trained(processor)
            trained = [t and token not in never for t, token in zip(trained, input_ids, strict=True)]
        if not any(trained):
            return Encoded([], [], [], [], Outcome.UNTRAINED)
        outcome = Outcome.WHOLE if kept == len(messages) else Outcome.CUT
        return Encoded(input_ids, trained, images, grids, outcome)
    return Encoded([], [], [], [], Outcome.TOO_LONG)


def value_mask(sample: Sample, conversation: Conversation, processor: ProcessorMixin) -> Tensor:
    """[L] bool: tokens of the last answer that hold any of `conversation.value_spans`, for evaluation.

    Found by position: the answer's tokens are laid over its bytes. The sample must be whole (`Outcome.WHOLE`).

    Raises:
        ValueError: the tokens don't spell the answer, or the conversation has no value spans.
    """
    tokenizer = processor.tokenizer
    answer = message_text(conversation.messages[-1])
    if not conversation.value_spans:
        raise ValueError(f"{conversation.id}: has no value spans")
    end_id = tokenizer.convert_tokens_to_ids(TURN_END)
    positions = [i for i in sample.trained.nonzero()[:, 0].tolist() if sample.input_ids[i] != end_id]
    ids = sample.input_ids[positions].tolist()
    # The last answer is the shortest tail of the trained tokens that spells it: byte counts say where it begins.
    # A token of a byte-level vocabulary is written with one character for each byte it stands for.
    lengths = [len(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    size, first = len(answer.encode()), len(ids)
    while first > 0 and size > 0:
        first -= 1
        size -= lengths[first]
    if tokenizer.decode(ids[first:], clean_up_tokenization_spaces=False) != answer:
        raise ValueError(f"{conversation.id}: the sample's last trained tokens don't spell its answer")
    spans = [(len(answer[:start].encode()), len(answer[:end].encode())) for start, end in conversation.value_spans]
    mask = torch.zeros_like(sample.trained)
    begin = 0
    for position, length in zip(positions[first:], lengths[first:], strict=True):
        mask[position] = any(start < begin + length and begin < end for start, end in spans)
        begin += length
    return mask


# Messages


def _checked(message: Message, sample_id: str) -> Message:
    """The message with content as a list of parts, adjacent texts joined."""
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"{sample_id}: role {role!r}; expected system, user or assistant")
    if isinstance(content, str):
        return {"role": role, "content": [{"type": "text", "text": content}]}
    parts: list[dict[str, Any]] = []
    for part in content or ():
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            if parts and parts[-1]["type"] == "text":  # two halves of "<|im_end|>" must not join unseen
                parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
            else:
                parts.append({"type": "text", "text": part["text"]})
        elif kind == "image" and "image" in part:
            parts.append({"type": "image", "image": part["image"]})
        else:
            raise ValueError(
                f"{sample_id}: a part of type {kind!r} with keys {sorted(part)}; expected "
                '{"type": "text", "text": ...} or {"type": "image", "image": ...}'
            )
    return {"role": role, "content": parts}


def _lengths_to_try(messages: list[Message]) -> list[int]:
    """How many messages to keep: all, else as many as end with an answer, longest first."""
    answers = [n for n, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    return [len(messages), *(n for n in reversed(answers) if n < len(messages))]


def _images(messages: list[Message], sample_id: str) -> list[Image.Image]:
    images = []
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                try:
                    images.append(open_image(part["image"]))
                except (OSError, ValueError) as error:
                    raise ValueError(f"{sample_id}: image {len(images)}: {error}") from error
    return images


def message_text(message: Message) -> str:
    """The text of a message without images."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


# Tokens


def _tokenise(
    messages: list[Message], patches: list[int], processor: ProcessorMixin, sample_id: str, longest: int
) -> tuple[list[int], list[bool]] | None:
    """Token ids with expanded placeholders, and which of them are trained; None: by its length alone, the text can't be
    as few as `longest` tokens."""
    tokenizer, placeholder = processor.tokenizer, image_token(processor)[0]
    special = _special_ids(processor)
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    try:
        rendered = render(processor, _escape(messages, pattern))
    except TemplateError as error:
        raise ValueError(f"{sample_id}: the chat template refuses it: {error}") from error
    pieces = [piece for piece in re.split(f"({pattern})", rendered) if piece]
    if (found := pieces.count(placeholder)) != len(patches):
        raise ValueError(f"{sample_id}: the chat template places {found} images of {len(patches)}")

    texts = [_unescape(piece, special) for piece in pieces if piece not in special]
    if sum(map(len, texts)) > longest_text(tokenizer, longest):
        return None
    encodings = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    encoded_texts = iter(zip(texts, encodings["input_ids"], encodings["offset_mapping"], strict=True))
    token_counts = iter(n // processor.image_processor.merge_size**2 for n in patches)
    input_ids: list[int] = []
    trained: list[bool] = []
    in_answer = turn_opens = False
    for piece in pieces:
        if piece == placeholder:
            count = next(token_counts)
            input_ids += [special[piece]] * count
            trained += [False] * count
        elif piece in special:
            input_ids.append(special[piece])
            trained.append(in_answer and piece == TURN_END)
            turn_opens = piece == TURN_START
            in_answer = in_answer and piece not in (TURN_START, TURN_END)
        else:
            text, ids, offsets = next(encoded_texts)
            in_answer = text.startswith(ANSWER_START) if turn_opens else in_answer
            first = _answer_offset(text) if turn_opens else 0
            input_ids += ids
            trained += [in_answer and start >= first for start, _ in offsets]
            turn_opens = False
    return input_ids, trained


def _answer_offset(text: str) -> int:
    """Where the trained text begins in the piece that opens an assistant's turn."""
    offset = len(ANSWER_START)
    return offset + len(EMPTY_REASONING) if text.startswith(EMPTY_REASONING, offset) else offset


def _special_ids(processor: ProcessorMixin) -> dict[str, int]:
    """Tokens that only the template may write, by their text."""
    added = processor.tokenizer.added_tokens_decoder
    special = {token.content: token_id for token_id, token in added.items() if token.special}
    return special | dict([image_token(processor)])


def _never_trained(processor: ProcessorMixin) -> set[int]:
    return {processor.tokenizer.pad_token_id, *_special_ids(processor).values()}


def _escape(messages: list[Message], pattern: str) -> list[Message]:
    """Messages with special tokens in their text broken, so that the rendered text holds the template's alone."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "text", "text": re.sub(pattern, lambda m: m[0][0] + _BREAK + m[0][1:], part["text"])}
                if part["type"] == "text"
                else {"type": "image"}
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def _unescape(text: str, special: dict[str, int]) -> str:
    if _BREAK not in text:
        return text
    broken = "|".join(re.escape(token[0] + _BREAK + token[1:]) for token in special)
    return re.sub(broken, lambda m: m[0].replace(_BREAK, ""), text)

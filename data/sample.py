"""One conversation, tokenised once: what packs and batches are made of.

    messages -> checked (conversation.py) -> rendered and tokenised (template.py) -> ids, trained tokens -> pixels

Turns are known from the template's own markers, never by looking for the answer's text.

Shape letters: L tokens of the sample, P patches, I images, D values of a patch (channels * temporal * patch²).
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data.bad_sample import BadSample, Reason, shown
from data.conversation import (
    Conversation,
    Document,
    Message,
    checked_messages,
    checked_parts,
    is_empty,
    is_trained,
    message_text,
)
from data.images import Picture, PixelLimits, open_image, patch_dim, patch_grid, process_images
from data.processor_files import TURN_END
from data.template import ChatTemplate, Tokens, image_token

if TYPE_CHECKING:
    from transformers import ProcessorMixin

# What is said about answers of samples that are kept; counted for the log.
OTHER_PREFIX = "answers that inference's prompt would precede otherwise (--train-on exact trains them apart)"
LEFT_OUT = "reasonings that the chat template leaves out"
EMPTY_ANSWER = "empty answers, not trained"


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
    train_on: "all" answers; the "last" one; or "exact": answers that stand where inference would write them together,
        each other one in a sample of its own.
    template_arguments: a JSON object for the chat template.
    images: False, for a model of text alone, makes a sample with an image a broken one.
    """

    seq_len: int
    min_pixels: int | None = None
    max_pixels: int | None = None
    dtype: torch.dtype = torch.float32
    strict_special_mask: bool = False
    pixels: bool = True
    train_on: str = "all"
    template_arguments: str = "{}"
    images: bool = True

    @classmethod
    def of(cls, args: Namespace) -> SampleOptions:
        """The command line's."""
        return cls(
            seq_len=args.seq_length,
            min_pixels=args.min_pixels,
            max_pixels=args.max_pixels,
            dtype=args.params_dtype,
            strict_special_mask=args.strict_special_mask,
            train_on=args.train_on,
            template_arguments=args.chat_template_kwargs,
            images=not args.language_model_only,
        )


class Outcome(StrEnum):
    """What became of a conversation; anything but WHOLE is counted for the log."""

    WHOLE = ""
    CUT = "last turns left out: too long"
    TOO_LONG = "dropped: first question and answer too long"
    UNTRAINED = "dropped: nothing to train on"
    EMPTY = "dropped: its answers are empty"


KEPT = (Outcome.WHOLE, Outcome.CUT)


@dataclass(frozen=True)
class Encoded:
    """A conversation before its pixels are touched.

    input_ids, trained: one entry per token; empty when dropped.
    pictures: those of the turns that were kept.
    grids: patches of each of these images in time, height and width.
    notes: what is to be counted about its answers, by remark.
    """

    input_ids: list[int]
    trained: list[bool]
    pictures: list[Picture]
    grids: list[tuple[int, int, int]]
    outcome: Outcome
    id: str
    notes: Mapping[str, int] = field(default_factory=dict)

    @property
    def patches(self) -> list[int]:
        return [prod(grid) for grid in self.grids]


def build_sample(
    conversation: Conversation | Document, processor: ProcessorMixin, options: SampleOptions, part: int = 0
) -> tuple[Sample | None, Outcome]:
    """Tokenise a conversation and process its images.

    A conversation longer than `options.seq_len` loses its last exchanges with their images, and is dropped when the
    first alone is too long: an answer never stays without an image it was given for, and no image is cut.

    Args:
        part: which of the conversation's samples; see `encode_all`.

    Returns:
        The sample, or None when it is dropped, and what became of the conversation.

    Raises:
        BadSample: a malformed message, an image that can't be read or with a side more than 200 times the other, an
            image for a model of text alone, or a template that doesn't place the images; the message names the sample.
    """
    encoded = encode_all(conversation, processor, options)[part]
    if encoded.outcome not in KEPT:
        return None, encoded.outcome
    return sample_of(encoded, processor, options), encoded.outcome


def build_prompt(conversation: Conversation, processor: ProcessorMixin, options: SampleOptions) -> Sample | None:
    """What inference gives the model for its next answer, with no token trained; None if it is too long.

    Raises:
        BadSample: as `build_sample`.
    """
    encoder = _Encoder(processor, options)
    messages = checked_messages(conversation, encoder.template.names)
    pictures = encoder.pictures([part for message in messages for part in message["content"]])
    grids = [patch_grid(picture, processor.image_processor) for picture in pictures]
    tokens = encoder.template.inference_prompts(messages, conversation.tools)[0]
    if encoder.length(tokens, grids) > options.seq_len:
        return None
    ids, trained = encoder.expand(tokens, [False] * len(tokens), grids)
    encoded = Encoded(ids, trained, pictures, grids, Outcome.WHOLE, conversation.id)
    return sample_of(encoded, processor, options)


def sample_of(encoded: Encoded, processor: ProcessorMixin, options: SampleOptions) -> Sample:
    """The sample of a conversation that is kept: decodes its images.

    Raises:
        BadSample: one can't be decoded.
    """
    image_processor = processor.image_processor
    if options.pixels:
        try:
            pixel_values, grid_thw = process_images(encoded.pictures, image_processor, options.dtype)
        except BadSample as error:
            raise error.named(encoded.id) from error
    else:
        pixel_values = torch.empty(0, patch_dim(image_processor), dtype=options.dtype)
        grid_thw = torch.tensor(encoded.grids, dtype=torch.int64).view(-1, 3)
    sample = Sample(
        input_ids=torch.tensor(encoded.input_ids, dtype=torch.int64),
        trained=torch.tensor(encoded.trained, dtype=torch.bool),
        pixel_values=pixel_values,
        grid_thw=grid_thw,
        id=encoded.id,
    )
    placeholders = int((sample.input_ids == image_token(processor)[1]).sum())
    features = int(grid_thw.prod(-1).sum()) // image_processor.merge_size**2
    expected = [list(grid) for grid in encoded.grids]
    if placeholders != features or grid_thw.tolist() != expected:
        raise ValueError(
            f"{encoded.id}: {placeholders} image placeholders for {features} vision features "
            f"(grids {grid_thw.tolist()}, {expected} expected)"
        )
    return sample


def encode(
    conversation: Conversation | Document, processor: ProcessorMixin, options: SampleOptions, part: int = 0
) -> Encoded:
    """Tokens of one of a conversation's samples, and which images they stand for; reads images' sizes, not their
    pixels.

    Raises:
        BadSample: as `build_sample`.
    """
    return encode_all(conversation, processor, options)[part]


def encode_all(
    conversation: Conversation | Document, processor: ProcessorMixin, options: SampleOptions
) -> list[Encoded]:
    """A conversation's samples: one, or with `train_on` "exact" those that `SampleOptions` says.

    Raises:
        BadSample: as `build_sample`.
    """
    encoder = _Encoder(processor, options)
    try:
        if isinstance(conversation, Document):
            return [encoder.document(conversation)]
        messages = checked_messages(conversation, encoder.template.names)
        if options.train_on == "exact":
            return encoder.exact(messages, conversation)
        return [encoder.conversation(messages, conversation)]
    except BadSample as error:
        raise error.named(conversation.id) from error
    except RecursionError as error:
        raise BadSample(Reason.MALFORMED, f"{conversation.id}: values in values too deeply; flatten it") from error


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


class _Encoder:
    """Makes `Encoded` of checked messages, under one run's options."""

    def __init__(self, processor: ProcessorMixin, options: SampleOptions) -> None:
        self.template = ChatTemplate.of(processor, options.template_arguments)
        self._processor = processor
        self._options = options
        self._limits = PixelLimits.of(processor.image_processor, options.min_pixels, options.max_pixels)

    def document(self, document: Document) -> Encoded:
        parts = checked_parts(document.parts, "text")
        pictures = self.pictures(parts)
        grids = self._grids(pictures)
        tokens = self.template.document(parts)
        if self.length(tokens.ids, grids) > self._options.seq_len:
            return self._dropped(Outcome.TOO_LONG, document.id)
        trained = [token not in self.template.vision_ids for token in tokens.ids]
        ids, trained = self.expand(tokens.ids, trained, grids)
        if not any(part["type"] == "text" and part["text"].strip() for part in parts):
            return self._dropped(Outcome.EMPTY, document.id)
        return self._kept(ids, trained, pictures, grids, Outcome.WHOLE, document.id, {})

    def conversation(
        self, messages: list[Message], conversation: Conversation, answers: set[int] | None = None
    ) -> Encoded:
        """The conversation, cut to fit.

        Args:
            answers: the messages that are trained; None for all answers, or the last one, as the options say.
        """
        spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        empty = {index for index in spoken if is_empty(messages[index])}
        if answers is None:
            answers = set(spoken[-1:] if self._options.train_on == "last" else spoken)
        wanted = {index for index in answers - empty if is_trained(messages[index])}
        if not wanted:
            return self._dropped(Outcome.EMPTY if empty else Outcome.UNTRAINED, conversation.id)
        lengths = _lengths_to_try(messages)
        if self._options.train_on == "last":
            lengths = [length for length in lengths if length > max(wanted)]
        longest = len(messages)
        for kept in lengths:
            if kept > longest:
                continue
            pictures = self.pictures([part for message in messages[:kept] for part in message["content"]])
            grids = self._grids(pictures)
            tokens = self.template.render(messages[:kept], conversation.tools, len(pictures), self._options.seq_len)
            if tokens is None:
                continue
            turns = self._turns(messages[:kept], tokens)
            if self.length(tokens.ids, grids) > self._options.seq_len:
                longest = self._longest(turns, tokens, grids, kept)
                continue
            trained, notes = self._trained(messages, tokens, turns, wanted)
            ids, trained = self.expand(tokens.ids, trained, grids)
            notes += Counter({EMPTY_ANSWER: sum(index < kept for index in empty)})
            outcome = Outcome.WHOLE if kept == len(messages) else Outcome.CUT
            return self._kept(ids, trained, pictures, grids, outcome, conversation.id, +notes)
        return self._dropped(Outcome.TOO_LONG, conversation.id)

    def exact(self, messages: list[Message], conversation: Conversation) -> list[Encoded]:
        """Answers that follow the ids that inference would give the model in one sample, each other one in its own."""
        images = sum(part["type"] == "image" for message in messages for part in message["content"])
        tokens = self.template.render(messages, conversation.tools, images, self._options.seq_len)
        if tokens is None:
            return [self._dropped(Outcome.TOO_LONG, conversation.id)]
        together, apart = set(), []
        for turn, index in enumerate(self._turns(messages, tokens)):
            if not is_trained(messages[index]) or is_empty(messages[index]):
                continue
            first, _ = self.template.prefix(tokens, turn)
            if tokens.ids[:first] in self.template.inference_prompts(messages[:index], conversation.tools):
                together.add(index)
            else:
                apart.append((turn, index))
        made = [self.conversation(messages, conversation, together)] if together or not apart else []
        for turn, index in apart:
            alone = Conversation(conversation.messages, f"{conversation.id}#{turn}", (), conversation.tools)
            made.append(self._only(messages[: index + 1], alone))
        return made

    def _only(self, messages: list[Message], conversation: Conversation) -> Encoded:
        """The conversation's last answer, which isn't cut off to fit."""
        encoded = self.conversation(messages, conversation, {len(messages) - 1})
        return self._dropped(Outcome.TOO_LONG, conversation.id) if encoded.outcome is Outcome.CUT else encoded

    def pictures(self, parts: Sequence[Mapping[str, Any]]) -> list[Picture]:
        """The images among parts, opened."""
        found: list[Picture] = []
        for part in parts:
            if part["type"] == "image":
                if not self._options.images:
                    raise BadSample(
                        Reason.UNSEEN,
                        "it has an image, which a model of text alone can't see; leave it out, or train one with a "
                        "vision encoder (without --language-model-only)",
                    )
                try:
                    found.append(Picture(open_image(part["image"]), self._limits.for_part(part)))
                except BadSample as error:
                    raise error.named(f"image {len(found)}") from error
        return found

    def length(self, ids: Sequence[int], grids: Sequence[tuple[int, int, int]]) -> int:
        """Of what `expand` makes, which a part's own size may let take any memory."""
        merged = self._processor.image_processor.merge_size**2
        return len(ids) + sum(prod(grid) // merged - 1 for grid in grids)

    def expand(
        self, ids: Sequence[int], trained: Sequence[bool], grids: Sequence[tuple[int, int, int]]
    ) -> tuple[list[int], list[bool]]:
        """Each image's placeholder repeated to as many as the image has features."""
        merged = self._processor.image_processor.merge_size**2
        counts = iter(prod(grid) // merged for grid in grids)
        image_id = self.template.image_token_id
        expanded_ids: list[int] = []
        expanded_trained: list[bool] = []
        for token, is_target in zip(ids, trained, strict=True):
            count = next(counts) if token == image_id else 1
            expanded_ids += [token] * count
            expanded_trained += [is_target] * count
        return expanded_ids, expanded_trained

    def _grids(self, pictures: Sequence[Picture]) -> list[tuple[int, int, int]]:
        grids = []
        for number, picture in enumerate(pictures):
            try:
                grids.append(patch_grid(picture, self._processor.image_processor))
            except BadSample as error:
                raise error.named(f"image {number}") from error
        return grids

    def _turns(self, messages: Sequence[Message], tokens: Tokens) -> list[int]:
        """The message of each assistant's turn that was rendered."""
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(answers) != len(tokens.turns):
            raise BadSample(
                Reason.TEMPLATE, f"the chat template writes {len(tokens.turns)} assistant turns for {len(answers)}"
            )
        return answers

    def _trained(
        self, messages: Sequence[Message], tokens: Tokens, turns: Sequence[int], wanted: set[int]
    ) -> tuple[list[bool], Counter[str]]:
        trained = [False] * len(tokens.ids)
        notes: Counter[str] = Counter()
        for turn, index in enumerate(turns):
            if index not in wanted:
                continue
            first, is_prompt = self.template.prefix(tokens, turn)
            end = tokens.turns[turn][1]  # of <|im_end|>, which is trained: the model learns to stop
            trained[first : end + 1] = [True] * (end + 1 - first)
            notes[OTHER_PREFIX] += not is_prompt
            notes[LEFT_OUT] += _reasoning_is_left_out(messages[index], tokens.texts[turn], index)
        return trained, notes

    def _longest(self, turns: Sequence[int], tokens: Tokens, grids: Sequence[tuple[int, int, int]], kept: int) -> int:
        """Messages that may still fit when `kept` don't: their tokens are at least as many in a shorter rendering."""
        counts = [1] * len(tokens.ids)
        merged = self._processor.image_processor.merge_size**2
        places = [place for place, token in enumerate(tokens.ids) if token == self.template.image_token_id]
        for place, grid in zip(places, grids, strict=True):
            counts[place] = prod(grid) // merged
        fitting, length, place = 0, 0, 0
        for index, (_, end) in zip(turns, tokens.turns, strict=True):
            length += sum(counts[place:end])
            place = end
            if length <= self._options.seq_len:
                fitting = index + 1
        return min(fitting, kept - 1)

    def _kept(
        self,
        ids: list[int],
        trained: list[bool],
        pictures: list[Picture],
        grids: list[tuple[int, int, int]],
        outcome: Outcome,
        name: str,
        notes: Mapping[str, int],
    ) -> Encoded:
        if self._options.strict_special_mask:
            never = {self._processor.tokenizer.pad_token_id, *self.template.special_ids.values()}
            trained = [t and token not in never for t, token in zip(trained, ids, strict=True)]
        if not any(trained[1:]):
            return self._dropped(Outcome.UNTRAINED, name)
        return Encoded(ids, trained, pictures, grids, outcome, name, notes)

    def _dropped(self, outcome: Outcome, name: str) -> Encoded:
        return Encoded([], [], [], [], outcome, name)


def _lengths_to_try(messages: list[Message]) -> list[int]:
    """How many messages to keep: all, else as many as end with an answer, longest first."""
    answers = [n for n, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    return [len(messages), *(n for n in reversed(answers) if n < len(messages))]


def _reasoning_is_left_out(message: Message, said: str, index: int) -> bool:
    """Whether the template wrote an answer without its reasoning.

    Raises:
        BadSample: anything else of the answer is missing from what it wrote.
    """
    text, spoken = _squeezed(message_text(message)), _squeezed(said)
    reasoning = _squeezed(message.get("reasoning_content") or "")
    head, end, tail = text.rpartition("</think>")
    if end and not spoken.startswith(text) and "</think>" not in head:
        reasoning, text = reasoning + head.removeprefix("<think>"), tail
    after = spoken.partition("</think>")[2] if spoken.startswith("<think>") else spoken
    # Tool calls follow the text; without them nothing does.
    written = (spoken, after) if text else (spoken,)
    if not any(place.startswith(text) if message.get("tool_calls") else place == text for place in written) and text:
        raise BadSample(
            Reason.TEMPLATE,
            f"messages[{index}]: the chat template changes the answer's text: {shown(message_text(message))} becomes "
            f"{shown(said)}; give reasoning in reasoning_content, or as <think>...</think> at the answer's start",
        )
    return bool(reasoning) and reasoning not in spoken


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)

"""Conversations as a dataset that packs are planned over."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from data.conversation import Conversations
from data.images import PixelLimits
from data.pack import SampleSize
from data.sample import Sample, SampleOptions, build_sample, encode

if TYPE_CHECKING:
    from transformers import ProcessorMixin


class ConversationDataset:
    """`data.pack.SampleDataset` over conversations: sizes from text and image headers, samples on demand.

    Args:
        conversations: the split.
        processor: turns them into tokens and patches.
        options: length, resolution, dtype and loss mask of the samples.
        name: for messages and the log, "receipts/train".
        source: changes with the split's content; part of the fingerprint.
        cache_dir: folder that keeps the sizes between runs, or None.
    """

    def __init__(
        self,
        conversations: Conversations,
        processor: ProcessorMixin,
        options: SampleOptions,
        *,
        name: str,
        source: str,
        cache_dir: Path | None,
    ) -> None:
        self.conversations = conversations
        self.processor = processor
        self.options = options
        self.name = name
        self.cache_dir = cache_dir
        self.fingerprint = hashlib.sha256(
            json.dumps([source, _processor_content(processor), _limits(processor, options)]).encode()
        ).hexdigest()

    def __len__(self) -> int:
        return len(self.conversations)

    def size(self, index: int) -> SampleSize:
        """Tokens and patches of a sample; 0 tokens when it is dropped. Decodes no pixels."""
        encoded = encode(self.conversations[index], self.processor, self.options)
        return SampleSize(len(encoded.input_ids), sum(encoded.patches), sum(encoded.trained[1:]), str(encoded.outcome))

    def __getitem__(self, index: int) -> Sample:
        """The sample.

        Raises:
            IndexError: it is one that `size` drops.
        """
        conversation = self.conversations[index]
        sample, outcome = build_sample(conversation, self.processor, self.options)
        if sample is None:
            raise IndexError(f"{conversation.id} is {outcome}")
        return sample

    def without_pixels(self) -> Self:
        dataset = copy.copy(self)
        dataset.options = replace(self.options, pixels=False)
        return dataset


def _limits(processor: ProcessorMixin, options: SampleOptions) -> list[int | bool]:
    """What of the options a sample's size depends on."""
    limits = PixelLimits.of(processor.image_processor, options.min_pixels, options.max_pixels)
    return [options.seq_len, limits.min_pixels, limits.max_pixels, options.strict_special_mask]


def _processor_content(processor: ProcessorMixin) -> list[str]:
    """What of the processor a sample's size depends on: its tokenizer, template and image processor."""
    return [
        processor.tokenizer._tokenizer.to_str(),
        str(processor.chat_template),
        str(processor.image_processor.to_json_string()),
    ]

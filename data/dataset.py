"""Conversations as a dataset that packs are planned over."""

from __future__ import annotations

import copy
import hashlib
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from data.conversation import Conversations
from data.images import PixelLimits
from data.sample import KEPT, Encoded, Sample, SampleOptions, encode_all, sample_of
from data.sizes import SampleSize

if TYPE_CHECKING:
    from transformers import ProcessorMixin


class ConversationDataset:
    """`data.sizes.SampleDataset` over conversations: sizes from text and image headers, samples on demand.

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

    def encode(self, index: int) -> list[Encoded]:
        """The samples of conversation `index`, before their pixels are touched.

        Raises:
            BadSample: the conversation is broken; the message names it.
        """
        return encode_all(self.conversations[index], self.processor, self.options)

    def sizes(self, index: int) -> list[SampleSize]:
        """Tokens and patches of the samples of conversation `index`; 0 tokens when one is dropped. Decodes no pixels.

        Raises:
            BadSample: the conversation is broken; the message names it.
        """
        return [
            SampleSize(
                len(encoded.input_ids),
                sum(encoded.patches),
                sum(encoded.trained[1:]),
                str(encoded.outcome),
                encoded.notes,
            )
            for encoded in self.encode(index)
        ]

    def size(self, index: int) -> SampleSize:
        """Of the conversation's first sample."""
        return self.sizes(index)[0]

    def sample(self, index: int, part: int = 0) -> Sample:
        """One sample of conversation `index`.

        Raises:
            IndexError: it is one that `sizes` drops, or that isn't there.
            BadSample: an image that can't be decoded; the message names the conversation.
        """
        encoded = self.encode(index)[part]
        if encoded.outcome not in KEPT:
            raise IndexError(f"{encoded.id} is {encoded.outcome}")
        return sample_of(encoded, self.processor, self.options)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index)

    def without_pixels(self) -> Self:
        dataset = copy.copy(self)
        dataset.options = replace(self.options, pixels=False)
        return dataset


def _limits(processor: ProcessorMixin, options: SampleOptions) -> list[int | bool | str]:
    """What of the options a sample's size depends on."""
    limits = PixelLimits.of(processor.image_processor, options.min_pixels, options.max_pixels)
    return [
        *(options.seq_len, limits.min_pixels, limits.max_pixels, options.strict_special_mask),
        *(options.train_on, options.template_arguments),
        *(() if options.images else ("no images",)),
    ]


def one_path(args: Namespace) -> str | None:
    """`--dataset-path` of a provider that reads one folder.

    Raises:
        ValueError: there are several.
    """
    paths = args.dataset_path or [None]
    if len(paths) > 1:
        raise ValueError(f"--dataset-path {' '.join(paths)}: {args.dataset_provider} reads one; give one")
    return paths[0]


def _processor_content(processor: ProcessorMixin) -> list[str]:
    """What of the processor a sample's size depends on: its tokenizer, template and image processor."""
    return [
        processor.tokenizer._tokenizer.to_str(),
        str(processor.chat_template),
        str(processor.image_processor.to_json_string()),
    ]

"""The provider `chat`: rows of `--dataset-path` as samples."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from data.cache import cache_folder
from data.chat.forms import read_row
from data.chat.splits import SplitRows, split_rows
from data.conversation import Conversation, Document, Split
from data.dataset import ConversationDataset
from data.sample import SampleOptions

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from models.spec import ModelInputs


def build(args: Namespace, split: Split, processor: ProcessorMixin, model_inputs: ModelInputs) -> ConversationDataset:
    """The split as a dataset of samples, which is empty when the data has no such split; see `data.BuildDataset`."""
    rows = split_rows(args, split)
    return ConversationDataset(
        Chats(rows, Path(args.media_root).expanduser() if args.media_root else None),
        processor,
        SampleOptions.of(args),
        name=f"chat/{split}",
        source=f"{rows.fingerprint} {args.media_root}",
        cache_dir=cache_folder(args),
    )


class Chats:
    """`data.conversation.Conversations` over rows.

    Args:
        media_root: that paths in all rows are relative to; None for each file's own folder.
    """

    def __init__(self, rows: SplitRows, media_root: Path | None) -> None:
        self._rows, self._media_root = rows, media_root

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Conversation | Document:
        source, number = self._rows.find(index)
        return read_row(source[number], source.place(number), self._media_root or source.folder)

"""What a dataset hands over: a conversation in the chat format of HuggingFace's templates, with a name.

A dataset is anything with `__len__` and `__getitem__(index) -> Conversation`; see `data/receipts/dataset.py` and
`data/cord_v2.py` for two of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

Split = Literal["train", "validation", "test"]

# {"role": "system" | "user" | "assistant", "content": text or a list of parts}, where a part is
# {"type": "text", "text": str} or {"type": "image", "image": PIL image or path}.
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """One conversation.

    messages: turns in order, images inside their content.
    id: names it in error messages, for example "receipts/train/17".
    value_spans: character ranges [start, end) of the last answer that hold values, as opposed to keys and
        punctuation; empty where the dataset doesn't say.
    """

    messages: list[Message]
    id: str
    value_spans: tuple[tuple[int, int], ...] = ()


class Conversations(Protocol):
    """A dataset: a fixed number of conversations, each made on demand and the same at every call."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...

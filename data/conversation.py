"""What a dataset hands over: a conversation in the chat format of HuggingFace's templates, or a plain document.

A dataset is anything with `__len__` and `__getitem__(index) -> Conversation | Document`; see `data/receipts/dataset.py`
and `data/cord_v2.py` for two of them, and `data/chat/` for the one that reads files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from data.bad_sample import BadSample, Reason, shown

Split = Literal["train", "validation", "test"]

# {"role": "system" | "user" | "assistant" | "tool", "content": text or a list of parts}, where a part is
# {"type": "text", "text": str} or {"type": "image", "image": what data.images.open_image takes}, the latter with
# min_pixels, max_pixels or resized_height and resized_width if it likes. An answer may have "weight": 0, which
# untrains it, and whatever the chat template knows besides: "reasoning_content", "tool_calls".
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
# Keys of an image part that say how large the image becomes.
SIZE_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_KNOWN = ("role", "content", "weight", "tool_call_id")  # the last names a call, and templates go by the order
_IMAGE_KEYS = ("image", "image_url", "path", "url", "base64", "bytes")


@dataclass(frozen=True)
class Conversation:
    """One conversation.

    messages: turns in order, images inside their content.
    id: names it in error messages, for example "receipts/train/17".
    value_spans: character ranges [start, end) of the last answer that hold values, as opposed to keys and
        punctuation; empty where the dataset doesn't say.
    tools: JSON schemas of the functions that answers may call, for the chat template.
    """

    messages: list[Message]
    id: str
    value_spans: tuple[tuple[int, int], ...] = ()
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Document:
    """Text with images among it, no turns; all of its text is trained.

    parts: as in a message's content.
    """

    parts: list[dict[str, Any]]
    id: str


class Conversations(Protocol):
    """A dataset: a fixed number of conversations, each made on demand and the same at every call."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation | Document:
        """
        Raises:
            BadSample: what is there can't be read.
        """
        ...


def checked_messages(conversation: Conversation, names: frozenset[str]) -> list[Message]:
    """The messages with contents as lists of parts, adjacent texts joined, and without keys that say nothing.

    Args:
        names: that the chat template looks up.

    Raises:
        BadSample: no message, an unknown role, part or key, a content that is none.
    """
    if not isinstance(conversation.messages, list) or not conversation.messages:
        raise BadSample(Reason.MALFORMED, f"messages: {shown(conversation.messages)}; expected a list of turns")
    if conversation.tools is not None and "tools" not in names:
        raise BadSample(Reason.MALFORMED, "it has tools, and the chat template has no place for them")
    _check_characters(conversation.tools, "tools")
    return [_checked(message, number, names) for number, message in enumerate(conversation.messages)]


def checked_parts(content: Any, key: str) -> list[dict[str, Any]]:
    """A content as a list of parts, adjacent texts joined: two halves of "<|im_end|>" must not join unseen.

    Raises:
        BadSample: it is neither text nor parts; names the key.
    """
    if isinstance(content, str):
        _check_characters(content, key)
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise BadSample(Reason.MALFORMED, f"{key}: {shown(content)}; expected text or a list of parts")
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(content):
        made = _part(part, f"{key}[{number}]")
        if parts and made["type"] == parts[-1]["type"] == "text":
            parts[-1] = {"type": "text", "text": parts[-1]["text"] + made["text"]}
        else:
            parts.append(made)
    return parts


def message_text(message: Message) -> str:
    """The text of a message without images."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def is_trained(message: Message) -> bool:
    """An answer whose weight isn't 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def is_empty(message: Message) -> bool:
    """A checked message that says nothing: no text, no image, nothing beside them."""
    said = any(part["type"] == "image" or part["text"].strip() for part in message["content"])
    return not said and not any(value for key, value in message.items() if key not in _KNOWN)


def _checked(message: Any, number: int, names: frozenset[str]) -> Message:
    where = f"messages[{number}]"
    if not isinstance(message, Mapping):
        raise BadSample(Reason.MALFORMED, f"{where}: {shown(message)}; expected an object with role and content")
    given = {key: value for key, value in message.items() if value is not None}
    role = given.get("role")
    if role not in ROLES or (role == "tool" and role not in names):
        known = (
            "system, user or assistant; the chat template doesn't know tools" if role == "tool" else ", ".join(ROLES)
        )
        raise BadSample(Reason.MALFORMED, f"{where}: role {shown(role)}; expected {known}")
    for key in given:
        if key not in _KNOWN and key not in names:
            raise BadSample(
                Reason.MALFORMED,
                f"{where}: key {shown(key)}, which neither the chat template nor the harness knows; rename or drop it",
            )
    weight = given.get("weight", 1)
    if weight not in (0, 1) or (weight == 1 and "weight" in given and role != "assistant"):
        raise BadSample(
            Reason.MALFORMED, f"{where}: weight {shown(weight)} of role {role}; an answer has 0 or 1, others none or 0"
        )
    if role == "assistant":
        content = given.get("content", "")
    elif "content" not in given:
        raise BadSample(Reason.MALFORMED, f"{where}: a message of role {role} without content")
    else:
        content = given["content"]
    parts = checked_parts(content, f"{where}.content")
    _check_characters({key: value for key, value in given.items() if key != "content"}, where)
    if role == "assistant" and any(part["type"] == "image" for part in parts):
        raise BadSample(Reason.MALFORMED, f"{where}: an image in an answer; the model writes text alone")
    return {**given, "content": parts}


def _part(part: Any, where: str) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise BadSample(Reason.MALFORMED, f"{where}: {shown(part)}; expected an object with a type")
    given = {key: value for key, value in part.items() if value is not None}
    sources = [key for key in _IMAGE_KEYS if key in given]
    kind = given.get("type", "text" if "text" in given else "image" if sources else None)
    if kind == "text" and isinstance(given.get("text"), str) and given.keys() <= {"type", "text"}:
        _check_characters(given["text"], f"{where}.text")
        return {"type": "text", "text": given["text"]}
    if kind in ("image", "image_url") and len(sources) == 1 and given.keys() <= {"type", *sources, *SIZE_KEYS}:
        sizes = {key: given[key] for key in SIZE_KEYS if key in given}
        return {"type": "image", "image": _source(sources[0], given[sources[0]], where), **sizes}
    raise BadSample(
        Reason.MALFORMED,
        f"{where}: a part of type {shown(kind)} with keys {shown(sorted(map(str, given)))}; expected "
        '{"type": "text", "text": ...} or {"type": "image", "image": ...}',
    )


def _check_characters(value: Any, where: str) -> None:
    """JSON can write half of a character ("\\ud83d" alone), which has no tokens.

    Raises:
        BadSample: there is one; names the key.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadSample(
                Reason.MALFORMED,
                f"{where}: half of a character at {error.start} of {shown(value)}; repair the text's encoding",
            ) from error
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            _check_characters(key, where)
            _check_characters(entry, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            _check_characters(entry, f"{where}[{number}]")


def _source(key: str, value: Any, where: str) -> Any:
    if key == "image_url" and isinstance(value, Mapping):
        given = {name: entry for name, entry in value.items() if entry is not None}
        if given.keys() != {"url"}:
            keys = shown(sorted(map(str, given)))
            raise BadSample(Reason.MALFORMED, f"{where}.image_url: keys {keys}; expected url alone")
        return given["url"]
    if key == "base64" and isinstance(value, str) and not value.startswith("data:"):
        return f"data:image;base64,{value}"
    return value

"""A row of somebody's file as a conversation, recognised by its keys.

| form | keys |
| --- | --- |
| messages | `messages`: role and content; with `images` for places that name no image of their own, `tools` |
| ShareGPT | `conversations`: from and value; `system`, `tools`, `images` for `<image>` in the texts |
| LLaVA | `conversations` with one `image` |
| prompt and completion | `prompt`, `completion`: texts or lists of messages; the prompt's answers aren't trained |
| text | `text`: a text with `images` for its `<image>`, or a list of parts; everything is trained |

A row with several of these is the first one. Other keys are the row's own affair.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.bad_sample import BadSample, Reason, shown
from data.conversation import Conversation, Document, Message

MARKER = "<image>"
# Media that a row may name and that aren't read.
_UNREAD = ("video", "videos", "audio", "audios")
# ShareGPT's names of the roles.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_PART_SOURCES = ("image", "image_url", "path", "url", "base64", "bytes")


def read_row(row: Any, name: str, media_root: Path | None) -> Conversation | Document:
    """A row as a conversation.

    Args:
        row: keys that are None count as absent, since columns of a table are the union of its rows' keys.
        name: of the sample.
        media_root: that the paths of images are relative to.

    Raises:
        BadSample: no form, or not as its form demands; names the sample and the key.
    """
    try:
        if not isinstance(row, Mapping):
            raise BadSample(Reason.MALFORMED, f"the row is {shown(row)}; expected an object")
        given = {key: value for key, value in row.items() if value is not None}
        made = _read(given, name)
        return _with_media(made, media_root)
    except BadSample as error:
        raise error.named(name) from error
    except RecursionError as error:
        raise BadSample(Reason.MALFORMED, f"{name}: values in values too deeply; flatten it") from error


def _read(row: dict[str, Any], name: str) -> Conversation | Document:
    for key in _UNREAD:
        if row.get(key):
            raise BadSample(Reason.MALFORMED, f"key {key}: nothing but images and text is read; leave such rows out")
    images = _images(row)
    if "messages" in row:
        messages = [_message(turn, f"messages[{n}]") for n, turn in enumerate(_list(row, "messages"))]
    elif "conversations" in row:
        messages = [_message(turn, f"conversations[{n}]") for n, turn in enumerate(_list(row, "conversations"))]
    elif "prompt" in row and "completion" in row:
        messages = _prompt_and_completion(row)
    elif "text" in row:
        content = row["text"]
        if not isinstance(content, str | list):
            raise BadSample(Reason.MALFORMED, f"text: {shown(content)}; expected a text or a list of parts")
        return Document(_placed([{"role": "user", "content": content}], images)[0]["content"], name)
    else:
        raise BadSample(
            Reason.MALFORMED,
            f"keys {shown(sorted(map(str, row)))}; expected messages, conversations, prompt and completion, or text",
        )
    if row.get("system"):
        if not isinstance(row["system"], str):
            raise BadSample(Reason.MALFORMED, f"system: {shown(row['system'])}; expected a text")
        if messages and messages[0].get("role") == "system":
            raise BadSample(Reason.MALFORMED, "a key system beside a system message; give one")
        messages.insert(0, {"role": "system", "content": row["system"]})
    return Conversation(_placed(messages, images), name, tools=_json_list(row.get("tools"), "tools"))


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(row[key], Sequence) or isinstance(row[key], str | bytes) or not row[key]:
        raise BadSample(Reason.MALFORMED, f"{key}: {shown(row[key])}; expected a list of turns")
    return list(row[key])


def _images(row: Mapping[str, Any]) -> list[Any] | None:
    """The row's images; None where it has no key for them."""
    if "images" in row and "image" in row:
        raise BadSample(Reason.MALFORMED, "keys image and images; give one")
    if "images" not in row and "image" not in row:
        return None
    found = row.get("images", row.get("image"))
    return list(found) if isinstance(found, list | tuple) else [found]


def _message(turn: Any, where: str) -> Message:
    """A turn with role and content; ShareGPT's from and value renamed."""
    if not isinstance(turn, Mapping):
        raise BadSample(Reason.MALFORMED, f"{where}: {shown(turn)}; expected an object")
    message = {key: value for key, value in turn.items() if value is not None}
    if "from" in message and "role" not in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise BadSample(Reason.MALFORMED, f"{where}: from {shown(speaker)}; expected one of {', '.join(_ROLES)}")
        message["role"] = _ROLES[speaker]
        if "value" in message and "content" not in message:
            message["content"] = message.pop("value")
        if speaker == "function_call":
            message["tool_calls"] = [_call(message.pop("content", None), where)]
    if "tool_calls" in message:
        message["tool_calls"] = [
            _with_arguments(call, where) for call in _json_list(message["tool_calls"], where) or []
        ]
    return message


def _call(value: Any, where: str) -> dict[str, Any]:
    call = _json(value, f"{where}.value")
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise BadSample(Reason.MALFORMED, f"{where}: {shown(value)}; expected a call's name and arguments as JSON")
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def _with_arguments(call: Any, where: str) -> Any:
    """A tool call with its arguments as an object, as templates want them; OpenAI's are JSON in a text."""
    if not isinstance(call, Mapping):
        raise BadSample(Reason.MALFORMED, f"{where}.tool_calls: {shown(call)}; expected an object")
    call = {key: value for key, value in call.items() if value is not None}
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadSample(Reason.MALFORMED, f"{where}.tool_calls: {shown(call)}; expected a function with a name")
    given = function.get("arguments")
    arguments = {} if given is None else _json(given, f"{where}.tool_calls.arguments")
    if not isinstance(arguments, Mapping):
        raise BadSample(Reason.MALFORMED, f"{where}.tool_calls.arguments: {shown(arguments)}; expected an object")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _json_list(value: Any, where: str) -> list[Any] | None:
    found = _json(value, where) if value else None
    if found is not None and not isinstance(found, list):
        raise BadSample(Reason.MALFORMED, f"{where}: {shown(found)}; expected a list")
    return found


def _json(value: Any, where: str) -> Any:
    """A value, or what a text says as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadSample(Reason.MALFORMED, f"{where}: {shown(value)} isn't JSON: {error}") from error


def _prompt_and_completion(row: Mapping[str, Any]) -> list[Message]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        messages: list[Message] = [{"role": "user", "content": prompt}]
    else:
        messages = [_message(turn, f"prompt[{n}]") for n, turn in enumerate(_list(row, "prompt"))]
        messages = [{**turn, "weight": 0} if turn.get("role") == "assistant" else turn for turn in messages]
    if isinstance(completion, str):
        return [*messages, {"role": "assistant", "content": completion}]
    return [*messages, *(_message(turn, f"completion[{n}]") for n, turn in enumerate(_list(row, "completion")))]


def _placed(messages: list[Message], images: list[Any] | None) -> list[Message]:
    """The row's images in their places: `<image>` in a text that isn't an answer's, or an image part without a source.

    Where the row has no key for images, `<image>` is text.
    """
    if images is None:
        return messages
    waiting = list(images)
    places = 0

    def next_image() -> dict[str, Any]:
        nonlocal places
        places += 1
        return {"type": "image", "image": waiting.pop(0) if waiting else None}

    def parts_of(text: str) -> list[dict[str, Any]]:
        first, *others = text.split(MARKER)
        made = [{"type": "text", "text": first}]
        for other in others:
            made += [next_image(), {"type": "text", "text": other}]
        return [part for part in made if part["type"] == "image" or part["text"]]

    def placed(message: Message) -> Message:
        content = message.get("content")
        if message.get("role") == "assistant":
            return message
        if isinstance(content, str):
            return {**message, "content": parts_of(content)} if MARKER in content else message
        if not isinstance(content, list):
            return message
        made: list[Any] = []
        for part in content:
            given = {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else None
            if given and given.get("type") == "image" and not any(key in given for key in _PART_SOURCES):
                made.append({**given, **next_image()})
            elif given and given.get("type") == "text" and MARKER in str(given.get("text")):
                made += parts_of(given["text"])
            else:
                made.append(part)
        return {**message, "content": made}

    messages = [placed(message) for message in messages]
    if places != len(images):
        raise BadSample(
            Reason.COUNT, f"{len(images)} images for {places} places ({MARKER} in a text, or an image part without one)"
        )
    return messages


def _with_media(made: Conversation | Document, media_root: Path | None) -> Conversation | Document:
    """Relative paths of images put below the media root."""
    if media_root is None:
        return made
    if isinstance(made, Document):
        return (
            made
            if isinstance(made.parts, str)
            else Document([_rooted(part, media_root) for part in made.parts], made.id)
        )
    messages = [
        {**message, "content": [_rooted(part, media_root) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in made.messages
    ]
    return Conversation(messages, made.id, made.value_spans, made.tools)


def _rooted(part: Any, media_root: Path) -> Any:
    if not isinstance(part, Mapping):
        return part
    return {key: _path(value, media_root) if key in _PART_SOURCES else value for key, value in part.items()}


def _path(source: Any, media_root: Path) -> Any:
    if isinstance(source, str) and source and "://" not in source and not source.startswith("data:"):
        return str(media_root / source)
    if isinstance(source, Mapping):
        inner = {"url": _path(source.get("url"), media_root)} if source.get("url") is not None else {}
        if source.get("bytes") is None and isinstance(source.get("path"), str):
            inner["path"] = _path(source["path"], media_root)
        return {**source, **inner}
    return source

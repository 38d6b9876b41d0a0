"""Every form of row by hand, and what is said about rows that have none."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from data.bad_sample import BadSample, Reason
from data.chat.forms import read_row
from data.conversation import Conversation, Document

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}

IN_TEXT = {"name": "add", "arguments": '{"a": 1}'}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(source: Any) -> dict[str, Any]:
    return {"type": "image", "image": source}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "source": "web"},
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        ),
        (  # absent keys of a table's column are None
            {
                "messages": [{"role": "user", "content": [{"type": "image", "text": None}, text("q")], "weight": None}],
                "images": ["1.png"],
                "tools": None,
            },
            [{"role": "user", "content": [image("1.png"), text("q")]}],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "<image>a<image>"},
                    {"role": "assistant", "content": "<image>"},
                ],
                "images": ["1.png", "2.png"],
            },
            [
                {"role": "user", "content": [image("1.png"), text("a"), image("2.png")]},
                {"role": "assistant", "content": "<image>"},
            ],
        ),
        (  # without images of the row's own, the marker is text
            {"messages": [{"role": "user", "content": "<image> is a tag"}]},
            [{"role": "user", "content": "<image> is a tag"}],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "<image>\nq"},
                    {"from": "gpt", "value": "a"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "3"},
                ],
                "images": ["1.png"],
                "system": "s",
            },
            [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [image("1.png"), text("\nq")]},
                {"role": "assistant", "content": "a"},
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "content": "3"},
            ],
        ),
        (
            {
                "image": "1.png",
                "conversations": [{"from": "human", "value": "q\n<image>"}, {"from": "gpt", "value": "a"}],
            },
            [{"role": "user", "content": [text("q\n"), image("1.png")]}, {"role": "assistant", "content": "a"}],
        ),
        (
            {"prompt": "<image>q", "completion": "a", "images": ["1.png"]},
            [{"role": "user", "content": [image("1.png"), text("q")]}, {"role": "assistant", "content": "a"}],
        ),
        (
            {
                "prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                "completion": [{"role": "assistant", "content": "b"}],
            },
            [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "weight": 0},
                {"role": "assistant", "content": "b"},
            ],
        ),
        (  # OpenAI's arguments are JSON in a text
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}, "id": None}],
                    }
                ]
            },
            [{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}],
        ),
    ],
)
def test_forms(row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    made = read_row(row, "f:0", None)
    assert isinstance(made, Conversation) and made.id == "f:0"
    assert made.messages == messages


def test_tools_may_be_json_in_a_text() -> None:
    row = {"messages": [{"role": "user", "content": "q"}]}
    for tools in ([{"name": "f"}], '[{"name": "f"}]'):
        assert read_row({**row, "tools": tools}, "f:0", None).tools == [{"name": "f"}]
    for tools in (None, "", []):
        assert read_row({**row, "tools": tools}, "f:0", None).tools is None


def test_text_is_a_document() -> None:
    for content in ("a<image>b", [text("a"), {"type": "image"}, text("b")]):
        made = read_row({"text": content, "images": ["1.png"]}, "f:0", None)
        assert made == Document([text("a"), image("1.png"), text("b")], "f:0")
    assert read_row({"text": "a"}, "f:0", None).parts == "a"


def test_paths_lie_below_the_media_root() -> None:
    uri = "data:image/png;base64," + base64.b64encode(b"x").decode()
    sources = [
        "1.png",
        "/abs.png",
        uri,
        "https://x/y.png",
        {"bytes": None, "path": "2.png"},
        {"bytes": b"x", "path": "3"},
    ]
    row = {"messages": [{"role": "user", "content": [{"type": "image", "image": source} for source in sources]}]}
    row["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": "4.png"}})
    content = read_row(row, "f:0", Path("/media")).messages[0]["content"]
    assert [part.get("image") for part in content[:-1]] == [
        "/media/1.png",
        "/abs.png",
        uri,
        "https://x/y.png",
        {"bytes": None, "path": "/media/2.png"},
        {"bytes": b"x", "path": "3"},
    ]
    assert content[-1]["image_url"] == {"url": "/media/4.png"}


@pytest.mark.parametrize(
    ("row", "reason", "said"),
    [
        ([], Reason.MALFORMED, "the row is"),
        ({"message": []}, Reason.MALFORMED, r"keys \['message'\]; expected messages, conversations"),
        ({"messages": []}, Reason.MALFORMED, "messages: .*expected a list of turns"),
        ({"messages": "q"}, Reason.MALFORMED, "messages: q; expected a list of turns"),
        ({"messages": ["q"]}, Reason.MALFORMED, r"messages\[0\]: q; expected an object"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, Reason.MALFORMED, r"conversations\[0\]: from alien"),
        ({"text": 3}, Reason.MALFORMED, "text: 3"),
        ({"prompt": "q", "completion": 3}, Reason.MALFORMED, "completion: 3"),
        ({"messages": [{"role": "user", "content": "q"}], "images": ["1.png"]}, Reason.COUNT, "1 images for 0 places"),
        ({"messages": [{"role": "user", "content": "<image>"}], "images": ["1", "2"]}, Reason.COUNT, "2 images for 1 "),
        ({"messages": [{"role": "user", "content": "<image><image>"}], "image": "1"}, Reason.COUNT, "1 images for 2"),
        ({"messages": [{"role": "user", "content": "q"}], "tools": "{"}, Reason.MALFORMED, "tools: { isn't JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": ["add"]}]}, Reason.MALFORMED, ".*tool_calls: add"),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, Reason.MALFORMED, ".*value: add isn't JSON"),
        ({"messages": [{"role": "system", "content": "s"}], "system": "t"}, Reason.MALFORMED, "a key system beside"),
    ],
)
def test_rows_without_a_form_are_named(row: Any, reason: Reason, said: str) -> None:
    with pytest.raises(BadSample, match=f"f:0: {said}") as caught:
        read_row(row, "f:0", None)
    assert caught.value.reason == reason


def test_base64_is_never_printed_whole() -> None:
    with pytest.raises(BadSample) as caught:
        read_row(json.loads(json.dumps({"mesages": "A" * 9000, "messages": "B" * 9000})), "f:0", None)
    assert len(str(caught.value)) < 200

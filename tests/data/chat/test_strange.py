"""What strangers bring: each row is trained as it says, or refused with its name, its key and what to do about it."""

from __future__ import annotations

import copy
import gzip
import json
import math
import random
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from test_dataset import dataset_of, processor, rows_of_all_forms, saved  # noqa: F401  a fixture among them
from transformers import Qwen3VLProcessor

from data.bad_sample import BadSample, Reason
from data.chat.splits import SplitRows, split_rows
from data.dataset import ConversationDataset

CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": null}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
DEEP = b'{"prompt": "q", "completion": "a", "tools": [{"type": "function", "x": ' + b"[" * 990 + b"]" * 990 + b"}]}"


def trained(dataset: ConversationDataset, index: int = 0) -> str:
    sample = dataset[index]
    return dataset.processor.tokenizer.decode(sample.input_ids[sample.trained])


def asked(**changes: Any) -> dict[str, Any]:
    """A row with a question about an image, changed in its image part."""
    content = [{"type": "image", "image": "a.png"} | changes, {"type": "text", "text": "Q?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A."}]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": [{"from": ["human"], "value": "q"}]}, r"conversations\[0\]: from \['human'\]; expected one"),
        ({"prompt": "q", "completion": "\ud83d"}, r"messages\[1\]\.content: half of a character at 0 of \\ud83d"),
        ({"text": "a\udc00"}, "text: half of a character"),
        ({"prompt": [{"role": "user", "content": "q", "\ud800": "x"}], "completion": "a"}, r"key \\ud800"),
        ({"prompt": "q", "completion": "a", "system": ["s"]}, r"system: \['s'\]; expected a text"),
        ({"prompt": "<image>q", "completion": "a", "images": []}, "0 images for 1 places"),
        ({"prompt": "<video>q", "completion": "a", "videos": ["v.mp4"]}, "key videos: nothing but images"),
        (DEEP, "(values in values too deeply|not JSON: maximum recursion depth)"),
        (asked(min_pixels=math.inf), "key 'min_pixels' of an image part: inf"),
        (asked(resized_height=math.nan, resized_width=64), "key 'resized_height' of an image part: nan"),
        (asked(max_pixels=10**40), "key 'max_pixels' of an image part: 1000"),
        (asked(image="n" * 5000), "image 0: .*File name too long"),
        (asked(**{"k" * 5000: 1}), r"content\[0\]: a part of type image with keys"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_rows_that_cannot_be_trained_are_named(
    row: dict[str, Any] | bytes,
    said: str,
    tmp_path: Path,
    processor: Qwen3VLProcessor,  # noqa: F811
) -> None:
    saved(tmp_path, "a.png")
    dataset = dataset_of(tmp_path, [row], processor, split="100" if row is DEEP else None)
    with pytest.raises(BadSample, match=f"chats.jsonl:0: .*{said}") as caught:
        dataset.sizes(0)
    assert len(str(caught.value)) < 1500
    str(caught.value).encode()  # as the log is written


def test_plain_text_is_trained(tmp_path: Path, processor: Qwen3VLProcessor) -> None:  # noqa: F811
    dataset = dataset_of(tmp_path, [{"text": "Only text."}, {"text": ["a"]}], processor)
    assert trained(dataset) == "Only text.<|endoftext|>"
    with pytest.raises(BadSample, match=r"chats.jsonl:1: text\[0\]: a; expected an object"):
        dataset.sizes(1)


def test_a_size_that_fits_no_memory_is_too_long(tmp_path: Path, processor: Qwen3VLProcessor) -> None:  # noqa: F811
    """An image that its part makes a trillion pixels large is dropped before anything is made of it."""
    saved(tmp_path, "a.png")
    rows = [
        asked(resized_height=1_000_000, resized_width=1_000_000),
        {"text": [asked(min_pixels=10**9, max_pixels=10**9)["messages"][0]["content"][0]]},
    ]
    dataset = dataset_of(tmp_path, rows, processor)
    assert [dataset.size(index).tokens for index in range(2)] == [0, 0]
    assert "too long" in dataset.size(0).remark


def test_calls_as_openai_writes_them(tmp_path: Path, processor: Qwen3VLProcessor) -> None:  # noqa: F811
    """With the answer's id of its call, and null where the call says null."""
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "c"},
        {"role": "assistant", "content": "Three."},
    ]
    text = trained(dataset_of(tmp_path, [{"messages": turns, "tools": TOOLS}], processor))
    assert "<function=add>" in text and "Three.<|im_end|>" in text
    in_object = copy.deepcopy(turns)
    in_object[1]["tool_calls"][0]["function"]["arguments"] = {"a": None}
    assert trained(dataset_of(tmp_path, [{"messages": in_object, "tools": TOOLS}], processor)) == text
    assert "<parameter=a>" in text


def test_tables_have_the_keys_of_all_rows(tmp_path: Path, processor: Qwen3VLProcessor) -> None:  # noqa: F811
    """A call's arguments in a parquet column don't gain the other calls' as null."""

    def row(arguments: dict[str, int]) -> dict[str, Any]:
        call = {"function": {"name": "add", "arguments": arguments}}
        return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]}

    given = [row({"a": 1}), row({"b": 2})]
    datasets.Dataset.from_list(given).to_parquet(str(tmp_path / "rows.parquet"))
    found = rows_of(tmp_path, tmp_path / "rows.parquet")
    rows = [source[number] for source, number in map(found.find, range(2))]
    assert [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in rows] == [{"a": 1}, {"b": 2}]
    assert rows == given


def rows_of(tmp_path: Path, *given: Path | str, split: str | None = None) -> SplitRows:
    args = Namespace(
        dataset_path=[str(path) for path in given],
        data_cache_path=str(tmp_path / "cache"),
        split=split,
        num_workers=0,
        dataset_provider="chat",
    )
    return split_rows(args, "train")


def test_globs_find_each_file_once(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "a/b").mkdir(parents=True)
    for name in ("a/1.jsonl", "a/b/2.jsonl", "3.jsonl"):
        (folder / name).write_text('{"text": "x"}\n')
    for pattern in ("**", "*", "**/*.jsonl"):
        assert len(rows_of(tmp_path, folder / pattern)) == 3
    for twice in ((folder / "3.jsonl", f"{folder}/./3.jsonl"), (folder / "a", folder / "**/2.jsonl")):
        with pytest.raises(ValueError, match=r"--dataset-path: .*\.jsonl is named twice"):
            rows_of(tmp_path, *twice)


@pytest.mark.parametrize("split", ["nan,1,1", "inf,1", "1,nan"])
def test_splits_that_are_no_numbers(split: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=f"--split {split}: expected up to three weights"):
        rows_of(tmp_path, tmp_path / "rows.jsonl", split=split)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps([{"text": "x" * 99}] * 99).encode())
    for name, content in (
        ("cut.json.gz", whole[: len(whole) // 2]),
        ("turned.json.gz", whole[:40] + bytes(byte ^ 255 for byte in whole[40:60]) + whole[60:]),
        ("deep.json", b"[" * 100_000),
        ("zeros.parquet", bytes(4000)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"--dataset-path .*{name}: "):
            rows_of(tmp_path, tmp_path / name)
    with pytest.raises(ValueError, match="--dataset-path: an empty name"):
        rows_of(tmp_path, "")


VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 3.5, math.nan, math.inf, 10**30, "", " ", "\0", "\ud800", "\ue000", "<|im_end|>", "</think>"),
    *("<image>", "<image><image>", "{{ 1 }}", "{% raw %}", "[]", "{}", "null", '{"name": 3}', '{"name": "f"}'),
    *([], [[]], {}, [None], ["a"], [1], {"a": 1}, {"type": "image"}, {"type": "text", "text": None}, {"url": None}),
    *({"url": "a.png", "detail": "high"}, "http://x/y.png", "data:,", "data:image/png;base64,AAAA", "/dev/zero"),
    *("a" * 5000, "assistant", "tool", "developer", {"bytes": None, "path": None}, {"bytes": "AAAA"}),
    *({"role": "user", "content": "z"}, [{"role": "user", "content": "z"}], [{"role": "assistant", "content": "z"}]),
)
KEYS = (
    *("role", "content", "value", "from", "image", "images", "text", "type", "weight", "tools", "tool_calls", "system"),
    *("reasoning_content", "name", "min_pixels", "max_pixels", "resized_height", "resized_width", "messages", "url"),
    *("conversations", "prompt", "completion", "image_url", "bytes", "path", "base64", "", "arguments", "function"),
)


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*above, key)
        yield from places(entry, (*above, key))


def mutated(row: dict[str, Any], numbers: random.Random) -> dict[str, Any]:
    """A value replaced, removed, renamed or repeated, or a key too many, once to three times."""
    row = copy.deepcopy(row)
    for _ in range(numbers.choice((1, 1, 1, 2, 3))):
        found = list(places(row))
        if not found:
            break
        *above, last = numbers.choice(found)
        parent: Any = row
        for key in above:
            parent = parent[key]
        kind = numbers.randrange(4)
        if kind == 0:
            parent[last] = copy.deepcopy(numbers.choice(VALUES))
        elif kind == 1:
            value = parent.pop(last)
            if isinstance(parent, dict) and numbers.random() < 0.5:
                parent[numbers.choice(KEYS)] = value
        elif isinstance(parent, list):
            parent.insert(last, copy.deepcopy(numbers.choice((parent[last], *VALUES))))
        else:
            parent[numbers.choice(KEYS)] = copy.deepcopy(numbers.choice(VALUES))
    return row


def test_mutated_rows_are_trained_or_named(tmp_path: Path, processor: Qwen3VLProcessor) -> None:  # noqa: F811
    """Six hundred rows of all forms, bent at random: nothing but `BadSample` comes of the broken ones."""
    numbers = random.Random(0)
    call = [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}]
    last = {"role": "assistant", "content": "d", "reasoning_content": "r", "weight": 1}
    forms = [
        *rows_of_all_forms(saved(tmp_path, "a.png")),
        {"text": "Hello <image> you", "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "q"}, *call, last], "tools": TOOLS},
    ]
    rows = [mutated(numbers.choice(forms), numbers) for _ in range(600)]
    outcomes = Counter[str]()
    for train_on in ("all", "exact"):
        dataset = dataset_of(tmp_path, rows, processor, train_on=train_on)
        for index in range(len(dataset)):
            try:
                for part, size in enumerate(dataset.sizes(index)):
                    outcomes[size.remark or "whole"] += 1
                    if size.tokens:
                        sample = dataset.sample(index, part)
                        assert (len(sample.input_ids), int(sample.trained[1:].sum())) == (size.tokens, size.trained)
            except BadSample as error:
                outcomes[str(error.reason)] += 1
                assert f"chats.jsonl:{index}" in str(error) and len(str(error)) < 1500
    print(dict(outcomes))
    assert outcomes["whole"] > 200 and outcomes[Reason.MALFORMED] > 300

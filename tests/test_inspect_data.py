"""scripts/inspect_data.py as it is called, in this process: what it prints, its page, and its list."""

from __future__ import annotations

import base64
import io
import json
import runpy
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from data.receipts import dataset as receipts

ROOT = Path(__file__).parents[1]
KEYS = ["id", "tokens", "trained_tokens", "images", "grids", "outcome", "trained_text"]
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Calls the script, with its caches in the test's folder; what it printed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def call(*flags: str | Path) -> str:
        words = ["inspect_data.py", "--data-cache-path", tmp_path / "cache", "--model-variant", "tiny", *flags]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        runpy.run_path(str(ROOT / "scripts/inspect_data.py"), run_name="__main__")
        return capsys.readouterr().out

    return call


class Page(HTMLParser):
    """A page's spans by class, its images, headings and table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.spans: list[tuple[str, str]] = []
        self.images: list[Image.Image] = []
        self.words: dict[str, list[str]] = {"h2": [], "td": [], "p": []}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        given = dict(attributes)
        if tag == "img":
            head, content = given["src"].split(",", 1)
            assert head == "data:image/png;base64"
            self.images.append(Image.open(io.BytesIO(base64.b64decode(content))))
        elif tag != "meta":
            self.open.append(tag)
            if tag == "span":
                self.spans.append((given["class"], ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "span":
            kind, text = self.spans[-1]
            self.spans[-1] = kind, text + data
        elif self.open and self.open[-1] in self.words:
            self.words[self.open[-1]].append(data)


def test_chats_with_broken_rows(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (64, 128), (0, 200, 0)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-40])
    rows = [
        {"prompt": "<image>Q?", "completion": "<b>&amp; \x1b[31mred", "images": ["a.png"]},
        {"prompt": "<image>Q?", "completion": "A.", "images": ["missing.png"]},
        {"prompt": "Q?", "completion": ""},
        {"prompt": "<image>Q?", "completion": "A.", "images": ["cut.png"]},
        {
            "conversations": [
                {"from": who, "value": text} for who, text in zip(("human", "gpt") * 2, "qrst", strict=True)
            ]
        },
        {"question": "Q?"},
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    page, listed = tmp_path / "page.html", tmp_path / "list.json"
    printed = run("--dataset-path", file, "--split", "1,0,0", "--html", page, "--json", listed, "--samples", "6")
    found = json.loads(listed.read_text())
    assert [list(entry) for entry in found] == [KEYS] * len(rows)
    assert found[0] | {"tokens": 0} == {
        "id": f"{file}:0",
        "tokens": 0,
        "trained_tokens": found[0]["trained_tokens"],
        "images": 1,
        "grids": [[1, 8, 4]],
        "outcome": "",
        "trained_text": ["<b>&amp; \x1b[31mred<|im_end|>"],
    }
    assert found[0]["tokens"] > found[0]["trained_tokens"] + 8 > 10
    assert found[4]["trained_text"] == ["r<|im_end|>", "t<|im_end|>"] and found[4]["grids"] == []
    said = [entry["outcome"] for entry in found]
    assert "missing file" in said[1] and "chats.jsonl:1: image 0" in said[1] and "missing.png" in said[1]
    assert "answers are empty" in said[2] and said[3].startswith("broken: ") and "keys ['question']" in said[5]
    assert found[5]["tokens"] == found[5]["trained_tokens"] == 0 and found[5]["trained_text"] == []

    shown = Page(page.read_text())
    assert next(text for kind, text in shown.spans if kind == "trained") == "<b>&amp; \x1b[31mred<|im_end|>"
    assert shown.spans[[kind for kind, _ in shown.spans].index("image")][1] == "[image: 8 tokens]"
    assert [image.size for image in shown.images] == [(64, 128)]
    assert shown.words["h2"] == [entry["id"] for entry in found]
    facts = dict(zip(shown.words["td"][::2], shown.words["td"][1::2], strict=True))
    assert (facts["rows"], facts["samples"], facts["broken: missing file"]) == ("6", "3", "1")
    assert facts["broken: malformed conversation"] == "1" and "packs" in facts and "padding" in facts

    assert "\x1b" not in printed and "\\x1b[31mred" in printed
    assert "broken: missing file" in printed and "all broken samples:" in printed


@pytest.mark.parametrize("provider", ["mock", "ragged"])
def test_samples_without_text(provider: str, run: Run, tmp_path: Path) -> None:
    """Ids stand for the words."""
    flags = ("--seq-length", "64", "--image-size", "64", "--image-seq-length", "4")
    printed = run("--dataset-provider", provider, *flags, "--html", tmp_path / "page.html", "--samples", "8")
    assert f"{provider}/train/0: " in printed
    kinds = {kind for kind, _ in Page((tmp_path / "page.html").read_text()).spans}
    assert {"trained", "image"} <= kinds


@pytest.mark.parametrize("provider", ["receipts", "cord_v2"])
def test_receipts(provider: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = receipts.ensure_receipts(tmp_path / "drawn", sizes={"train": 2, "validation": 3, "test": 1})
    monkeypatch.setattr(receipts, "ensure_receipts", lambda root: drawn)
    flags = ("--dataset-provider", provider, "--of", "validation", "--json", tmp_path / "list.json")
    run(*flags, *(("--dataset-path", drawn) if provider == "cord_v2" else ()))
    found = json.loads((tmp_path / "list.json").read_text())
    assert [(list(entry), entry["id"]) for entry in found] == [(KEYS, f"{provider}/validation/{n}") for n in range(3)]
    assert all(entry["images"] == 1 and entry["trained_text"][0].endswith("<|im_end|>") for entry in found)


def test_refusals(run: Run, tmp_path: Path) -> None:
    for flags in (("--dataset-path", tmp_path / "no.jsonl"), ("--html", tmp_path / "no/page.html")):
        with pytest.raises(SystemExit) as ended:
            run(*flags)
        assert ended.value.code != 0

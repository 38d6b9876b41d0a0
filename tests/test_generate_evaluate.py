"""scripts/generate.py and scripts/evaluate.py as they are called, in this process."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from data.cord_v2 import CordV2
from data.receipts import dataset as receipts
from evaluation.model import Answer, HfModel
from models.qwen35_vl.configuration import VARIANTS
from tests.trained_folder import write_trained_folder

ROOT = Path(__file__).parents[1]
# Untied: random tied weights answer with the last token again and again.
ARCHITECTURE = VARIANTS["tiny"].replace(mtp_num_layers=0, tie_word_embeddings=False)
SIZES = {"train": 40, "validation": 2, "test": 12}
Run = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_folder(tmp_path_factory.mktemp("trained") / "hf", ARCHITECTURE)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return receipts.ensure_receipts(tmp_path_factory.mktemp("receipts"), sizes=SIZES)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], drawn: Path, tmp_path: Path) -> Run:
    """Calls a script; returns what it printed to stdout. Receipts are the few that are drawn for the test."""
    monkeypatch.setattr(receipts, "ensure_receipts", lambda root: drawn)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def call(script: str, *flags: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        return capsys.readouterr().out

    return call


def rows(printed: str) -> dict[str, list[str]]:
    """The table's rows by their first cell."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in cells[2:]}


@pytest.fixture
def perfect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample is answered as it is trained."""

    def answer(self: HfModel, samples, max_new_tokens: int) -> list[Answer]:
        ids = [sample.input_ids[sample.trained].tolist()[:-1] for sample in samples]
        assert all(len(row) < max_new_tokens for row in ids)
        return [Answer(self.processor.tokenizer.decode(row), finished=True) for row in ids]

    monkeypatch.setattr(HfModel, "prompts", lambda self, samples: samples)
    monkeypatch.setattr(HfModel, "generate", answer)


def test_generate_answers(run: Run, folder: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = datasets.Dataset.from_parquet(str(drawn / "data/test-00000-of-00001.parquet"))[0]
    row["image"].save(tmp_path / "receipt.png")
    flags = ("--load", folder, "--prompt", "Read shop.", "--max-new-tokens", "5")
    seen = run("generate.py", *flags, "--image", tmp_path / "receipt.png")
    assert seen == run("generate.py", *flags, "--image", tmp_path / "receipt.png") != run("generate.py", *flags)
    samples = []
    prompts = HfModel.prompts
    monkeypatch.setattr(HfModel, "prompts", lambda self, rows: samples.extend(rows) or prompts(self, rows))
    run("generate.py", *flags, *("--image", tmp_path / "receipt.png") * 2, "--max-pixels", "5000")
    assert len(samples[0].grid_thw) == 2 and len(samples[0].pixel_values) * 16**2 <= 2 * 5000
    drawn_at = [run("generate.py", *flags, "--temperature", "5", "--seed", seed) for seed in "112"]
    assert drawn_at[0] == drawn_at[1] != drawn_at[2]


def test_generate_refuses(run: Run, folder: Path, tmp_path: Path) -> None:
    for load, image, reason in (
        (tmp_path / "nowhere", ROOT / "README.md", "no such folder"),
        (folder, ROOT / "README.md", "README.md: not an image of a format that is opened"),
    ):
        with pytest.raises(SystemExit, match=f"Refused: .*{reason}"):
            run("generate.py", "--load", load, "--image", image, "--prompt", "What is it?")


@pytest.mark.parametrize("provider", ["receipts", "cord_v2"])
def test_a_perfect_model_gets_everything(
    run: Run, folder: Path, drawn: Path, tmp_path: Path, perfect: None, provider: str
) -> None:
    flags = ("--load", folder, "--dataset-provider", provider, "--dataset-path", drawn, "--batch-size", "5")
    printed = run("evaluate.py", *flags, "--answers", tmp_path / "answers.jsonl")
    assert f"{provider}/test: 12 answers, 0 not readable, 0 cut off" in printed
    table = rows(printed)
    names = {"store_info.nm", "payment_info.method", "payment_info.currency", "total.total_price", "menu.price"}
    assert names <= table.keys() and "shop" not in table
    assert {match for _, match, *_ in table.values()} == {"100.0%"}
    assert table["whole answer"][0] == "12"
    assert "store_info.nm" in re.search("above 2 times the guess: (.*)", printed)[1]
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {line["id"] for line in written} == {f"{provider}/test/{index}" for index in range(12)}
    assert all(line["answer"] == line["truth"] for line in written)
    if provider == "cord_v2":  # everything is asked of every receipt: the counts are the ground truth's
        truths = [json.loads(row["ground_truth"])["gt_parse"] for row in CordV2(str(drawn), "test")._rows]
        shops = [truth["store_info"]["nm"] for truth in truths]
        assert table["store_info.nm"][0] == "12"
        assert table["menu.nm"][0] == str(sum(len(truth["menu"]) for truth in truths))
        training = [json.loads(row["ground_truth"])["gt_parse"] for row in CordV2(str(drawn), "train")._rows]
        trained = [truth["store_info"]["nm"] for truth in training]
        guess = max(dict.fromkeys(trained), key=trained.count)
        share = max(shops.count(guess) / len(shops), trained.count(guess) / len(trained))
        assert table["store_info.nm"][3] == f"{share:.1%}"


def test_an_untrained_model_gets_nothing(run: Run, folder: Path) -> None:
    printed = run("evaluate.py", "--load", folder, "--samples", "3", "--max-new-tokens", "4")
    assert "receipts/test: 3 answers, 3 not readable, 3 cut off" in printed
    assert {match for _, match, *_ in rows(printed).values()} == {"0.0%"}
    loss = float(re.search(r"loss per trained token: ([\d.]+)", printed)[1])
    assert loss > 6  # about the logarithm of 1024 ids or worse


def test_evaluate_refuses(run: Run, folder: Path) -> None:
    for flags, reason in (
        (("--dataset-provider", "mock"), "mock: has no answers to match; expected receipts, cord_v2"),
        (("--seq-length", "8"), "12 samples, --seq-length 8: receipts/test/0 .dropped: first question and answer too"),
        (("--answers", folder / "no/such/folder"), "No such file or directory: .*no/such/folder"),
    ):
        with pytest.raises(SystemExit, match=f"Refused: .*{reason}"):
            run("evaluate.py", "--load", folder, *flags)


def chats(file: Path, answers: list[str]) -> tuple[str | Path, ...]:
    """Flags that evaluate on conversations with these answers."""
    file.write_text("".join(json.dumps({"prompt": "Read it.", "completion": answer}) + "\n" for answer in answers))
    cache = ("--data-cache-path", file.parent / "cache")
    return "--dataset-provider", "chat", "--dataset-path", file, *cache, "--batch-size", "2"


def test_fields_of_ones_own(run: Run, folder: Path, tmp_path: Path, perfect: None) -> None:
    """They keep their names; a text that the tokenizer composes is what the file means."""
    answers = [json.dumps({"total": "Cre\u0300me", "items": [{"prix": 3}]}, ensure_ascii=False) for _ in range(3)]
    table = rows(run("evaluate.py", "--load", folder, *chats(tmp_path / "test.jsonl", answers)))
    assert table.keys() == {"total", "items.prix", "whole answer"}
    assert {(count, match) for count, match, *_ in table.values()} == {("3", "100.0%")}


def test_true_answers_are_read_first(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HfModel, "generate", lambda *_: pytest.fail("generated before the truths were read"))
    flags = chats(tmp_path / "test.jsonl", ['{"a": 1}', "Red.", '{"a": 1}', "Blue."])
    with pytest.raises(
        SystemExit, match=r"(?s)Refused: .*test.jsonl:1: .*without fields.*Red.*\n.*test.jsonl:3: .*Blue"
    ):
        run("evaluate.py", "--load", folder, *flags)
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "assistant", "content": ["a"]}]}))
    with pytest.raises(SystemExit, match=r"Refused: .*test.jsonl:0: messages\[0\]"):
        run("evaluate.py", "--load", folder, *flags)


def test_a_killed_evaluation_keeps_its_answers(
    run: Run, folder: Path, tmp_path: Path, perfect: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, calls = HfModel.generate, []

    def killed(self: HfModel, samples, max_new_tokens: int) -> list[Answer]:
        if calls:
            raise KeyboardInterrupt
        calls.append(len(samples))
        return answer(self, samples, max_new_tokens)

    monkeypatch.setattr(HfModel, "generate", killed)
    flags = chats(tmp_path / "test.jsonl", ['{"a": 1}'] * 5)
    with pytest.raises(KeyboardInterrupt):
        run("evaluate.py", "--load", folder, *flags, "--answers", tmp_path / "answers.jsonl")
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert calls == [2] and [row["answer"] for row in written] == ['{"a": 1}'] * 2
    assert all(f"test.jsonl:{number}" in row["id"] for number, row in enumerate(written))

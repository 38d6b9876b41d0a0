"""The registry of datasets: names without torch, one line to add another."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from data import DATASET_PROVIDERS, DatasetProvider, find_provider
from data.preflight import refusals


def test_names_are_listed_without_torch() -> None:
    """The launcher's preflight has three seconds."""
    code = "import sys, data; print(*data.DATASET_PROVIDERS, 'torch' in sys.modules, 'numpy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["mock", "ragged", "receipts", "cord_v2", "chat", "False", "False"]


def test_entries_are_under_their_names() -> None:
    assert {name: provider.name for name, provider in DATASET_PROVIDERS.items()} == {
        name: name for name in DATASET_PROVIDERS
    }


def test_mock_needs_no_processor() -> None:
    assert DATASET_PROVIDERS["mock"].processor(Namespace(), {}) is None


def test_a_provider_of_ones_own_is_imported_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "captions_of_mine.py").write_text(
        "from data import DatasetProvider\n"
        "def build(args, split, processor, model_inputs): return split\n"
        "provider = DatasetProvider('mine', False, build)\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = find_provider("captions_of_mine:build")
    assert (found.needs_processor, found.build(Namespace(), "train", None, None)) == (True, "train")
    assert find_provider("captions_of_mine:provider") == DatasetProvider("mine", False, found.build)
    for name, said in (
        ("captions_of_mine:nothing", "has no attribute 'nothing'; is its folder on PYTHONPATH"),
        ("captions_of_mine:number", "a int; expected a function"),
        ("nowhere.to_be:found", "No module named"),
        ("mok", "expected mock, ragged, receipts"),
    ):
        with pytest.raises(ValueError, match=f"--dataset-provider {name}: .*{said}"):
            find_provider(name)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import sys; sys.exit()", r"importing .* failed: SystemExit\(\)"),
        ("def build(:", "importing .* failed: SyntaxError"),
        ("1 / 0", "importing .* failed: ZeroDivisionError"),
        ("def build(*_): raise SystemExit(0)", r"for the train split, it left the program \(SystemExit\(0\)\)"),
        ("def build(*_): return None", "it gave a NoneType, which has no __len__, .*expected a data.sizes.SampleData"),
        ("def build(*_): return [1]", "it gave a list, which has no size, name, fingerprint"),
    ],
)
def test_a_provider_of_ones_own_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    name = f"own_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"--dataset-provider {name}:build: .*{said}"):
        find_provider(f"{name}:build").open(Namespace(), "train", None, None)


def test_flags_that_cannot_work_are_refused_early(tmp_path: Path) -> None:
    def refused(**changes: object) -> str:
        given = {
            "dataset_provider": "chat",
            "dataset_path": [str(tmp_path)],
            "media_root": None,
            "max_bad_fraction": 0.05,
            "sample_timeout": 0.0,
        }
        return "\n".join(refusals(Namespace(**{**given, "chat_template_kwargs": "{}", **changes})))

    assert refused() == ""
    assert refused(dataset_path=["owner/name"]) == ""
    assert "needs --dataset-path" in refused(dataset_path=None)
    assert "no such file or folder" in refused(dataset_path=["nowhere.jsonl"])
    assert "no file has such a name" in refused(dataset_path=[f"{tmp_path}/*.jsonl"])
    assert "reads no network" in refused(dataset_path=["https://example.com/a.jsonl"])
    assert "receipts reads one" in refused(dataset_provider="receipts", dataset_path=["a", "b"])
    assert "PYTHONPATH" in refused(dataset_provider="nowhere.to_be:found", dataset_path=None)
    assert "--media-root" in refused(media_root="/nowhere")
    assert "--max-bad-fraction 5" in refused(max_bad_fraction=5.0)
    assert "--sample-timeout -1" in refused(sample_timeout=-1.0)
    for arguments in ("{", "[1]", "enable_thinking"):
        assert "--chat-template-kwargs" in refused(chat_template_kwargs=arguments)

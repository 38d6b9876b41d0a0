"""scripts/check_export.py's findings: none in a folder that can be served, and each thing that a server would miss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.export_check import check_export, report
from tests.hf_generations import GENERATIONS, tensors_of, write_generation


def edit(file: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({k: v for k, v in {**content, **changes}.items() if v is not None}))

    return change


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def no_dtype(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["dtype"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", GENERATIONS)
def test_a_folder_that_can_be_served(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_generation(tmp_path / "hf", name)
    assert report(tmp_path / "hf", generate=True)
    printed = capsys.readouterr()
    assert (
        printed.out == f"{tmp_path / 'hf'}: everything is there, and an answer ends\n" and "notice" not in printed.err
    )


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (remove("generation_config.json"), "generation_config.json: No such file or directory; answers would run on"),
        (edit("generation_config.json", eos_token_id=1014), "eos_token_id [1014] lacks 1016, the end of a turn"),
        (edit("generation_config.json", pad_token_id=None), "generation_config.json: it has no pad_token_id"),
        (remove("preprocessor_config.json"), "tokenizer and processor: "),
        (edit("tokenizer_config.json", chat_template=None), "it has no chat template"),
        (
            edit("config.json", architectures=["Qwen3_5MoeForConditionalGeneration"]),
            "transformers' class is Qwen3_5For",
        ),
        (no_dtype, "config.json: it has no dtype"),
    ],
)
def test_what_a_server_would_miss(spoil: Callable[[Path], None], problem: str, tmp_path: Path) -> None:
    write_generation(tmp_path / "hf", "3.5-0.8B")
    spoil(tmp_path / "hf")
    problems = check_export(tmp_path / "hf", generate=False).problems
    assert any(problem in found for found in problems), problems


def test_tensors_of_another_class(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = tensors_of(GENERATIONS["3.5-0.8B"])
    del tensors["model.visual.merger.norm.bias"]
    tensors["model.visual.surprise"] = tensors["mtp.norm.weight"].float()
    tensors["mtp.norm.weight"] = tensors["mtp.norm.weight"].float()
    write_generation(tmp_path / "hf", "3.5-0.8B")
    for file in [*(tmp_path / "hf").glob("*.safetensors"), tmp_path / "hf/model.safetensors.index.json"]:
        file.unlink()
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    found = check_export(tmp_path / "hf", generate=False)
    assert "model.visual.merger.norm.bias: missing, and transformers' class has it" in found.problems
    assert "model.visual.surprise: transformers' class has no such tensor" in found.problems
    (notice,) = found.notices
    assert notice.startswith("2 tensors, m") and notice.endswith("are F32; released folders have BF16")


def test_an_answer_that_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the files look right and generate doesn't stop at the turn's end."""
    from evaluation import export_check

    write_generation(tmp_path / "hf", "3.5-0.8B")
    edit("generation_config.json", eos_token_id=1014)(tmp_path / "hf")
    monkeypatch.setattr(export_check, "_description", lambda *_: ())
    assert check_export(tmp_path / "hf").problems == ["generate: goes on after the turn's end (5 tokens instead of 3)"]

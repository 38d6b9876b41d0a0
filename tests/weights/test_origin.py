"""The small files of exports: one processor's files and no others, settings that end an answer, config.json's words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.processor import generation_settings, read_processor
from data.processor_files import VISION_TOKENS
from data.receipts.processor import build_processor
from models.qwen35_vl.configuration import VARIANTS
from tests.hf_generations import GENERATIONS, small_files, write_generation
from weights.folder import TEXT_AND_IMAGE_FILES, HfFolder
from weights.origin import HfOrigin, RunProcessor, write_hf_folder

TINY = VARIANTS["tiny"]


@pytest.fixture(scope="module")
def built() -> RunProcessor:
    config = TINY.to_hf()
    processor = build_processor("tiny", {name: config[name] for name in VISION_TOKENS})
    return RunProcessor(processor, generation_settings(processor))


def settings_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "generation_config.json").read_text())


def test_a_run_from_scratch_ends_its_answers_and_serves_old_and_new_readers(
    built: RunProcessor, tmp_path: Path
) -> None:
    write_hf_folder(tmp_path, TINY.to_hf(), built, HfOrigin(), with_record=False)
    assert settings_of(tmp_path) == {"eos_token_id": [1016, 1014], "pad_token_id": 1014}
    names = {file.name for file in tmp_path.iterdir()}
    assert {"processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"} <= names
    nested = json.loads((tmp_path / "processor_config.json").read_text())
    for part, file in (("image_processor", "preprocessor_config"), ("video_processor", "video_preprocessor_config")):
        assert json.loads((tmp_path / f"{file}.json").read_text()) == nested[part]


@pytest.mark.parametrize("name", ["3.5-0.8B", "3.6-35B-A3B"])
def test_another_processor_replaces_all_files_of_the_folder_s(built: RunProcessor, name: str, tmp_path: Path) -> None:
    write_generation(tmp_path / "hf", name)
    origin = HfOrigin(tmp_path / "hf", HfFolder.open(tmp_path / "hf").dtypes)
    write_hf_folder(tmp_path / "out", GENERATIONS[name].architecture.to_hf(), built, origin, with_record=False)
    write_hf_folder(tmp_path / "scratch", TINY.to_hf(), built, HfOrigin(), with_record=False)
    own = {file: content for file, content in small_files(tmp_path / "out").items() if file in TEXT_AND_IMAGE_FILES}
    fresh = small_files(tmp_path / "scratch")
    assert own == {file: content for file, content in fresh.items() if file in TEXT_AND_IMAGE_FILES}
    assert (tmp_path / "out/README.md").is_file()
    assert small_files(tmp_path / "out")["config.json"] == small_files(tmp_path / "hf")["config.json"]


def test_a_named_processor_s_files_come_as_they_are(tmp_path: Path) -> None:
    write_generation(tmp_path / "hf", "3.6-35B-A3B")
    write_generation(tmp_path / "other", "3.5-0.8B")
    processor = read_processor(str(tmp_path / "other"))
    origin = HfOrigin(tmp_path / "hf", {}, tmp_path / "other")
    run = RunProcessor(processor, generation_settings(processor))
    config = GENERATIONS["3.6-35B-A3B"].architecture.to_hf()
    for _ in range(2):  # again over what is there, as a resumed run does
        write_hf_folder(tmp_path / "out", config, run, origin, with_record=False)
        expected, found = small_files(tmp_path / "other"), small_files(tmp_path / "out")
        kept = {"config.json", "README.md", "generation_config.json"}
        assert {k: v for k, v in found.items() if k not in kept} == {k: v for k, v in expected.items() if k not in kept}


@pytest.mark.parametrize(
    ("old", "stops"),
    [
        ({"eos_token_id": [1016, 1014], "pad_token_id": 1014, "top_k": 20}, [1016, 1014]),
        ({"eos_token_id": 1014, "pad_token_id": 1014, "top_k": 20}, [1016, 1014]),  # a base model's
        ({"top_k": 20}, [1016, 1014]),
        ({"eos_token_id": [1016, 1014], "pad_token_id": None, "top_k": 20}, [1016, 1014]),
    ],
)
def test_generation_settings_are_completed(built: RunProcessor, old: dict, stops: list[int], tmp_path: Path) -> None:
    write_generation(tmp_path / "hf", "3.5-0.8B")
    (tmp_path / "hf/generation_config.json").write_text(json.dumps(old))
    origin = HfOrigin(tmp_path / "hf", {}, tmp_path / "hf")
    write_hf_folder(tmp_path / "out", TINY.to_hf(), built, origin, with_record=False)
    found = settings_of(tmp_path / "out")
    assert found == {**old, "eos_token_id": stops, "pad_token_id": 1014}
    same_bytes = small_files(tmp_path / "out")["generation_config.json"] == json.dumps(old).encode()
    assert same_bytes == (old.get("eos_token_id") == stops and old["pad_token_id"] == 1014)

"""The command line's HuggingFace flags: what --load-hf implies, and what is refused before anything heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from arguments import Refused, preflight
from models.qwen35_vl.configuration import VARIANTS
from tests.command_lines import LAPTOP, SIZES
from tests.hf_folders import random_tensors, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "moe"
    write_folder(path, VARIANTS["tiny_moe"], shards=2)
    return path


def accepted(*flags: str) -> Namespace:
    return preflight([*SIZES, *flags], LAPTOP, 1).args


def refused(*flags: str) -> str:
    with pytest.raises(Refused) as error:
        accepted(*flags)
    return str(error.value)


def test_a_folder_gives_the_architecture(folder: Path) -> None:
    command_line = preflight([*SIZES, "--load-hf", str(folder)], LAPTOP, 1)
    assert command_line.config == VARIANTS["tiny_moe"]
    assert command_line.args.hf_processor_path is None


def test_a_folder_gives_the_processor_unless_another_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", VARIANTS["tiny"])
    (tmp_path / "a/preprocessor_config.json").write_text("{}")
    assert accepted("--load-hf", str(tmp_path / "a")).hf_processor_path == str(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/processor_config.json").write_text("{}")
    named = accepted("--load-hf", str(tmp_path / "a"), "--hf-processor-path", str(tmp_path / "b"))
    assert named.hf_processor_path == str(tmp_path / "b")


@pytest.mark.parametrize(
    ("flags", "ours", "theirs"),
    [
        (("--num-layers", "8"), "num_layers is 8", "4"),
        (("--hidden-size", "256"), "hidden_size is 256", "128"),
        (("--model-variant", "tiny"), "num_experts is None", "4"),
        (("--rotary-base", "10000"), "rotary_base is 10000", "10000000"),
        (("--vision-num-layers", "3"), "vision.num_layers is 3", "2"),
        (("--image-token-id", "7"), "token_ids.image is 7", "1020"),
    ],
)
def test_flags_that_describe_another_model(folder: Path, flags: tuple[str, ...], ours: str, theirs: str) -> None:
    assert f"{ours} by the flags and {theirs} in the folder's config.json" in refused("--load-hf", str(folder), *flags)


def test_a_hub_name_is_checked_by_its_description_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's check shouldn't wait for gigabytes; training fetches them before it starts."""
    import huggingface_hub

    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, "*.safetensors" in allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    write_folder(tmp_path / "snapshot", VARIANTS["tiny"])
    weights = (tmp_path / "snapshot/model.safetensors").read_bytes()
    (tmp_path / "snapshot/model.safetensors").unlink()
    flags = [*SIZES, "--load-hf", "Qwen/Qwen3.5-Tiny"]
    args = preflight(flags, LAPTOP, 1).args
    assert (args.load_hf, args.hf_config) == (str(tmp_path / "snapshot"), str(tmp_path / "snapshot"))
    with pytest.raises(Refused, match="it has no safetensors file"):
        preflight(flags, LAPTOP, 1, with_weights=True)
    (tmp_path / "snapshot/model.safetensors").write_bytes(weights)
    preflight(flags, LAPTOP, 1, with_weights=True)
    assert asked == [("Qwen/Qwen3.5-Tiny", False), ("Qwen/Qwen3.5-Tiny", True), ("Qwen/Qwen3.5-Tiny", True)]


def test_positions_and_mtp_are_the_run_s_choice(folder: Path) -> None:
    args = accepted("--load-hf", str(folder), "--max-position-embeddings", "65536", "--mtp-num-layers", "0")
    assert (args.max_position_embeddings, args.mtp_num_layers) == (65536, 0)


def test_tensors_are_compared_with_the_model(tmp_path: Path) -> None:
    tensors = random_tensors(VARIANTS["tiny"])
    del tensors["mtp.norm.weight"]
    write_folder(tmp_path / "hf", VARIANTS["tiny"], tensors)
    assert "mtp.norm.weight: missing" in refused("--load-hf", str(tmp_path / "hf"))
    (tmp_path / "hf/model.safetensors").write_bytes(b"")
    assert "model.safetensors is cut short or damaged" in refused("--load-hf", str(tmp_path / "hf"))
    assert "no such folder" in refused("--load-hf", str(tmp_path / "none"))


def test_another_architecture(tmp_path: Path) -> None:
    tmp_path.joinpath("config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "model_type 'llama'" in refused("--load-hf", str(tmp_path))


def test_where_to_save(folder: Path, tmp_path: Path) -> None:
    assert f"--save-hf {folder}: it is there already and has a model in it" in refused("--save-hf", str(folder))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    other = str(tmp_path / "other")
    assert "it is there already and has other files in it, notes.txt for one" in refused("--save-hf", other)
    assert accepted("--save-hf", other, "--save-hf-interval", "5").save_hf == other
    assert "--save-hf-interval 5: needs --save-hf DIR" in refused("--save-hf-interval", "5")
    assert "--save-hf-interval 0: " in refused("--save-hf", str(tmp_path), "--save-hf-interval", "0")
    assert "--max-shard-size 'many' isn't a size" in refused("--max-shard-size", "many")
    assert accepted("--save-hf", str(tmp_path), "--save-hf-interval", "5").save_hf_interval == 5


def test_an_architecture_without_a_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from models import MODEL_REGISTRY

    monkeypatch.setitem(MODEL_REGISTRY, "bare", replace(MODEL_REGISTRY["qwen35_vl"], hf_weights=None))
    assert "--save-hf: bare has no table of HuggingFace weights" in refused("--model-arch", "bare", "--save-hf", "x")


def test_checking_a_folder_imports_neither_torch_nor_megatron(folder: Path) -> None:
    program = (
        "import sys, arguments\n"
        "arguments.preflight_or_exit(sys.argv[1:])\n"
        "assert not {'torch', 'megatron.core', 'transformers'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", program, *SIZES, "--load-hf", str(folder)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])

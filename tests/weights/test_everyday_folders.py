"""Folders as people have them: saved by transformers, quantised, with an adapter, with buffers, with a tied head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.command_lines import accepted, refused
from tests.hf_folders import assert_same, read_folder
from tests.hf_generations import DENSE, GENERATIONS, small_files, tensors_of, write_generation
from weights.checkpoint import export_checkpoint, import_folder
from weights.folder import FolderError

NAME = "3.5-0.8B"


def write(path: Path, tensors: dict[str, Tensor] | None = None, **text: Any) -> Path:
    """The 0.8B-like folder with other tensors in one file, and with changes in text_config (None takes a key out)."""
    write_generation(path, NAME)
    config = json.loads((path / "config.json").read_text())
    config["text_config"] = {k: v for k, v in {**config["text_config"], **text}.items() if v is not None}
    (path / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        for file in [*path.glob("*.safetensors"), path / "model.safetensors.index.json"]:
            file.unlink()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def own_tensors() -> dict[str, Tensor]:
    return tensors_of(GENERATIONS[NAME])


def without_mtp(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}


def layers_of_mtp(folder: Path) -> int | None:
    return json.loads((folder / "config.json").read_text())["text_config"].get("mtp_num_hidden_layers")


# MTP


def test_a_folder_saved_by_transformers_is_trained_without_mtp(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", without_mtp(own_tensors()))
    assert layers_of_mtp(folder) == 1
    line = accepted("--load-hf", folder)
    assert not line.args.mtp_num_layers and line.config.to_hf()["text_config"]["mtp_num_hidden_layers"] == 0
    (problem,) = refused("--load-hf", folder, "--mtp-num-layers", "1")
    assert problem == f"--mtp-num-layers: {folder} has no tensors of MTP; leave the flag out"


def test_its_import_and_export_say_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "hf", without_mtp(own_tensors()))
    imported = import_folder(folder, tmp_path / "imported")
    assert "notice: " in (printed := capsys.readouterr().err) and "no mtp.* tensors" in printed
    exported = export_checkpoint(imported, tmp_path / "exported", quiet=True)
    assert_same(read_folder(exported), without_mtp(own_tensors()))
    assert layers_of_mtp(exported) == 0
    before, after = small_files(folder), small_files(exported)
    assert {name for name in before if before[name] != after[name]} == {"config.json"}
    config = json.loads(before["config.json"])
    config["text_config"]["mtp_num_hidden_layers"] = 0
    assert json.loads(after["config.json"]) == config


def test_an_index_alone_tells_that_there_is_no_mtp(tmp_path: Path) -> None:
    """Of a hub name only the description is fetched first."""
    folder = write(tmp_path / "hf")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if not name.startswith("mtp.")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    from weights.folder import tensor_names

    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    assert tensor_names(folder) == set(without_mtp(own_tensors()))


@pytest.mark.parametrize("layers", [0, None])
def test_mtp_that_config_json_does_not_count_is_left_out(layers: int | None, tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", own_tensors(), mtp_num_hidden_layers=layers)
    assert not accepted("--load-hf", folder).args.mtp_num_layers
    exported = export_checkpoint(import_folder(folder, tmp_path / "imported", quiet=True), tmp_path / "out", quiet=True)
    assert_same(read_folder(exported), without_mtp(own_tensors()))
    assert layers_of_mtp(exported) == layers


def test_a_part_of_mtp_is_damage(tmp_path: Path) -> None:
    tensors = own_tensors()
    del tensors["mtp.norm.weight"]
    folder = write(tmp_path / "hf", tensors)
    assert "mtp.norm.weight: missing" in refused("--load-hf", folder)[0]
    with pytest.raises(FolderError, match=r"mtp\.norm\.weight: missing"):
        import_folder(folder, tmp_path / "imported", quiet=True)


def test_mtp_that_is_indexed_and_not_there_is_damage(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf")
    (shard,) = folder.glob("*.safetensors")
    save_file(without_mtp(own_tensors()), shard, metadata={"format": "pt"})
    assert (
        f"lacks mtp.fc.weight, which {'model.safetensors.index.json'} places there" in refused("--load-hf", folder)[0]
    )


# Other weights


@pytest.mark.parametrize("section", ["", "text_config"])
def test_quantised_weights_are_named_in_one_line(section: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (config[section] if section else config)["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    (problem,) = refused("--load-hf", folder)
    assert "quantization_config (method fp8): quantised weights can't be trained" in problem and "\n" not in problem
    with pytest.raises(FolderError, match="method fp8"):
        import_folder(folder, tmp_path / "imported", quiet=True)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_beside_the_model_is_named(file: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "hf")
    (folder / file).write_bytes(b"")
    assert f"{file} belongs to a LoRA adapter" in refused("--load-hf", folder)[0]


def test_buffers_are_ignored_wherever_they_stand(tmp_path: Path) -> None:
    buffers = (
        "model.visual.rotary_pos_emb.inv_freq",
        "model.language_model.rotary_emb.inv_freq",
        "model.language_model.rotary_emb.original_inv_freq",
        "model.language_model.layers.3.self_attn.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
    )
    tensors = own_tensors() | {name: torch.zeros(4) for name in buffers}
    folder = write(tmp_path / "hf", tensors)
    accepted("--load-hf", folder)
    exported = export_checkpoint(import_folder(folder, tmp_path / "imported", quiet=True), tmp_path / "out", quiet=True)
    assert_same(read_folder(exported), own_tensors())


def test_a_tied_folder_gets_its_head_back(tmp_path: Path) -> None:
    tensors = own_tensors()
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    assert DENSE.tie_word_embeddings
    folder = write(tmp_path / "hf", tensors)
    exported = export_checkpoint(import_folder(folder, tmp_path / "imported", quiet=True), tmp_path / "out", quiet=True)
    assert_same(read_folder(exported), tensors)


# Processor


def test_a_folder_without_a_processor_needs_one_to_be_named(tmp_path: Path) -> None:
    folder, other = write(tmp_path / "hf"), write(tmp_path / "other")
    (folder / "preprocessor_config.json").unlink()
    (problem,) = refused("--load-hf", folder, "--dataset-provider", "receipts")
    assert problem.startswith(f"--load-hf {folder}: it has no processor files") and "--hf-processor-path" in problem
    assert accepted("--load-hf", folder, "--hf-processor-path", other).args.hf_processor_path == str(other)
    assert accepted("--load-hf", folder, "--dataset-provider", "mock").args.hf_processor_path is None


def test_a_template_in_tokenizer_config_json_is_used_and_none_is_refused(tmp_path: Path) -> None:
    from data.processor import read_processor
    from data.receipts.processor import CHAT_TEMPLATE

    folder = write(tmp_path / "hf")
    accepted("--load-hf", folder, "--dataset-provider", "receipts")
    assert read_processor(str(folder)).chat_template == CHAT_TEMPLATE
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (problem,) = refused("--load-hf", folder, "--dataset-provider", "receipts")
    assert "it has no chat template" in problem
    with pytest.raises(ValueError, match="it has no chat template"):
        read_processor(str(folder))

"""HuggingFace folders: what is refused and why, what is written, and that nothing half-done stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from models.qwen35_vl.configuration import VARIANTS
from models.qwen35_vl.hf_weights import ExpertStorage
from tests.hf_folders import assert_same, random_tensors, read_folder, write_folder
from weights.check import check_folder, is_hub_name, local_folder, model_of
from weights.folder import (
    INDEX,
    FolderError,
    HfFolder,
    TensorInfo,
    new_folder,
    open_tensors,
    parse_size,
    torch_dtype,
    write_tensors,
)

TINY = VARIANTS["tiny"]
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "tiny"
    write_folder(path, TINY, shards=2)
    return path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def change_index(folder: Path, name: str, file: str | int) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def refusal(folder: Path) -> str:
    with pytest.raises(FolderError) as refused:
        opened = HfFolder.open(folder)
        _, weights, config = model_of(opened.config, folder)
        check_folder(weights, config, opened)
    return str(refused.value)


def test_headers_of_a_sharded_folder(original: Path) -> None:
    folder = HfFolder.open(original)
    tensors = read_folder(original)
    assert folder.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert folder.bytes == sum(tensor.nbytes for tensor in tensors.values())
    wide = {name.rpartition("linear_attn.")[2] for name, dtype in folder.dtypes.items() if dtype == "F32"}
    assert wide == {"A_log", "norm.weight"}


def test_slices_are_those_of_the_tensor(original: Path) -> None:
    name = "model.visual.blocks.1.attn.qkv.weight"
    expected = read_folder(original)[name]
    with open_tensors(HfFolder.open(original), title="reads", quiet=True) as tensors:
        assert torch.equal(tensors[name][slice(3, 9), slice(2, 5)], expected[3:9, 2:5])
        assert torch.equal(tensors[name][(slice(None), slice(0, 1))], expected[:, :1])


def test_pickled_weights_are_refused_with_the_reason(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is a pickle, and loading one runs whatever code is in it" in refusal(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "it has no safetensors file" in refusal(folder)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", ".."])
def test_an_index_reaches_no_file_outside_the_folder(folder: Path, file: str) -> None:
    save_file({"lm_head.weight": torch.zeros(2)}, folder.parent / "secret.safetensors")
    change_index(folder, "lm_head.weight", file)
    assert f"{INDEX} names {str(file)!r}, which isn't a safetensors file of this folder" in refusal(folder)


def test_an_index_that_does_not_fit_its_files(folder: Path) -> None:
    change_index(folder, "lm_head.weight", 7)
    assert f"{INDEX}: weight_map['lm_head.weight'] is an integer" in refusal(folder)
    change_index(folder, "lm_head.weight", "model-3.safetensors")
    assert f"{INDEX} names model-3.safetensors, which is missing" in refusal(folder)
    change_index(folder, "lm_head.weight", SHARD)
    assert f"{SHARD} lacks lm_head.weight, which {INDEX} places there" in refusal(folder)
    (folder / INDEX).write_text("{}")
    assert f"{INDEX}: weight_map is missing" in refusal(folder)
    (folder / INDEX).unlink()
    assert f"2 safetensors files and no {INDEX}" in refusal(folder)


def test_a_tensor_that_the_index_does_not_list(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["mtp.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    assert f"holds mtp.norm.weight, which {INDEX} doesn't list there" in refusal(folder)


def test_a_shard_cut_short_is_named(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1)
    assert f"{SHARD} is cut short or damaged" in refusal(folder)
    (folder / SHARD).write_bytes(b"")
    assert f"{SHARD} is cut short or damaged" in refusal(folder)


@pytest.mark.parametrize("shape", [[2**62, 2**62], [2**31], [-1]])
def test_an_absurd_shape_is_refused(folder: Path, shape: list[int]) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
    (folder / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert f"{SHARD} is cut short or damaged" in refusal(folder)


def test_tensors_that_do_not_fit_are_all_listed(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    del tensors["mtp.norm.weight"]
    tensors["model.visual.merger.norm.bias"] = torch.zeros(3)
    tensors["model.language_model.layers.0.surprise"] = torch.zeros(3)
    write_folder(tmp_path / "bad", TINY, tensors)
    refused = refusal(tmp_path / "bad")
    assert "mtp.norm.weight: missing" in refused
    assert "model.visual.merger.norm.bias: has shape (3,), expected (128,)" in refused
    assert "model.language_model.layers.0.surprise: maps to no parameter" in refused


def test_integers_are_not_weights(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    tensors["mtp.norm.weight"] = tensors["mtp.norm.weight"].to(torch.int8)
    write_folder(tmp_path / "bad", TINY, tensors)
    assert "mtp.norm.weight: dtype I8; weights have to be one of" in refusal(tmp_path / "bad")


def test_another_architecture_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "config.json has model_type 'llama'; there are tables for qwen3_5, qwen3_5_moe" in refusal(folder)
    (folder / "config.json").write_text("[]")
    assert "config.json: holds a list where an object {...} is expected" in refusal(folder)
    (folder / "config.json").unlink()
    assert "it has no config.json" in refusal(folder)
    assert "no such folder" in refusal(folder / "nothing")


def test_a_tokenizer_with_more_ids_than_rows(folder: Path) -> None:
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1023}}, "added_tokens": [{"id": 1024, "content": "<x>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer.json: has ids up to 1024, and the vocabulary has 1024 rows" in refusal(folder)
    tokenizer["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    HfFolder.open(folder)
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer.json: isn't complete JSON" in refusal(folder)


def test_values_are_watched_while_they_are_read(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    tensors["mtp.norm.weight"][5] = torch.nan
    tensors["model.visual.pos_embed.weight"][7, 7] = -torch.inf
    embedding = "model.language_model.embed_tokens.weight"
    tensors["lm_head.weight"] = tensors[embedding].clone()
    tensors["lm_head.weight"][600, 3] += 1
    write_folder(tmp_path / "bad", TINY, tensors)
    folder = HfFolder.open(tmp_path / "bad")
    _, weights, config = model_of(folder.config, folder.path)
    mapping = check_folder(weights, config, folder).mapping
    with open_tensors(folder, mapping.copies, title="reads", quiet=True) as read:
        read["model.visual.pos_embed.weight"][(slice(0, 7),)]
        read[embedding][(slice(0, 600),)]
        assert (read.not_finite, read.unequal) == (set(), set())
        for name in tensors:
            read[name][(slice(None),)]
        assert read.not_finite == {"mtp.norm.weight", "model.visual.pos_embed.weight"}
        assert read.unequal == {(embedding, "lm_head.weight")}


# Writing


def write(target: Path, tensors: dict[str, torch.Tensor], size: int) -> None:
    names = {torch_dtype(name): name for name in ("F64", "F32", "F16", "BF16")}
    infos = {name: TensorInfo(tuple(tensor.shape), names[tensor.dtype]) for name, tensor in tensors.items()}
    with new_folder(target) as folder:
        for name, view in write_tensors(folder, infos, size, title="writes", quiet=True):
            view.copy_(tensors[name])


@pytest.mark.parametrize(("size", "files"), [(10**9, 1), (10**6, 7), (1, None)])
def test_shards_are_bounded_and_read_back(tmp_path: Path, size: int, files: int | None) -> None:
    tensors = random_tensors(VARIANTS["tiny_moe"], ExpertStorage(False, True))
    tensors["odd"] = torch.randn(3, dtype=torch.float16)  # what follows must still start at its item's size
    tensors["scalar"] = torch.tensor(2.5, dtype=torch.float64)
    write(tmp_path / "out", tensors, size)
    assert_same(read_folder(tmp_path / "out"), tensors)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == (files or len(tensors))
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert all(shard.stat().st_size <= max(size, largest) + 100_000 for shard in shards)
    if len(shards) == 1:
        assert [shard.name for shard in shards] == ["model.safetensors"] and not (tmp_path / "out" / INDEX).exists()
        return
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert name in shard.keys() and shard.metadata() == {"format": "pt"}  # noqa: SIM118


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_nothing_half_done_stays(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(folder: Path) -> None:
    before = read_folder(folder)
    with pytest.raises(FolderError, match="it is there already"), new_folder(folder):
        pass
    assert_same(read_folder(folder), before)


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FolderError, match=r"model\.safetensors, .* bytes: No space left on device"):
        write(tmp_path / "out", {"w": torch.zeros(4)}, 100)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(FolderError, match="16 bytes are to be written, and the disk has 1 left"):
        write(tmp_path / "out", {"w": torch.zeros(4)}, 100)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("4096", 4096), ("2KB", 2000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5TB", "many"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="isn't a size such as 5GB"):
        parse_size(text)


# Hub names


def test_a_hub_name_is_fetched_once_and_without_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert is_hub_name("Qwen/Qwen3.5-0.8B") and not is_hub_name(str(tmp_path)) and not is_hub_name("./Qwen/x")
    assert local_folder("Qwen/Qwen3.5-0.8B") == tmp_path
    assert local_folder(str(tmp_path)) == tmp_path
    assert asked == [("Qwen/Qwen3.5-0.8B", ["*.safetensors", "*.json", "*.txt", "*.jinja"])]


def test_a_hub_name_that_can_not_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FolderError, match=r"Qwen/Q: no such folder, and fetching it from the hub failed: offline"):
        local_folder("Qwen/Q")

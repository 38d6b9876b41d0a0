"""Checksums of HuggingFace folders: written with them, compared for what is read, absent without harm."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.qwen35_vl.configuration import VARIANTS
from tests.hf_folders import random_tensors, read_folder
from weights import checksums
from weights.checksums import CHECKSUMS, CheckedFile, elements_between
from weights.folder import FolderError, HfFolder, TensorInfo, new_folder, open_tensors, torch_dtype, write_tensors

TINY = VARIANTS["tiny"]
ROOT = Path(__file__).parents[2]


def write(target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """As --save-hf does: two shards, and the checksums."""
    names = {torch_dtype(name): name for name in ("F64", "F32", "F16", "BF16")}
    infos = {name: TensorInfo(tuple(tensor.shape), names[tensor.dtype]) for name, tensor in tensors.items()}
    half = sum(tensor.nbytes for tensor in tensors.values()) * 2 // 3
    with new_folder(target) as folder:
        for name, view in write_tensors(folder, infos, half, title="writes", quiet=True):
            view.copy_(tensors[name])
        (folder / "config.json").write_text(json.dumps(TINY.to_hf()))
    return target


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(checksums, "BLOCK", 4096)  # many blocks in small tensors
    return write(tmp_path / "hf", random_tensors(TINY))


def flip(folder: Path, name: str, element: int, bit: int = 3) -> None:
    """Damage one element's last byte."""
    opened = HfFolder.open(folder)
    file = opened.files[name]
    size = {"BF16": 2, "F32": 4}[opened.dtypes[name]]
    start, _ = CheckedFile(file)._places[name]
    content = bytearray(file.read_bytes())
    content[start + element * size] ^= 1 << bit
    file.write_bytes(content)


def read(folder: Path, name: str, *index: slice | int) -> torch.Tensor:
    with open_tensors(HfFolder.open(folder), title="reads", quiet=True) as tensors:
        return tensors[name][index]


def test_every_tensor_has_its_checksums(folder: Path) -> None:
    opened = HfFolder.open(folder)
    assert opened.checksums.keys() == opened.shapes.keys()
    assert max(map(len, opened.checksums.values())) > 10
    assert list(opened.damage()) == []


@pytest.mark.parametrize("name", ["mtp.norm.weight", "model.language_model.embed_tokens.weight"])
def test_a_flipped_bit_is_named(folder: Path, name: str) -> None:
    flip(folder, name, 5)
    (problem,) = HfFolder.open(folder).damage()
    assert f": {name} is damaged between bytes " in problem and CHECKSUMS in problem
    with pytest.raises(FolderError, match=name):
        read(folder, name, slice(None))


def test_a_rank_compares_what_it_reads(folder: Path) -> None:
    """A damaged row stops the rank that reads it, and no other."""
    name = "model.language_model.embed_tokens.weight"  # [1024, 128] in bf16: 16 rows to a block
    flip(folder, name, 512 * 128)
    expected = read_folder(folder)[name]
    assert torch.equal(read(folder, name, slice(0, 512)), expected[:512])
    assert torch.equal(read(folder, name, slice(528, 1024)), expected[528:])
    with pytest.raises(FolderError, match="is damaged between bytes"):
        read(folder, name, slice(512, 1024))
    with pytest.raises(FolderError, match="is damaged between bytes"):
        read(folder, name, slice(None), slice(0, 64))


def test_a_folder_without_checksums_is_read(folder: Path) -> None:
    (folder / CHECKSUMS).unlink()
    flip(folder, "mtp.norm.weight", 0)
    assert HfFolder.open(folder).checksums == {}
    read(folder, "mtp.norm.weight", slice(None))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "checksums.json: isn't complete JSON"),
        ("{}", "checksums.json: block_bytes is missing"),
        ('{"algorithm": "md5", "block_bytes": 4096, "tensors": {}}', 'algorithm is "md5"; it has to be "crc32"'),
        ('{"algorithm": "crc32", "block_bytes": 1, "tensors": {}}', "block_bytes is 1"),
        ('{"algorithm": "crc32", "block_bytes": 4096, "tensors": {}}', "belongs to other weights"),
        ('{"algorithm": "crc32", "block_bytes": 4096, "tensors": []}', "tensors is a list of 0 entries"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(folder: Path, content: str, reason: str) -> None:
    (folder / CHECKSUMS).write_text(content)
    with pytest.raises(FolderError) as refused:
        HfFolder.open(folder)
    assert reason in str(refused.value)


def test_checksums_stay_with_their_weights(folder: Path) -> None:
    """They don't come along to another folder, as tokenizer files do."""
    assert CHECKSUMS not in {path.name for path in HfFolder.open(folder).sidecar_files()}


def test_elements_between_are_those_of_the_slice() -> None:
    draw = random.Random(0)
    for shape in ((7,), (4, 6), (3, 4, 5), ()):
        numbers = np.arange(int(np.prod(shape))).reshape(shape)
        for _ in range(50):
            index: list[slice | int] = []
            for size in shape[: draw.randint(0, len(shape))]:
                low, high = sorted((draw.randint(0, size), draw.randint(0, size)))
                index.append(slice(low, high) if draw.random() < 0.8 else draw.randrange(size))
            found = numbers[tuple(index)]
            first, last = elements_between(index, shape)
            if found.size:
                assert (first, last) == (found.min(), found.max() + 1)
            else:
                assert first == last == 0


def verify(*words: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/verify_checkpoint.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_script_reads_everything(tmp_path: Path) -> None:
    from tests.small_checkpoint import write as write_checkpoint

    hf = write(tmp_path / "hf", random_tensors(TINY))
    for iteration in (2, 4):
        write_checkpoint(tmp_path / "run", iteration)
    for place in (hf, tmp_path / "run"):
        done = verify(place)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    flip(hf, "mtp.norm.weight", 7)
    shard = tmp_path / "run/iter_0000004/__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[content.index(torch.zeros(8, 4).numpy().tobytes()) + 5] ^= 1
    shard.write_bytes(content)
    done = verify(hf)
    assert done.returncode == 1 and "mtp.norm.weight is damaged" in done.stdout
    done = verify(tmp_path / "run")
    assert done.returncode == 1 and f"{shard}: weight, at byte " in done.stdout and "Bad CRC-32" in done.stdout
    assert verify(tmp_path / "run", "--iteration", "2").returncode == 0
    for words in ([tmp_path / "none"], [tmp_path], [tmp_path / "run", "--iteration", "3"]):
        done = verify(*words)
        assert done.returncode == 1 and done.stderr.startswith("Refused: ") and "Traceback" not in done.stderr

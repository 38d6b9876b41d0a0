"""A HuggingFace folder: reading its headers, slices of its tensors, and writing one.

Knows no architecture. Reading headers needs no torch, so that the launcher's preflight can do it; a tensor's data is
read when a slice of it is asked for, through the file's mapping, and written into the mapping of the new file: neither
takes memory of its own beyond the slice.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from models.json_files import JsonError, read_object, regular_file_problem
from runtime.files import whole_folder
from weights.checksums import (
    CHECKSUMS,
    CheckedFile,
    checksums_of,
    elements_between,
    read_checksums,
    write_checksums,
)
from weights.schema import index_problems

if TYPE_CHECKING:
    import torch
    from huggingface_hub import StateDictSplit
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Bytes of the dtypes that weights come in, as safetensors spells them; others are refused.
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Written beside config.json in a checkpoint's hf/: dtype of every tensor of the folder that training started from.
RECORD = "tensors.json"
# What the run gave its chat template (`--chat-template-kwargs`), where it gave anything.
TEMPLATE_ARGUMENTS = "chat_template_kwargs.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
IMAGE_FILES = (*PROCESSOR_FILES, "video_preprocessor_config.json")
# Everything that a tokenizer and a processor consist of: of one model, all or none of them.
TEXT_AND_IMAGE_FILES = (
    *(*IMAGE_FILES, "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)
_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LARGEST_COMPANION = 200 * 2**20  # bytes; tokenizers have tens of MB


class FolderError(ValueError):
    """A folder that can't be read or written; one entry per problem, each naming the file or the tensor."""

    def __init__(self, path: Path | str, problems: list[str]) -> None:
        super().__init__("\n  ".join([f"{path}:", *problems]) if len(problems) > 1 else f"{path}: {problems[0]}")
        self.problems = problems


@dataclass(frozen=True)
class HfFolder:
    """A folder's headers.

    config: its config.json.
    files: tensor name -> the file that holds it.
    shapes, dtypes: of every tensor; dtypes as safetensors spells them.
    checksums: of every tensor, where the folder has them (`weights.checksums`); else empty.
    """

    path: Path
    config: dict[str, Any]
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    checksums: dict[str, list[str]]

    @classmethod
    def open(cls, path: Path | str) -> HfFolder:
        """Read config.json, the index and every shard's header.

        Raises:
            FolderError: no such folder, no safetensors, an index that doesn't fit its files, a damaged shard, tensors
                that aren't floating-point numbers; lists everything found.
        """
        path = Path(path).expanduser()
        config = read_config(path)
        listed = _listed_files(path)
        problems: list[str] = []
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        for file, expected in listed.items():
            try:
                found = read_header(path / file)
            except FolderError as error:
                problems += error.problems
                continue
            if expected is not None:
                problems += [
                    f"{file} lacks {name}, which {INDEX} places there" for name in sorted(expected - found.keys())
                ]
                problems += [
                    f"{file} holds {name}, which {INDEX} doesn't list there" for name in sorted(found.keys() - expected)
                ]
            for name, (shape, dtype) in found.items():
                if dtype not in ITEM_SIZES:
                    problems.append(f"{name}: dtype {dtype}; weights have to be one of {', '.join(ITEM_SIZES)}")
                files[name], shapes[name], dtypes[name] = path / file, shape, dtype
        if problems:
            raise FolderError(path, problems)
        sizes = {name: prod(shape) * ITEM_SIZES[dtypes[name]] for name, shape in shapes.items()}
        checksums, problems = read_checksums(path, sizes)
        if problems:
            raise FolderError(path, problems)
        return cls(path, config, files, shapes, dtypes, checksums)

    @cached_property
    def bytes(self) -> int:
        return sum(prod(shape) * ITEM_SIZES[self.dtypes[name]] for name, shape in self.shapes.items())

    def damage(self) -> Iterator[str]:
        """What differs from the folder's checksums, tensor by tensor; reads everything, or nothing if it has none."""
        opened: dict[Path, CheckedFile] = {}
        for name, checksums in self.checksums.items():
            file = self.files[name]
            if file not in opened:
                opened[file] = CheckedFile(file)
            if problem := opened[file].problem(name, checksums):
                yield problem

    def sidecar_files(self) -> list[Path]:
        """Tokenizer, processor and whatever small files lie beside the weights and config.json; no code, no pickles."""
        return sidecar_files(self.path)


def read_config(path: Path) -> dict[str, Any]:
    """`path/config.json`.

    Raises:
        FolderError: no such folder or file, or not a JSON object.
    """
    if not path.is_dir():
        raise FolderError(path, ["no such folder"])
    if not (path / "config.json").exists():
        raise FolderError(path, ["it has no config.json; give a HuggingFace model folder"])
    try:
        return read_object(path / "config.json")
    except JsonError as error:
        raise FolderError(path, [f"config.json: {error.reason}"]) from error


def read_template_arguments(path: Path) -> str:
    """What the training gave its chat template, as a JSON object: `--chat-template-kwargs`.

    Raises:
        FolderError: the file isn't a JSON object.
    """
    if not os.path.lexists(path / TEMPLATE_ARGUMENTS):
        return "{}"
    try:
        return json.dumps(read_object(path / TEMPLATE_ARGUMENTS))
    except JsonError as error:
        raise FolderError(path, [f"{TEMPLATE_ARGUMENTS}: {error.reason}"]) from error


def sidecar_files(path: Path) -> list[Path]:
    """See `HfFolder.sidecar_files`."""
    left_out = {"config.json", RECORD, INDEX, CHECKSUMS}
    return sorted(
        file
        for file in path.iterdir()
        if file.is_file()
        and not file.name.startswith(".")
        and file.name not in left_out
        and file.suffix not in (".safetensors", ".py", *_PICKLES)
        and not file.name.endswith(".index.json")
        and file.stat().st_size <= _LARGEST_COMPANION
    )


def has_weights(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.safetensors"))


def occupied(target: Path) -> str | None:
    """Why `new_folder` can't make a folder there; None: there is nothing, or an empty folder."""
    if has_weights(target):
        return "it is there already and has a model in it"
    if target.is_dir():
        first = next((path.name for path in target.iterdir()), None)
        return None if first is None else f"it is there already and has other files in it, {first} for one"
    return "it is there already and isn't a folder" if target.exists() else None


def has_processor(path: Path, *, text_only: bool = False) -> bool:
    """Whether a folder has a processor's files; for a model of text alone, a tokenizer's."""
    names = (*PROCESSOR_FILES, "tokenizer.json", "tokenizer_config.json") if text_only else PROCESSOR_FILES
    return any((path / name).is_file() for name in names)


def tensor_names(path: Path) -> set[str] | None:
    """What the index, or the only shard's header, names; None where neither is here (a hub name's description)."""
    if (path / INDEX).exists():
        try:
            index = read_object(path / INDEX)
        except JsonError:
            return None  # `HfFolder.open` says what is wrong with it
        return None if index_problems(index) else set(index["weight_map"])
    shards = [file for file in path.glob("*.safetensors") if file.name not in _ADAPTER]
    try:
        return set(read_header(shards[0])) if len(shards) == 1 else None
    except FolderError:
        return None


def _listed_files(path: Path) -> dict[str, set[str] | None]:
    """Shards, each with the tensors that the index places there (None without an index)."""
    if adapter := next((name for name in _ADAPTER if (path / name).exists()), None):
        raise FolderError(
            path,
            [
                f"{adapter} belongs to a LoRA adapter, which isn't read beside a model: merge it into the weights "
                "(peft: merge_and_unload, then save_pretrained), or move it out of the folder to start without it"
            ],
        )
    if (path / INDEX).exists():
        try:
            index = read_object(path / INDEX)
        except JsonError as error:
            raise FolderError(path, [f"{INDEX}: {error.reason}"]) from error
        if wrong := index_problems(index):
            raise FolderError(path, [f"{INDEX}: {problem}" for problem in wrong])
        problems: list[str] = []
        listed: dict[str, set[str]] = {}
        for name, file in index["weight_map"].items():
            listed.setdefault(file, set()).add(name)
        for file in listed:
            # A plain name of this folder: an index must not reach other files of the machine.
            if file in ("", ".", "..") or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
                problems.append(f"{INDEX} names {file!r}, which isn't a safetensors file of this folder")
            elif not (path / file).exists():
                problems.append(f"{INDEX} names {file}, which is missing")
        if problems:
            raise FolderError(path, problems)
        return dict(listed)
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: None}
    if found:
        raise FolderError(path, [f"{len(found)} safetensors files and no {INDEX}"])
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise FolderError(
            path,
            [
                f"{pickles[0]} is a pickle, and loading one runs whatever code is in it: only safetensors is read; "
                "convert it with transformers on a machine you can lose (model.save_pretrained writes safetensors)"
            ],
        )
    raise FolderError(path, ["it has no safetensors file"])


def read_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of a file; safetensors checks offsets, shapes and the file's length."""
    if problem := regular_file_problem(file):
        raise FolderError(file.parent, [f"{file.name}: {problem}"])
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  not a dict
            return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except SafetensorError as error:
        raise FolderError(file.parent, [f"{file.name} is cut short or damaged: {error}"]) from error
    except OSError as error:
        raise FolderError(file.parent, [f"{file.name}: {error}"]) from error


# Reading data


class FolderTensors(Mapping[str, "FolderTensor"]):
    """Slices of a folder's tensors, read when indexed.

    not_finite: names of tensors in which a slice with NaN or infinity was read.
    unequal: (name, name of its copy) where a slice differs from the same slice of the copy.
    """

    def __init__(self, folder: HfFolder, copies: Mapping[str, str], progress: Any) -> None:
        self.folder = folder
        self.copies = {name: copy for name, copy in copies.items() if copy in folder.shapes}
        self.progress = progress
        self.not_finite: set[str] = set()
        self.unequal: set[tuple[str, str]] = set()
        self._opened: dict[Path, Any] = {}
        self._checked: dict[Path, CheckedFile] = {}

    def __len__(self) -> int:
        return len(self.folder.shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.folder.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.folder.shapes

    def __getitem__(self, name: str) -> FolderTensor:
        return FolderTensor(self, name)

    def read(self, name: str, index: tuple[slice | int, ...]) -> Tensor:
        """A slice of a tensor; a view of the file's mapping where it can be one."""
        import torch

        values = self._slice(name, index)
        if values.numel():
            # NaN and infinity both show in the extremes, which need no copy.
            extremes = torch.stack(torch.aminmax(values))
            if not extremes.isfinite().all():
                self.not_finite.add(name)
        copy = self.copies.get(name)
        if copy is not None and not torch.equal(values, self._slice(copy, index)):
            self.unequal.add((name, copy))
        self.progress.update(values.nbytes)
        return values

    def _slice(self, name: str, index: tuple[slice | int, ...]) -> Tensor:
        file = self.folder.files[name]
        self._compare(name, file, index)
        if file not in self._opened:
            try:
                self._opened[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise FolderError(self.folder.path, [f"{file.name}: {error}"]) from error
        return self._opened[file].get_slice(name)[index]

    def _compare(self, name: str, file: Path, index: tuple[slice | int, ...]) -> None:
        """Compare the bytes of a slice with their checksums, where the folder has them."""
        if not self.folder.checksums:
            return
        if file not in self._checked:
            self._checked[file] = CheckedFile(file)
        size = ITEM_SIZES[self.folder.dtypes[name]]
        first, last = elements_between(index, self.folder.shapes[name])
        problem = self._checked[file].problem(name, self.folder.checksums[name], first * size, last * size)
        if problem is not None:
            raise FolderError(self.folder.path, [problem])


@dataclass(frozen=True)
class FolderTensor:
    """One tensor of a folder (`models.weight_map.Sliceable`)."""

    tensors: FolderTensors
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors.folder.shapes[self.name]

    def __getitem__(self, index: tuple[slice | int, ...]) -> Tensor:
        return self.tensors.read(self.name, index)


@contextmanager
def open_tensors(
    folder: HfFolder,
    copies: Mapping[str, str] | None = None,
    *,
    title: str,
    total: int | None = None,
    quiet: bool = False,
) -> Iterator[FolderTensors]:
    """Slices of a folder's tensors, with progress on stderr.

    Args:
        copies: see `models.weight_map.WeightMap`; slices of both are compared.
        title: what the progress line calls it.
        total: bytes that will be read; the whole folder's by default.
        quiet: show none.
    """
    from tqdm import tqdm

    total = folder.bytes if total is None else total
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=quiet, mininterval=1) as progress:
        yield FolderTensors(folder, copies or {}, progress)


# Writing


def torch_dtype(name: str) -> torch.dtype:
    """safetensors' spelling -> torch's."""
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor to be written; dtype as safetensors spells it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return prod(self.shape) * ITEM_SIZES[self.dtype]


def parse_size(text: str) -> int:
    """Bytes of "5GB", "300MB", "4096"; units are powers of ten, as transformers' `max_shard_size`.

    Raises:
        ValueError: not a size.
    """
    number = text.strip().upper()
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("B", 1), ("", 1)):
        if number.endswith(unit):
            try:
                size = int(float(number[: len(number) - len(unit)]) * factor)
            except (ValueError, OverflowError):
                break
            if size > 0:
                return size
            break
    raise ValueError(f"{text!r} isn't a size such as 5GB or 300MB")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes `target` when the block succeeds, and disappears when it doesn't.

    Raises:
        FolderError: `target` is there already, and not empty.
    """
    target = target.absolute()
    if there := occupied(target):
        raise FolderError(target, [f"{there}; give a new folder"])
    with whole_folder(target) as temporary:
        yield temporary


def write_tensors(
    folder: Path, tensors: Mapping[str, TensorInfo], max_shard_size: int, *, title: str, quiet: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Write safetensors shards, a tensor at a time, and their checksums.

    Args:
        folder: there already.
        tensors: what to write; see `write_order`.
        max_shard_size: bytes of a shard, unless one tensor alone is larger.

    Yields:
        (name, tensor): a view of the file's mapping, to be filled in before the next is asked for.

    Raises:
        FolderError: the disk hasn't the room.
    """
    import torch
    from tqdm import tqdm

    split = _shards(tensors, max_shard_size)
    total = sum(info.bytes for info in tensors.values())
    free = shutil.disk_usage(folder).free
    if free < total:
        raise FolderError(folder, [f"{total:,} bytes are to be written, and the disk has {free:,} left"])
    checksums: dict[str, list[str]] = {}
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=quiet, mininterval=1) as progress:
        for file, names in split.filename_to_tensors.items():
            for name, tensor in _write_shard(folder / file, {name: tensors[name] for name in names}):
                yield name, tensor
                checksums[name] = checksums_of(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
                progress.update(tensor.nbytes)
    write_checksums(folder, checksums)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": {name: split.tensor_to_filename[name] for name in tensors}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_order(tensors: Mapping[str, TensorInfo], max_shard_size: int) -> list[str]:
    """The order in which `write_tensors` asks for values."""
    shards = _shards(tensors, max_shard_size).filename_to_tensors.values()
    return [name for names in shards for name in _inner_order(names, tensors)]


def _inner_order(names: Iterable[str], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Wide items first, as the library has it: every tensor starts at a multiple of its item's size."""
    return sorted(names, key=lambda name: -ITEM_SIZES[tensors[name].dtype])


def _shards(tensors: Mapping[str, TensorInfo], max_shard_size: int) -> StateDictSplit:
    from huggingface_hub import split_state_dict_into_shards_factory

    return split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda info: info.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def _write_shard(file: Path, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """One file in the format of https://github.com/huggingface/safetensors#format.

    The library's own writer wants all of a file's tensors in memory.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = _inner_order(tensors, tensors)
    end = 0
    for name in ordered:
        info = tensors[name]
        start, end = end, end + info.bytes
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    start_of_data = 8 + len(encoded)
    with file.open("wb") as opened:
        opened.write(len(encoded).to_bytes(8, "little") + encoded)
        opened.flush()
        # Reserved now: a full disk is an error here, and a crash when a mapped page finds no room.
        try:
            os.posix_fallocate(opened.fileno(), 0, start_of_data + end)
        except OSError as error:
            raise FolderError(file.parent, [f"{file.name}, {start_of_data + end:,} bytes: {error.strerror}"]) from error
    mapping = torch.from_file(str(file), shared=True, size=start_of_data + end, dtype=torch.uint8)
    for name in ordered:
        info = tensors[name]
        first, last = (start_of_data + offset for offset in header[name]["data_offsets"])
        yield name, mapping[first:last].view(torch_dtype(info.dtype)).view(info.shape)
    del mapping
    with file.open("rb") as opened:
        os.fsync(opened.fileno())

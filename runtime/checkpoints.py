"""Which checkpoint a run starts from, whether it is whole, and which are deleted.

    SAVE/latest_checkpointed_iteration.txt   the tracker: names the last complete checkpoint, written last
    SAVE/iter_0000004/                       .metadata, which names every shard and its bytes, then metadata.json
    SAVE/data/iter_0000004/                  where the data stood, written first

So whatever moment a run is killed at, the tracker names a complete checkpoint, and one that lacks its last file was
being written. Imports neither torch nor megatron, so that the launcher answers within a second.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal

from models.json_files import regular_file_problem
from runtime.checksums import record_problem
from runtime.files import write_text

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE: Final = "release"  # a converted checkpoint, which belongs to no iteration
DATA = "data"
# What a checkpoint's last file is, by --ckpt-format.
LAST_FILES = {"torch_dist": "metadata.json", "fsdp_dtensor": ".metadata"}

# What to do about a checkpoint with another schedule.
SCHEDULE_FIX = (
    "--override-opt_param-scheduler (CKPT_OVERRIDE_SCHEDULER=1) takes this command line's, "
    "--use-checkpoint-opt_param-scheduler the checkpoint's; else give the flags that it was made with "
    "(--train-iters, --lr, ...)"
)


@dataclass(frozen=True)
class Start:
    """What `--load` means.

    Attributes:
        folder: the checkpoint's; None: there is none, training starts anew.
        step: what `--ckpt-step` has to be for megatron to take it; None: the tracker says so already.
        warnings: for the log: what is taken instead of what, and why.
        problem: why nothing can be taken, with the fix; None: all is well.
    """

    folder: Path | None = None
    step: int | None = None
    warnings: tuple[str, ...] = ()
    problem: str | None = None


@contextmanager
def schedule_explained() -> Iterator[None]:
    """Add the fix to megatron-core's refusal of a checkpoint with another schedule (core/optimizer_param_scheduler.py).

    Only then is it known: the checkpoint's own state says what its schedule was.
    """
    try:
        yield
    except AssertionError as error:
        if "OptimizerParamScheduler" in str(error):
            error.add_note(f"The checkpoint was made with another schedule. {SCHEDULE_FIX}")
        raise


def choose(load: Path, step: int | None, ckpt_format: str) -> Start:
    """The checkpoint to start from: `step`'s, else the tracker's, else the last complete one.

    Looks at names only; `damage` looks into the checkpoint.

    Args:
        load: the folder of checkpoints, which may not exist.
        step: `--ckpt-step`.
        ckpt_format: `--ckpt-format`; other formats than those of LAST_FILES aren't checked.
    """
    if ckpt_format not in LAST_FILES or not load.is_dir():
        return Start()
    found = dict(_iterations(load))
    complete = [n for n, folder in found.items() if _lacks(folder, ckpt_format) is None]
    if step is not None:
        if step in complete:
            return Start(found[step])
        why = f"{found[step]} {_lacks(found[step], ckpt_format)}" if step in found else f"no {folder_name(step)} in it"
        return Start(problem=f"--ckpt-step {step} in --load {load}: {why}; {_there_is(complete)}")
    tracker = load / TRACKER
    tracked = read_tracker(load)
    if tracked == RELEASE:
        if lack := _lacks(load / RELEASE, ckpt_format):
            return Start(problem=f"--load {load}: {tracker} names {RELEASE}, but {lack}")
        return Start(load / RELEASE)
    if tracked in complete:
        newer = (n for n in found if n > tracked)
        warnings = (
            f"{found[n]} isn't taken: "
            + (_lacks(found[n], ckpt_format) or f"{tracker} doesn't name it (--ckpt-step {n} takes it)")
            for n in newer
        )
        return Start(found[tracked], warnings=_starting(found[tracked], warnings))
    if tracked is not None:
        reason = f"{tracker} names {tracked}, but {_lacks(load / folder_name(tracked), ckpt_format)}"
    else:
        reason = f"{tracker} {'is empty or corrupt' if tracker.exists() else 'is missing'}"
    left = [f"{folder} isn't taken: {lack}" for folder in found.values() if (lack := _lacks(folder, ckpt_format))]
    if not complete:
        if not found and not tracker.exists():
            return Start()
        if tracked is not None or tracker.exists():
            return Start(problem=f"--load {load}: {reason}; no checkpoint in it is complete")
        return Start(warnings=(*left, f"no checkpoint in {load} is complete: training starts anew"))
    last = complete[-1]
    return Start(found[last], step=last, warnings=_starting(found[last], [reason, *left]))


def _starting(folder: Path, warnings: Any) -> tuple[str, ...]:
    """What is said: nothing when the newest is taken, as always."""
    warnings = tuple(warnings)
    return (f"starting from {folder}", *warnings) if warnings else ()


def damage(folder: Path, ckpt_format: str) -> str | None:
    """What is wrong with a complete checkpoint's files, naming the file; None: each is there, readable and whole.

    `.metadata` is a pickle of torch's own records. It is read without running anything that it names, and one that
    names anything else is refused, since megatron would run it. Contents of shards aren't read: `runtime.checksums`.

    Args:
        folder: a checkpoint's.
    """
    if ckpt_format not in LAST_FILES or _is_legacy(folder):
        return None
    path = folder / ".metadata"
    if not (folder / "metadata.json").exists() and any(folder.glob("mp_rank_*")):
        return f"{folder} has mp_rank_ folders beside .metadata: megatron would take it for its old format; remove them"
    if problem := regular_file_problem(path):
        return f"{path}: {problem}"
    try:
        with open(path, "rb") as file:
            metadata = read_index(file, _IndexWithoutTorch)
        ends: dict[str, int] = defaultdict(int)
        for record in metadata.storage_data.values():
            ends[record.relative_path] = max(ends[record.relative_path], record.offset + record.length)
        without_place = _without_place(metadata)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except Exception as error:  # an unpickler raises anything at all on bytes that aren't a pickle
        return f"{path} can't be read: {error}"
    if without_place:
        return f"{path} doesn't say where {without_place[0]} is ({len(without_place)} such)"
    for name, end in sorted(ends.items()):
        shard = folder / name
        if problem := regular_file_problem(shard):
            return f"{shard}: {problem}"
        try:
            with open(shard, "rb") as file:
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            return f"{shard}: {error.strerror}"
        if size != end:
            return f"{shard} has {size} bytes of {end}"
    return None


def deep_damage(folder: Path) -> Iterator[str]:
    """What is wrong with a checkpoint's files, every byte of its shards included; a line for each problem."""
    ckpt_format = "torch_dist" if (folder / LAST_FILES["torch_dist"]).exists() else "fsdp_dtensor"
    if problem := _lacks(folder, ckpt_format):
        yield f"{folder}: {problem}"
        return
    if _is_legacy(folder):
        yield f"{folder}: is in megatron's old format, which has no checksums"
        return
    if problem := damage(folder, ckpt_format):
        yield problem
        return
    with open(folder / ".metadata", "rb") as file:
        metadata = read_index(file, _IndexWithoutTorch)
    # The same record under several names counts once.
    records = {(record.relative_path, record.offset, record.length) for record in metadata.storage_data.values()}
    names = defaultdict(list)
    for index, record in metadata.storage_data.items():
        names[record.relative_path, record.offset].append(index.fqn)
    for name, offset, length in sorted(records):
        with open(folder / name, "rb") as file:
            if problem := record_problem(file, offset, length):
                yield f"{folder / name}: {names[name, offset][0]}, at byte {offset:,}, is damaged: {problem}"


def all_checkpoints(folder: Path) -> list[Path]:
    """A folder's checkpoints, whole or not, the converted one included; or the folder itself if it is one."""
    if (folder / ".metadata").exists():
        return [folder]
    release = [folder / RELEASE] if (folder / RELEASE).is_dir() else []
    return release + [path for _, path in _iterations(folder)]


def read_index(file: IO[bytes], unpickler: type[IndexUnpickler] | None = None) -> Any:
    """A `.metadata`, from an open file, as `torch.distributed.checkpoint.metadata.Metadata`; runs nothing.

    Args:
        unpickler: `_IndexWithoutTorch` gives records that look like it without importing torch.

    Raises:
        pickle.UnpicklingError: it names anything but an index's own records, or a file outside its folder; other
            exceptions for bytes that aren't a pickle.
    """
    metadata = (unpickler or IndexUnpickler)(file).load()
    for record in metadata.storage_data.values():
        name = record.relative_path
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise pickle.UnpicklingError(f"it names a file outside the checkpoint: {name}")
    return metadata


def _without_place(metadata: Any) -> list[str]:
    """Tensors and objects of an index that no shard is said to hold; torch would end in `KeyError: MetadataIndex`."""
    # An index of an object has no offset at all.
    places = {(index.fqn, getattr(index, "offset", None)) for index in metadata.storage_data}
    wanted = (
        (key, offset)
        for key, entry in metadata.state_dict_metadata.items()
        for offset in (_chunk_offsets(entry) if hasattr(entry, "chunks") else [None])
    )
    return [key for key, offset in wanted if (key, offset) not in places]


def _chunk_offsets(entry: Any) -> list[tuple[int, ...]]:
    """Where a tensor's chunks begin.

    Raises:
        AttributeError, ValueError: its record lacks something, or a chunk isn't within the tensor.
    """
    size = tuple(entry.size)
    if entry.properties is None:  # the dtype, among others; readers need it
        raise ValueError("a tensor without properties")
    for chunk in entry.chunks:
        ends = [start + length for start, length in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(end > whole for end, whole in zip(ends, size, strict=True)) or min(chunk.offsets, default=0) < 0:
            raise ValueError(f"a chunk of {tuple(chunk.sizes)} at {tuple(chunk.offsets)} in a tensor of {size}")
    return [chunk.offsets for chunk in entry.chunks]


def problem(load: Path, start: Start, ckpt_format: str, flag: str = "--load", *, required: bool = False) -> str | None:
    """Why a folder of checkpoints can't be started from, with the fix; None: it can, or there is nothing to start from.

    Args:
        start: what `choose` said of `load`.
        flag: what names the folder, for the message.
        required: nothing to start from is a problem too.
    """
    if os.path.lexists(load) and not load.is_dir():
        return f"{flag} {load}: isn't a folder; give the folder of checkpoints (CKPT_LOAD)"
    if start.problem is not None:
        return start.problem.replace("--load", flag, 1)
    if start.folder is None:
        hint = elsewhere(load)
        return f"{flag} {load}: {_nothing(load, flag)}{hint}" if required or hint else None
    if (fault := damage(start.folder, ckpt_format)) is None:
        return None
    others = _sound(load, ckpt_format, start.folder)
    return f"{flag} {load}: {fault}: the checkpoint is damaged; {_there_is(others)}"


def elsewhere(load: Path) -> str:
    """Where the checkpoints are that a folder without any was probably meant to name; empty if nowhere near."""
    if re.fullmatch(r"iter_[0-9]+", load.name) and (load / ".metadata").exists():
        return f"; it is one checkpoint: give {load.parent} and --ckpt-step {int(load.name[5:])}"
    inside = load / "checkpoints"
    return f"; did you mean {inside}?" if (inside / TRACKER).exists() or any(_iterations(inside)) else ""


def other_steps(folder: Path, ckpt_format: str, flag: str = "--ckpt-step") -> str:
    """Which checkpoints beside this one can be taken instead, and by which flag, for a message about a damaged one."""
    return _there_is(_sound(folder.parent, ckpt_format, folder), flag)


def _sound(load: Path, ckpt_format: str, but: Path) -> list[int]:
    return [n for n, folder in _iterations(load) if folder != but and _is_whole(folder, ckpt_format)]


def _nothing(load: Path, flag: str) -> str:
    return ("no checkpoint in it" if load.is_dir() else "no such folder") + (" (CKPT_LOAD)" if flag == "--load" else "")


def read_tracker(folder: Path) -> int | Literal["release"] | None:
    """The iteration that a folder's tracker names, or RELEASE; None: there is none, or it names nothing."""
    if regular_file_problem(folder / TRACKER) is not None:
        return None
    with open(folder / TRACKER, errors="replace") as file:
        text = file.read(100).strip()
    return RELEASE if text == RELEASE else int(text) if re.fullmatch(r"[0-9]+", text) else None


def repair_tracker(load: Path, ckpt_format: str) -> None:
    """Write a corrupt tracker anew, over which megatron would stop without an error.

    Raises:
        OSError: the folder can't be written.
    """
    if (load / TRACKER).exists() and read_tracker(load) is None:
        _write_tracker(load, choose(load, None, ckpt_format).step)


def make_room(save: Path, iteration: int, ckpt_format: str) -> None:
    """Remove what a checkpoint that is about to be written would be mixed up with: another one of that iteration.

    Megatron writes over it file by file: killed meanwhile, it leaves the new run's shards among the old one's, under a
    `.metadata` that fits both. The tracker lets go of it first, so that it never names what isn't there.
    """
    folder = save / folder_name(iteration)
    if not folder.is_dir():
        return
    if read_tracker(save) == iteration:
        earlier = [n for n, other in _iterations(save) if n != iteration and _is_whole(other, ckpt_format)]
        _write_tracker(save, earlier[-1] if earlier else None)
    _delete(save, iteration)


def keep_last(save: Path, count: int, ckpt_format: str) -> list[int]:
    """Delete all but the last `count` complete checkpoints up to the one that the tracker names.

    Nothing is deleted unless that one is whole. What older saves left half-written goes too; what is newer than the
    tracker's, which may be in the making, stays.

    Returns:
        The iterations that were deleted.
    """
    last = read_tracker(save)
    if not isinstance(last, int) or not _is_whole(save / folder_name(last), ckpt_format):
        return []
    older = [(n, folder) for n, folder in _iterations(save) if n < last]
    whole = [n for n, folder in older if _is_whole(folder, ckpt_format)]
    kept = whole[len(whole) - count + 1 :] if count > 1 else []
    gone = [n for n, _ in older if n not in kept]
    for iteration in gone:
        _delete(save, iteration)
    return gone


def names(folder: Path) -> list[str]:
    """Everything in a folder that is a checkpoint, whole or not, the oldest first."""
    found = [RELEASE] if (folder / RELEASE).is_dir() else []
    return found + [path.name for _, path in _iterations(folder)]


def delete_all(save: Path) -> list[str]:
    """Delete every checkpoint of a folder, first what makes one count.

    Returns:
        Their names.
    """
    gone = names(save)
    _write_tracker(save, None)
    for iteration, _ in list(_iterations(save)):
        _delete(save, iteration)
    shutil.rmtree(save / RELEASE, ignore_errors=True)
    return gone


def folder_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _iterations(folder: Path) -> Iterator[tuple[int, Path]]:
    """The checkpoints in a folder, whole or not, the oldest first."""
    found = [(int(path.name[5:]), path) for path in folder.glob("iter_*") if re.fullmatch(r"iter_[0-9]+", path.name)]
    return iter(sorted(found))


def _lacks(folder: Path, ckpt_format: str) -> str | None:
    """Which of its last files a checkpoint lacks; None: it was written to the end."""
    if not folder.is_dir():
        return f"{folder} is missing"
    if _is_legacy(folder):
        return None
    for name in dict.fromkeys((".metadata", LAST_FILES[ckpt_format])):
        if not os.path.lexists(folder / name):  # what is there and no file is damage
            if folder.name == RELEASE:
                return f"it has no {name}, which a {ckpt_format} checkpoint has (--ckpt-format)"
            return f"it has no {name}: the run ended while saving it"
    return None


def _is_legacy(folder: Path) -> bool:
    """Whether a checkpoint is in megatron's old format, which has no such files."""
    has_index = (folder / ".metadata").exists() or (folder / "metadata.json").exists()
    return not has_index and any(folder.glob("mp_rank_*"))


def _is_whole(folder: Path, ckpt_format: str) -> bool:
    return ckpt_format in LAST_FILES and _lacks(folder, ckpt_format) is None and damage(folder, ckpt_format) is None


def _there_is(complete: list[int], flag: str = "--ckpt-step") -> str:
    if not complete:
        return "no other checkpoint in it is complete"
    return f"complete are {', '.join(map(str, complete))}: {flag} {complete[-1]} takes the last"


def _delete(save: Path, iteration: int) -> None:
    """Delete a checkpoint, first what makes it count as complete."""
    folder = save / folder_name(iteration)
    for name in (*LAST_FILES.values(), ".metadata"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder)
    shutil.rmtree(save / DATA / folder.name, ignore_errors=True)


def _write_tracker(folder: Path, iteration: int | None) -> None:
    if iteration is None:
        (folder / TRACKER).unlink(missing_ok=True)
        return
    write_text(folder / TRACKER, str(iteration))


class _Record:
    """Stands in for anything that `.metadata` names: keeps what a pickle gives it and runs nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):  # others, such as a tensor's properties, say nothing about files
            vars(self).update(state)


# What `.metadata`, a pickle, may name; anything else could be made to run code.
_INDEX_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}


class IndexUnpickler(pickle.Unpickler):
    """Reads `torch.distributed.checkpoint`'s .metadata, and only what such an index consists of."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and re.fullmatch(
            r"(b?float|u?int)(\d\w*)?|complex\d+|bool|long|half|double|short", name
        )
        if not is_dtype and name not in _INDEX_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint does; load only your own")
        return self.found(module, name)

    def found(self, module: str, name: str) -> Any:
        return super().find_class(module, name)


class _IndexWithoutTorch(IndexUnpickler):
    """The same with a `_Record` in the place of everything that is torch's, and tuples for sizes."""

    def found(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        return _Record if module.startswith("torch") else super().found(module, name)

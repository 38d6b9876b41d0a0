"""The folder that a run saves into: whether it may be written, whose checkpoints are in it, and who else is at it.

Imports neither torch nor megatron, so that the launcher answers within a second.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import IO

from runtime import checkpoints

LOCK = ".lock"


class FolderInUse(RuntimeError):
    """Another run saves into the folder; the message names it."""


def problems(args: Namespace) -> list[str]:
    """Refusals of the folders that a run would write into.

    Args:
        args: the effective flags: those that name them, `load`, `finetune` and `overwrite_checkpoints`.
    """
    if os.environ.get("RANK", "0") != "0":
        return []  # one rank's look is enough; others may come when the first has begun to write
    flags = ("--save", "--tensorboard-dir", "--save-hf", "--save-adapter", "--dump-bad-batch")
    folders = [(flag, vars(args)[flag[2:].replace("-", "_")]) for flag in flags]
    found = [problem for flag, folder in folders if folder for problem in _unwritable(flag, Path(folder))]
    if args.save and not found:
        found += _older_checkpoints(args)
        try:
            lock(Path(args.save), look_only=True)
        except FolderInUse as error:
            found.append(f"--save {error}")
        except OSError as error:
            found.append(f"--save {args.save}: {error.filename}: {error.strerror}; give another folder (OUTPUT_DIR)")
    return found


def _unwritable(flag: str, folder: Path) -> list[str]:
    """Why nothing can be written into a folder, which may not be there yet."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        if there.is_symlink():
            return [f"{flag} {folder}: {there} is a link to nowhere; give another folder (OUTPUT_DIR)"]
        there = there.parent
    if not there.is_dir():
        return [f"{flag} {folder}: {there} is a file; give another folder (OUTPUT_DIR)"]
    try:
        # Permissions alone don't say it: read-only disks, root; nor does an empty file: full disks, quotas.
        with tempfile.TemporaryFile(dir=there, buffering=0) as file:
            file.write(bytes(4096))
    except OSError as error:
        return [f"{flag} {folder}: {there} can't be written ({error.strerror}); give another folder (OUTPUT_DIR)"]
    return []


def _older_checkpoints(args: Namespace) -> list[str]:
    """A run that starts anew among an older one's checkpoints would write over some and mix with the rest."""
    if _goes_on(args) or args.overwrite_checkpoints or not (there := checkpoints.names(Path(args.save))):
        return []
    return [
        f"--save {args.save}: there are an older run's checkpoints in it ({there[-1]} is the last of {len(there)}), "
        "and this run doesn't go on from them. CKPT_RESUME=1 (--load with the same folder) goes on, another OUTPUT_DIR "
        "(--save) keeps both, --overwrite-checkpoints deletes the older run's"
    ]


def _goes_on(args: Namespace) -> bool:
    """Whether the run continues the one whose checkpoints are in `--save`."""
    return bool(args.load) and Path(args.load).resolve() == Path(args.save).resolve() and not args.finetune


def lock(folder: Path, *, look_only: bool = False) -> IO[str] | None:
    """Make a folder this process's own until it ends or closes what is returned; the system sees to it.

    A POSIX lock: it belongs to the process, not to those that it forks, and works over NFS version 4, and version 3
    with a lock daemon. On a file system without locks a line says that nobody is kept out.

    Args:
        folder: made when it isn't there, unless looking only.
        look_only: tell whether it could be had, and leave everything as it is.

    Raises:
        FolderInUse: another process has it: its machine, process id and start.
        OSError: the folder can't be written.
    """
    path = folder / LOCK
    if look_only and not path.exists():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115  the lock goes with the file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        other = _owner(file.read())
        file.close()
        raise FolderInUse(
            f"{folder}: {other} is saving into it; wait for it or end it, or give another OUTPUT_DIR (--save)"
        ) from None
    except OSError as error:
        print(f"notice: {path} can't be locked ({error.strerror}): a second run into it won't be noticed", flush=True)
    if look_only:
        file.close()
        return None
    file.truncate(0)
    owner: dict[str, str | int] = {"host": socket.gethostname(), "pid": os.getpid()}
    owner["start"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
    if job := os.environ.get("SLURM_JOB_ID"):
        owner["slurm_job"] = job
    file.write(json.dumps(owner) + "\n")
    file.flush()
    return file


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        job = f", Slurm job {owner['slurm_job']}" if "slurm_job" in owner else ""
        return f"a run on {owner['host']} (process {owner['pid']}, since {owner['start']}{job})"
    except (ValueError, KeyError, TypeError):  # it has the lock and hasn't written yet
        return "another run"


_held: list[IO[str] | None] = []  # closing the file would let go of the lock


def begin(args: Namespace) -> None:
    """Take `--save` for as long as this process lives, and clear it with `--overwrite-checkpoints`.

    On the first rank, before training.

    Raises:
        FolderInUse, OSError: as `lock`.
    """
    if not args.save:
        return
    save = Path(args.save)
    _held.append(lock(save))
    if args.overwrite_checkpoints and not _goes_on(args):
        for name in checkpoints.delete_all(save):
            print(f"  deleted {save / name} (--overwrite-checkpoints)", flush=True)

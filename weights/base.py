"""The base that an adapter's checkpoint belongs to: `adapter.json` beside the checkpoints. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.adapters import AdapterMap
from weights.folder import FolderError, HfFolder

RECORD = "adapter.json"
OWN_BASE = "base"  # beside the checkpoints: the base of a run that started from random weights


@dataclass(frozen=True)
class BaseRecord:
    """What an adapter's checkpoint says about itself and its base.

    path: the base's folder, absolute.
    revision: the hub's commit, where the folder is a snapshot of a repository.
    headers: SHA-256 of the names, shapes and dtypes of the base's tensors.
    rank, alpha, dropout, rslora: the adapter's options.
    modules: every adapted HuggingFace module, or tensor of stacked experts.
    """

    path: str
    revision: str | None
    headers: str
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    modules: list[str]

    @classmethod
    def of(cls, folder: HfFolder, mapping: AdapterMap) -> BaseRecord:
        path = folder.path.resolve()
        revision = path.name if path.parent.name == "snapshots" else None
        return cls(str(path), revision, header_hash(folder), **asdict(mapping.options), modules=list(mapping.modules))

    @classmethod
    def read(cls, checkpoints: Path) -> BaseRecord | None:
        """Of a folder of checkpoints; None if these hold whole models.

        Raises:
            FolderError: it can't be read.
        """
        file = checkpoints / RECORD
        if not file.is_file():
            return None
        try:
            return cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise FolderError(checkpoints, [f"{RECORD} can't be read: {error!r}"]) from error

    def write(self, checkpoints: Path) -> None:
        checkpoints.mkdir(parents=True, exist_ok=True)
        (checkpoints / RECORD).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def differences(self, other: BaseRecord) -> list[str]:
        """What a run asks for (`other`) that this checkpoint isn't, each with both values."""
        found = []
        if self.headers != other.headers:
            found.append(f"its base is {self.path}, and {other.path} has other tensors")
        elif self.revision != other.revision:
            found.append(f"its base is revision {self.revision}, and {other.path} is {other.revision}")
        for name in ("rank", "alpha", "rslora"):
            mine, theirs = vars(self)[name], vars(other)[name]
            if mine != theirs:
                found.append(f"it has --lora-{name} {mine}, and the command line {theirs}")
        if set(self.modules) != set(other.modules):
            odd = sorted(set(self.modules) ^ set(other.modules))
            found.append(f"it adapts other modules (--lora-targets): {odd[0]} and {len(odd) - 1} more differ")
        return found


def header_hash(folder: HfFolder) -> str:
    """See `BaseRecord.headers`."""
    headers: Mapping[str, Any] = {name: [list(folder.shapes[name]), folder.dtypes[name]] for name in folder.shapes}
    return hashlib.sha256(json.dumps(headers, sort_keys=True).encode()).hexdigest()

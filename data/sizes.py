"""How large the samples of a split are: measured once, by all ranks and their workers, and kept.

    rows -> shards of 4,096, each a file in the cache -> one file of all

Ranks share the work through the cache's files alone: each takes the next shard that isn't there and that nobody holds
the lock of. So no collective waits for it, a stopped run goes on where it was, and ranks without a common file system
measure everything by themselves.

N samples of a split.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import zipfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from data.bad_sample import BadSample
from data.cache import published
from data.workers import Workers

if TYPE_CHECKING:
    from data.sample import Sample

SHARD = 4096
EXAMPLES = 10  # broken samples that a message names
_VERSION = 2  # of the files
_POLL = 0.2  # seconds between looks at shards that other processes measure


@dataclass(frozen=True)
class SampleSize:
    """What packing needs to know of a sample.

    tokens: its length; 0 drops it.
    patches: rows of its pixel_values.
    trained: its labels that are trained: trained tokens but for the first, which nothing predicts.
    remark: counted for the log: "dropped: ..." and why, or what the sample lost to fit.
    notes: what else is counted about it, by remark.
    """

    tokens: int
    patches: int
    trained: int
    remark: str = ""
    notes: Mapping[str, int] = field(default_factory=dict)


class SampleDataset(Protocol):
    """One split of an indexed dataset; lives in forked workers.

    name: for messages and the log, "receipts/train".
    fingerprint: changes with anything that the sizes depend on: files, split, processor, resolution, length limit.
    cache_dir: folder that keeps the sizes between runs; None doesn't keep them.
    """

    name: str
    fingerprint: str
    cache_dir: Path | None

    def __len__(self) -> int: ...

    def size(self, index: int) -> SampleSize:
        """Size of a sample, from its text and its images' headers: called once for each, before training.

        Raises:
            BadSample: it is broken.
        """
        ...

    def __getitem__(self, index: int) -> Sample:
        """The sample, of exactly that size; called for samples that aren't dropped.

        Raises:
            BadSample: it is broken, which only its pixels show.
        """
        ...

    def without_pixels(self) -> Self:
        """The same samples for a pipeline stage that doesn't run the vision encoder: nothing reads pixel_values, so
        they may be [0, D]. The dataset itself will do where pixels cost nothing."""
        ...


@runtime_checkable
class RowsOfSamples(Protocol):
    """A dataset whose rows may be several samples each (`--train-on exact`)."""

    def sizes(self, index: int) -> Sequence[SampleSize]:
        """Of the samples of a row."""
        ...

    def sample(self, index: int, part: int) -> Sample:
        """One of them."""
        ...


@dataclass(frozen=True)
class Sizes:
    """Sizes of a split, and what was said about its samples.

    tokens, patches, trained: [N] int32; a dropped sample has 0 tokens.
    dropped, changed: number of samples by remark.
    rows, parts: [N] int64, int32, the row of the dataset that each sample is in, and which of its samples it is; None
        where row i is sample i.
    broken: number of rows by reason; each is a sample of 0 tokens.
    examples: what is said about the first of them.
    bad_file: JSON lines with all of them.
    """

    tokens: np.ndarray
    patches: np.ndarray
    trained: np.ndarray
    dropped: Mapping[str, int]
    changed: Mapping[str, int]
    rows: np.ndarray | None = None
    parts: np.ndarray | None = None
    broken: Mapping[str, int] = field(default_factory=dict)
    examples: tuple[str, ...] = ()
    bad_file: Path | None = None

    def place(self, sample: int) -> tuple[int, int]:
        """A sample's row, and which of its samples it is."""
        if self.rows is None or self.parts is None:
            return sample, 0
        return int(self.rows[sample]), int(self.parts[sample])


def measure(dataset: SampleDataset, *, workers: int = 0) -> Sizes:
    """Sizes of all samples: from the dataset's cache, or in one pass over it that all processes share.

    Raises:
        Whatever `dataset.size` raises but for BadSample, with a note that names the sample.
    """
    cache = dataset.cache_dir
    if cache is None or not os.access(cache, os.W_OK):
        with Workers(partial(_measured, dataset), workers, len(dataset)) as pool:
            return _Shard.of(range(len(dataset)), pool.map(range(len(dataset)))).sizes(None)
    key = hashlib.sha256(f"{_VERSION}\n{dataset.name}\n{dataset.fingerprint}\n{len(dataset)}".encode()).hexdigest()[:24]
    path = cache / f"sizes-{key}.npz"
    while True:
        if (whole := _Shard.read(path)) is not None:
            return whole.sizes(path.with_suffix(".bad.jsonl"))
        _measure_shards(dataset, cache / f"sizes-{key}", path, workers)


@dataclass(frozen=True)
class _Shard:
    """The measures of consecutive rows, or of all.

    numbers: [samples, 5] int64: tokens, patches, trained, row, part.
    bad: reason and message of each broken row.
    """

    numbers: np.ndarray
    dropped: Counter[str]
    changed: Counter[str]
    bad: list[tuple[str, str]]

    @classmethod
    def of(cls, rows: range, measured: Iterator[Sequence[SampleSize] | BadSample]) -> Self:
        numbers: list[tuple[int, int, int, int, int]] = []
        shard = cls(np.empty((0, 5), np.int64), Counter(), Counter(), [])
        for row, found in zip(rows, measured, strict=True):
            if isinstance(found, BadSample):
                shard.bad.append((str(found.reason), str(found)))
                numbers.append((0, 0, 0, row, 0))
                continue
            for part, size in enumerate(found):
                numbers.append((size.tokens, size.patches, size.trained, row, part))
                if size.tokens == 0:
                    shard.dropped[size.remark or "dropped: no tokens"] += 1
                else:
                    shard.changed.update(size.notes)
                    shard.changed[size.remark] += bool(size.remark)
        shard.changed.pop("", None)
        return cls(np.array(numbers, np.int64).reshape(-1, 5), shard.dropped, shard.changed, shard.bad)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """A file's; None if it isn't there. A damaged one is deleted, with a notice."""
        try:
            with np.load(path, allow_pickle=False) as file:
                said = json.loads(str(file["said"]))
                return cls(file["numbers"], Counter(said["dropped"]), Counter(said["changed"]), said["bad"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            print(f"notice: {path} is damaged ({error}); it is measured again", file=sys.stderr, flush=True)
            path.unlink(missing_ok=True)
            return None

    def write(self, path: Path) -> None:
        said = json.dumps({"dropped": self.dropped, "changed": self.changed, "bad": self.bad})
        with published(path) as file:
            np.savez(file, numbers=self.numbers, said=np.array(said))

    def sizes(self, bad_file: Path | None) -> Sizes:
        tokens, patches, trained, rows, parts = self.numbers.T
        plain = not parts.any() and np.array_equal(rows, np.arange(len(rows)))
        return Sizes(
            tokens.astype(np.int32),
            patches.astype(np.int32),
            trained.astype(np.int32),
            dict(self.dropped),
            dict(self.changed),
            None if plain else rows.copy(),
            None if plain else parts.astype(np.int32),
            dict(Counter(reason for reason, _ in self.bad)),
            tuple(message for _, message in self.bad[:EXAMPLES]),
            bad_file if self.bad else None,
        )


def _measured(dataset: SampleDataset, index: int) -> Sequence[SampleSize] | BadSample:
    try:
        return dataset.sizes(index) if isinstance(dataset, RowsOfSamples) else [dataset.size(index)]
    except BadSample as error:
        return error
    except Exception as error:
        error.add_note(f"while measuring sample {index} of {dataset.name}")
        raise


def _measure_shards(dataset: SampleDataset, folder: Path, whole: Path, workers: int) -> None:
    """Help until every shard is there or some process has put them together; then put them together if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(dataset), SHARD)
    waiting = deque(starts)
    # Each rank begins elsewhere, so that they meet seldom.
    waiting.rotate(-len(starts) * int(os.environ.get("RANK", "0")) // int(os.environ.get("WORLD_SIZE", "1")))
    quiet = not sys.stderr.isatty() or os.environ.get("LOCAL_RANK", "0") != "0"
    with (
        Workers(partial(_measured, dataset), workers, len(dataset)) as pool,
        tqdm(total=len(dataset), desc=f"measuring {dataset.name}", unit="row", disable=quiet) as progress,
    ):
        skipped = 0  # shards in a row that others hold
        while waiting and not whole.is_file():
            start = waiting.popleft()
            rows = range(start, min(start + SHARD, len(dataset)))
            path = folder / f"{start}.npz"
            if not path.is_file():
                with _try_lock(path) as mine:
                    if not mine:
                        waiting.append(start)
                        skipped += 1
                        if skipped >= len(waiting):
                            time.sleep(_POLL)
                        continue
                    if not path.is_file():
                        _Shard.of(rows, pool.map(rows)).write(path)
            skipped = 0
            progress.update(len(rows))
    if not whole.is_file():
        _put_together(folder, [folder / f"{start}.npz" for start in starts], whole)


def _put_together(folder: Path, paths: Sequence[Path], whole: Path) -> None:
    with _try_lock(whole, blocking=True):
        if whole.is_file():
            return
        numbers, dropped, changed = [np.empty((0, 5), np.int64)], Counter[str](), Counter[str]()
        bad: list[tuple[str, str]] = []
        for path in paths:
            shard = _Shard.read(path)
            if shard is None:  # damaged: measured again in the next round
                return
            numbers.append(shard.numbers)
            dropped += shard.dropped
            changed += shard.changed
            bad += shard.bad
        with published(whole.with_suffix(".bad.jsonl")) as file:
            for reason, message in bad:
                file.write(json.dumps({"reason": reason, "sample": message}, ensure_ascii=False).encode() + b"\n")
        _Shard(np.concatenate(numbers), dropped, changed, bad).write(whole)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _try_lock(path: Path, *, blocking: bool = False) -> Iterator[bool]:
    """Whether this process may make the file now. Where there are no locks (some network file systems), all may."""
    lock = FileLock(path.parent / f".{path.name}.lock", mode=0o666)
    try:
        lock.acquire(timeout=-1 if blocking else 0)
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError):
        yield True
        return
    try:
        yield True
    finally:
        lock.release()

"""Which samples go together: a deterministic plan of packs, and the source that reads them.

A pack is the unit of micro-batch size, global batch size and consumed samples: in THD as many samples as fit the
token budget, in BSHD one sample. The plan depends on the seed and the samples' sizes alone, never on the layout or
the number of ranks, so pack i is always the same samples and resuming is an index.

N samples of a split.
"""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import os
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from runtime import lifetime

if TYPE_CHECKING:
    from data.sample import Sample

type Pack = Sequence[Sample]

# Packs being filled at a time. More fill better, and more of a pack's samples come from far apart in the shuffle.
OPEN_PACKS = 32


@dataclass(frozen=True)
class SampleSize:
    """What packing needs to know of a sample.

    tokens: its length; 0 drops it.
    patches: rows of its pixel_values.
    trained: its labels that are trained: trained tokens but for the first, which nothing predicts.
    remark: counted for the log: "dropped: ..." and why, or what the sample lost to fit.
    """

    tokens: int
    patches: int
    trained: int
    remark: str = ""


class SampleDataset(Protocol):
    """One split of an indexed dataset; lives in forked workers.

    name: for messages and the log, "receipts/train".
    fingerprint: changes with anything that the sizes depend on: files, split, processor, resolution, length limit.
    cache_dir: folder beside the data that keeps the sizes between runs; None doesn't keep them.
    """

    name: str
    fingerprint: str
    cache_dir: Path | None

    def __len__(self) -> int: ...

    def size(self, index: int) -> SampleSize:
        """Size of a sample, from its text and its images' headers: called once for each, before training."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """The sample, of exactly that size; called for samples that aren't dropped."""
        ...

    def without_pixels(self) -> Self:
        """The same samples for a pipeline stage that doesn't run the vision encoder: nothing reads pixel_values, so
        they may be [0, D]. The dataset itself will do where pixels cost nothing."""
        ...


class PackSource(Protocol):
    """What the loader reads. An indexed source's state is an integer; a stream's would be its own."""

    def __next__(self) -> Pack: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Sizes:
    """Sizes of a split, and what was said about its samples.

    tokens, patches, trained: [N] int32; a dropped sample has 0 tokens.
    dropped, changed: number of samples by remark.
    """

    tokens: np.ndarray
    patches: np.ndarray
    trained: np.ndarray
    dropped: dict[str, int]
    changed: dict[str, int]


def measure(dataset: SampleDataset, *, workers: int = 0) -> Sizes:
    """Sizes of all samples: from the dataset's cache, or in one pass over it by forked workers.

    Raises:
        Whatever `dataset.size` raises, with a note that names the sample.
    """
    cache = _cache_file(dataset)
    if cache is not None and cache.exists():
        return _read_sizes(cache)
    workers = min(workers, len(dataset) // 64)  # a fork isn't worth it for less
    if workers > 1:
        # Forked workers inherit the dataset: nothing is pickled or imported again.
        begin = (dataset, os.getpid())
        with lifetime.shielded(), multiprocessing.get_context("fork").Pool(workers, _begin_measuring, begin) as pool:
            rows = pool.map(_size_in_worker, range(len(dataset)), chunksize=16)
    else:
        rows = [_size(dataset, index) for index in range(len(dataset))]
    dropped = Counter(row.remark or "dropped: no tokens" for row in rows if row.tokens == 0)
    changed = Counter(row.remark for row in rows if row.tokens > 0 and row.remark)
    sizes = Sizes(
        tokens=np.array([row.tokens for row in rows], dtype=np.int32),
        patches=np.array([row.patches for row in rows], dtype=np.int32),
        trained=np.array([row.trained for row in rows], dtype=np.int32),
        dropped=dict(dropped),
        changed=dict(changed),
    )
    if cache is not None and os.access(cache.parent, os.W_OK):
        _write_sizes(cache, sizes)
    return sizes


_dataset: SampleDataset | None = None  # the pool's workers read it here


def _begin_measuring(dataset: SampleDataset, parent: int) -> None:
    global _dataset
    lifetime.end_with_parent(parent)
    _dataset = dataset


def _size_in_worker(index: int) -> SampleSize:
    assert _dataset is not None  # the pool's initializer sets it
    return _size(_dataset, index)


def _size(dataset: SampleDataset, index: int) -> SampleSize:
    try:
        return dataset.size(index)
    except Exception as error:
        error.add_note(f"while measuring sample {index} of {dataset.name}")
        raise


def _cache_file(dataset: SampleDataset) -> Path | None:
    if dataset.cache_dir is None:
        return None
    key = f"{dataset.name}\n{dataset.fingerprint}\n{len(dataset)}"
    return dataset.cache_dir / f"sizes-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def _read_sizes(path: Path) -> Sizes:
    with np.load(path, allow_pickle=False) as file:
        warnings = json.loads(str(file["warnings"]))
        return Sizes(file["tokens"], file["patches"], file["trained"], warnings["dropped"], warnings["changed"])


def _write_sizes(path: Path, sizes: Sizes) -> None:
    warnings = json.dumps({"dropped": sizes.dropped, "changed": sizes.changed})
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".npz")
    with os.fdopen(handle, "wb") as file:
        np.savez(file, tokens=sizes.tokens, patches=sizes.patches, trained=sizes.trained, warnings=np.array(warnings))
    os.replace(temporary, path)  # a reader never sees half a file


class PackPlan:
    """The samples of every pack, over endless epochs.

    Each epoch is shuffled anew, uses every sample that isn't dropped once, and ends with its own packs. Lengths
    count as they are: padding to a context-parallel alignment would make packs depend on the layout, so a row may
    exceed its token budget by its documents' padding.

    Args:
        sizes: of all samples.
        seed: of the shuffles.
        token_budget: of a pack; longer samples are dropped.
        patch_budget: of a pack, None for no limit.
        packed: several samples to a pack, or one.

    Attributes:
        samples: number of samples that are used.
        dropped: number of the others, by reason.

    Raises:
        ValueError: no sample is left; the message counts the reasons.
    """

    def __init__(
        self, sizes: Sizes, *, seed: int, token_budget: int, patch_budget: int | None = None, packed: bool
    ) -> None:
        too_long = sizes.tokens > token_budget
        too_many_patches = ~too_long & (sizes.tokens > 0) & (sizes.patches > (patch_budget or np.inf))
        self._kept = np.flatnonzero((sizes.tokens > 0) & ~too_long & ~too_many_patches)
        self._seed = seed
        self._packed = packed
        self._token_budget = token_budget
        self._patch_budget = patch_budget
        self._sizes = sizes
        self.samples = len(self._kept)
        dropped = Counter(sizes.dropped)
        dropped["dropped: longer than --seq-length"] += int(too_long.sum())
        dropped["dropped: more patches than --max-patches-per-pack"] += int(too_many_patches.sum())
        self.dropped = dict(+dropped)  # without the zeros
        if self.samples == 0:
            raise ValueError(f"no sample is left to train on: {self.dropped or 'the dataset is empty'}")
        self._starts = [0]  # index of each epoch's first pack; the last entry is the next epoch's
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample indices of pack `index`, an endless sequence."""
        while self._starts[-1] <= index:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)[1]) - 1)
        epoch = bisect_right(self._starts, index) - 1
        order, ends = self._epoch(epoch)
        place = index - self._starts[epoch]
        return order[ends[place] : ends[place + 1]]

    def trained_tokens(self, index: int) -> int:
        """Trained labels of pack `index`."""
        return int(self._sizes.trained[self[index]].sum())

    def patches_of_packs(self) -> np.ndarray:
        """[packs] int64: patches of each pack of the first epoch."""
        order, ends = self._epoch(0)
        totals = np.concatenate([[0], np.cumsum(self._sizes.patches[order], dtype=np.int64)])
        return np.diff(totals[ends])

    def epoch_packs(self, epoch: int = 0) -> int:
        """Number of packs of an epoch."""
        return len(self._epoch(epoch)[1]) - 1

    def summary(self) -> str:
        """For the log: samples, packs, how full they are, and what was dropped or changed for which reason."""
        tokens = int(self._sizes.tokens[self._kept].sum())
        packs = self.epoch_packs()
        parts = [
            f"{self.samples} samples in {packs} packs an epoch",
            f"{tokens / (packs * self._token_budget):.1%} full",
            *(f"{count} {reason}" for reason, count in (self.dropped | self._sizes.changed).items()),
        ]
        return ", ".join(parts)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample indices in the epoch's order, and where each pack ends, with a leading 0."""
        if epoch not in self._epochs:
            order = np.random.default_rng((self._seed, epoch)).permutation(self._kept)
            self._epochs[epoch] = self._first_fit(order) if self._packed else (order, np.arange(len(order) + 1))
            # Readers of one rank are at most an epoch's boundary apart.
            for old in [known for known in self._epochs if known < epoch - 1]:
                del self._epochs[old]
        return self._epochs[epoch]

    def _first_fit(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each sample goes into the first open pack that has room; when none has, the oldest one is closed."""
        patch_budget = self._patch_budget or int(self._sizes.patches.sum())
        packs: list[list[int]] = []
        open_packs: list[list[int]] = []
        room: list[list[int]] = []  # tokens and patches left in each open pack
        tokens, patches = self._sizes.tokens[order].tolist(), self._sizes.patches[order].tolist()
        for sample, length, pixels in zip(order.tolist(), tokens, patches, strict=True):
            for pack, left in zip(open_packs, room, strict=True):
                if length <= left[0] and pixels <= left[1]:
                    pack.append(sample)
                    left[0] -= length
                    left[1] -= pixels
                    break
            else:
                if len(open_packs) == OPEN_PACKS:
                    packs.append(open_packs.pop(0))
                    room.pop(0)
                open_packs.append([sample])
                room.append([self._token_budget - length, patch_budget - pixels])
        packs += open_packs
        ends = np.cumsum([0, *(len(pack) for pack in packs)])
        return np.fromiter((sample for pack in packs for sample in pack), np.int64, len(order)), ends


class IndexedPacks:
    """Reads a dataset's packs in the plan's order; see `PackSource`.

    Args:
        dataset: the samples.
        plan: their packs.
        order: names what the order depends on; a state saved under another one is refused.

    Attributes:
        position: index of the next pack, counted over all ranks: the whole state.
        period: start again after this many packs, None for endless epochs.
    """

    def __init__(self, dataset: SampleDataset, plan: PackPlan, *, order: str) -> None:
        self.position = 0
        self.period: int | None = None
        self._dataset = dataset
        self._plan = plan
        self._order = order
        self._stride = 1
        self._block = 1
        self._taken = 0  # of the current block

    def shard(self, index: int, count: int, block: int) -> Self:
        """A reader of every count-th block of `block` packs, from the index-th block on, counted from here."""
        reader = copy.copy(self)
        reader.position = self.position + index * block
        reader._stride = count * block
        reader._block = block
        reader._taken = 0
        return reader

    def trained_tokens(self, start: int, count: int) -> int:
        """Trained labels of `count` packs from position `start` on."""
        return sum(self._plan.trained_tokens(self._wrap(index)) for index in range(start, start + count))

    def __next__(self) -> Pack:
        pack = [self._load(int(sample)) for sample in self._plan[self._wrap(self.position + self._taken)]]
        self._taken += 1
        if self._taken == self._block:
            self.position += self._stride
            self._taken = 0
        return pack

    def patches_of_packs(self) -> np.ndarray:
        """[packs] int64: patches of each pack of the first epoch."""
        return self._plan.patches_of_packs()

    @property
    def name(self) -> str:
        return self._dataset.name

    @property
    def epoch_packs(self) -> int:
        """Packs of the first epoch."""
        return self._plan.epoch_packs()

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: it was saved with other data, seed or budgets: its position means other samples here.
        """
        if state["order"] != self._order:
            raise ValueError(
                f"the data's order has changed since the checkpoint: it was {state['order']}, and is {self._order}"
            )
        self.position = state["position"]

    def _wrap(self, index: int) -> int:
        return index if self.period is None else index % self.period

    def _load(self, index: int) -> Sample:
        try:
            return self._dataset[index]
        except Exception as error:
            error.add_note(f"while loading sample {index} of {self._dataset.name}")
            raise

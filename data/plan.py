"""Which samples go together: a deterministic plan of packs.

A pack is the unit of micro-batch size, global batch size and consumed samples: in THD as many samples as fit the
token budget, in BSHD one sample. The plan depends on the seed and the samples' sizes alone, never on the layout or
the number of ranks, so pack i is always the same samples and resuming is an index.

    samples, shuffled -> windows of neighbours -> first fit, the largest first, in all windows at once -> shuffled packs

N samples of a split, W windows, B packs of a window.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from pathlib import Path

import numpy as np

from data.cache import locked, published
from data.sizes import Sizes

# Packs' worth of samples in a window. More fill better, and the packs of one window know each other's samples.
WINDOW_PACKS = 512
LEAST_WINDOW_PACKS = 64
# Samples of a window, which are placed one after the other: in Python, so they are kept to what takes a second.
WINDOW_SAMPLES = 1 << 15
# Epochs of more samples than this are kept in the cache, so that the processes of a machine plan them once.
KEPT_FROM = 100_000


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
        cache: folder that keeps the plans of large splits; None doesn't.

    Attributes:
        samples: number of samples that are used.
        dropped: number of the others, by reason.
        sizes: the given ones.

    Raises:
        ValueError: no sample is left; the message counts the reasons.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        seed: int,
        token_budget: int,
        patch_budget: int | None = None,
        packed: bool,
        cache: Path | None = None,
    ) -> None:
        too_long = sizes.tokens > token_budget
        too_many_patches = ~too_long & (sizes.tokens > 0) & (sizes.patches > (patch_budget or np.inf))
        self._kept = np.flatnonzero((sizes.tokens > 0) & ~too_long & ~too_many_patches)
        self._seed = seed
        self._packed = packed
        self._token_budget = token_budget
        self._patch_budget = patch_budget
        self.sizes = sizes
        self.samples = len(self._kept)
        dropped = Counter(sizes.dropped)
        dropped["dropped: longer than --seq-length"] += int(too_long.sum())
        dropped["dropped: more patches than --max-patches-per-pack"] += int(too_many_patches.sum())
        dropped.update({f"broken: {reason}": count for reason, count in sizes.broken.items()})
        self.dropped = dict(+dropped)  # without the zeros
        if self.samples == 0:
            raise ValueError(f"no sample is left to train on: {self.dropped or 'the dataset is empty'}")
        self._cache = cache if self.samples >= KEPT_FROM else None
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
        return int(self.sizes.trained[self[index]].sum())

    def patches_of_packs(self) -> np.ndarray:
        """[packs] int64: patches of each pack of the first epoch."""
        order, ends = self._epoch(0)
        totals = np.concatenate([[0], np.cumsum(self.sizes.patches[order], dtype=np.int64)])
        return np.diff(totals[ends])

    def epoch_packs(self, epoch: int = 0) -> int:
        """Number of packs of an epoch."""
        return len(self._epoch(epoch)[1]) - 1

    @property
    def fill(self) -> float:
        """Share of the first epoch's token budgets that samples fill."""
        return int(self.sizes.tokens[self._kept].sum()) / (self.epoch_packs() * self._token_budget)

    def summary(self) -> str:
        """For the log: samples, packs, how full they are, and what was dropped or changed for which reason."""
        parts = [
            f"{self.samples} samples in {self.epoch_packs()} packs an epoch",
            f"{self.fill:.1%} full",
            *(f"{count} {reason}" for reason, count in (self.dropped | dict(self.sizes.changed)).items()),
        ]
        return ", ".join(parts)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample indices in the epoch's order, and where each pack ends, with a leading 0."""
        if epoch not in self._epochs:
            self._epochs[epoch] = self._plan(epoch) if self._cache is None else self._kept_plan(self._cache, epoch)
            # Readers of one rank are at most an epoch's boundary apart.
            for old in [known for known in self._epochs if known < epoch - 1]:
                del self._epochs[old]
        return self._epochs[epoch]

    def _kept_plan(self, cache: Path, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's plan, mapped from a file that the first process writes."""
        digest = hashlib.sha256(
            f"{epoch} {self._seed} {self._token_budget} {self._patch_budget} {self._packed}".encode()
        )
        for part in (self._kept, self.sizes.tokens, self.sizes.patches):
            digest.update(part.tobytes())
        path = cache / f"plan-{digest.hexdigest()[:24]}.npy"
        with locked(path):
            if not path.is_file():
                order, ends = self._plan(epoch)
                with published(path) as file:
                    np.save(file, np.concatenate([[len(ends)], ends, order]))
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        packs = int(found[0])
        return found[1 + packs :], found[1 : 1 + packs]

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.random.default_rng((self._seed, epoch))
        order = numbers.permutation(self._kept)
        if not self._packed:
            return order, np.arange(len(order) + 1)
        tokens, patches = self.sizes.tokens[order], self.sizes.patches[order]
        if self._patch_budget is None:
            patches = np.zeros_like(patches)
        pack = first_fit(tokens, patches, self._token_budget, self._patch_budget or 0)
        by_pack = np.argsort(pack, kind="stable")
        counts = np.bincount(pack)
        shuffled = numbers.permutation(len(counts))
        starts = np.concatenate([[0], np.cumsum(counts)])[shuffled]
        ends = np.concatenate([[0], np.cumsum(counts[shuffled])])
        # Each pack's samples, moved to where the shuffle puts the pack.
        moved = np.repeat(starts - ends[:-1], counts[shuffled]) + np.arange(len(order))
        return order[by_pack[moved]], ends


def first_fit(tokens: np.ndarray, patches: np.ndarray, token_budget: int, patch_budget: int) -> np.ndarray:
    """The pack of each sample: [N] int64, from 0 without gaps.

    Within a window, the sample that takes the largest share of its budget comes first, and goes into the first pack
    that has room. All windows take a step at once.

    Args:
        tokens, patches: [N] of each sample, none above its budget.
    """
    share = np.maximum(tokens / token_budget, patches / max(patch_budget, 1))
    per_pack = max(len(tokens) / max(share.sum(), 1e-9), 1)
    packs = int(np.clip(WINDOW_SAMPLES / per_pack, LEAST_WINDOW_PACKS, WINDOW_PACKS))
    window = (np.cumsum(share) / packs).astype(np.int64)
    window = np.minimum(window, max(int(share.sum() / packs) - 1, 0))  # the last, short one joins the one before
    counts = np.bincount(window)
    # Windows by falling number of samples, so that those that still have one are always the first.
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    row = rank[window]
    sample = np.lexsort((-share, row))  # row by row, the largest first
    row_counts = np.sort(counts)[::-1]
    column = np.arange(len(sample)) - np.repeat(np.concatenate([[0], np.cumsum(row_counts)[:-1]]), row_counts)
    table = np.full((len(counts), row_counts[0]), -1)
    table[row[sample], column] = sample
    chosen = _place_all(
        table, row_counts, tokens.astype(np.int32), patches.astype(np.int32), token_budget, patch_budget
    )
    key = row * (int(chosen.max()) + 1) + chosen
    return np.unique(key, return_inverse=True)[1]


def _place_all(
    table: np.ndarray,
    row_counts: np.ndarray,
    tokens: np.ndarray,
    patches: np.ndarray,
    token_budget: int,
    patch_budget: int,
) -> np.ndarray:
    """[N] int64: the number of each sample's pack in its window.

    Args:
        table: [W, most samples of a window] int64, samples of each window in the order they are placed.
        row_counts: [W] samples of each window, falling.
    """
    chosen = np.zeros(len(tokens), np.int64)
    room = np.full((len(table), 8), token_budget, np.int32)  # [W, B] of every pack, opened or not
    patch_room = np.full((len(table), 8), patch_budget, np.int32)
    opened = 0  # the most packs that a window has opened
    with_patches = bool(patches.any())
    rows = np.arange(len(table))
    active = len(table)
    for step in range(table.shape[1]):
        while row_counts[active - 1] <= step:
            active -= 1
        samples = table[:active, step]
        wanted, wanted_patches = tokens[samples], patches[samples]
        if opened + 1 > room.shape[1]:
            room = np.concatenate([room, np.full_like(room, token_budget)], axis=1)
            patch_room = np.concatenate([patch_room, np.full_like(patch_room, patch_budget)], axis=1)
        fits = room[:active, : opened + 1] >= wanted[:, None]
        if with_patches:
            fits &= patch_room[:active, : opened + 1] >= wanted_patches[:, None]
        pack = fits.argmax(axis=1)  # the first; one that isn't opened yet has room for any sample
        room[rows[:active], pack] -= wanted
        if with_patches:
            patch_room[rows[:active], pack] -= wanted_patches
        chosen[samples] = pack
        opened = max(opened, int(pack.max()) + 1)
    return chosen

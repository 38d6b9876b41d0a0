"""Reading packs: the samples of a plan's packs, by number, and what becomes of those that turn out broken.

Which samples a pack holds is planned from their sizes. A sample that only its pixels show to be broken leaves its pack
a sample short: the ranks that read pixels find out, and tell the pipeline stages that don't (`data/verdicts.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from data.bad_sample import BadSample, Reason
from data.bounded import time_limit
from data.plan import PackPlan
from data.sizes import RowsOfSamples, SampleDataset

if TYPE_CHECKING:
    from data.sample import Sample

type Pack = Sequence[Sample]


@dataclass(frozen=True)
class Lost:
    """A planned sample that isn't in its pack.

    sample: its number in the plan.
    place: in its pack, or in its micro-batch's packs one after another, counting every planned sample.
    trained: labels that it was planned to train.
    reason, message: why.
    """

    sample: int
    place: int
    trained: int
    reason: Reason
    message: str


class PackSource(Protocol):
    """What the loader reads. An indexed source's state is an integer and a few; a stream's would be its own."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class IndexedPacks:
    """Reads a dataset's packs in the plan's order; see `PackSource`.

    Args:
        dataset: the samples.
        plan: their packs.
        order: names what the order depends on; a state saved under another one is refused.
        timeout: seconds that a sample may take; None for as long as it likes.

    Attributes:
        position: index of the next pack, counted over all ranks.
        period: start again after this many packs, None for endless epochs.
        overdue: samples that once took too long. A resumed run leaves them out too, however long they take now.
    """

    def __init__(self, dataset: SampleDataset, plan: PackPlan, *, order: str, timeout: float | None = None) -> None:
        self.position = 0
        self.period: int | None = None
        self.overdue: set[int] = set()
        self._dataset = dataset
        self._plan = plan
        self._order = order
        self._timeout = timeout

    def trained_tokens(self, start: int, count: int) -> int:
        """Planned trained labels of `count` packs from position `start` on."""
        return sum(self._plan.trained_tokens(self._wrap(index)) for index in range(start, start + count))

    def read(self, start: int, count: int, verdict: Collection[int] | None = None) -> tuple[list[Pack], list[Lost]]:
        """`count` packs from position `start` on.

        Args:
            verdict: places of the samples that are lost, as another rank found; None to find out.

        Returns:
            The packs, some shorter than planned or empty, and the samples that they lack: nothing of a given verdict.

        Raises:
            BadSample: with a verdict, a sample that it doesn't call lost.
        """
        packs: list[Pack] = []
        lost: list[Lost] = []
        place = 0
        for index in range(start, start + count):
            pack = []
            for sample in self._plan[self._wrap(index)].tolist():
                if verdict is None:
                    try:
                        pack.append(self._load(sample))
                    except BadSample as error:
                        trained = int(self._plan.sizes.trained[sample])
                        lost.append(Lost(sample, place, trained, error.reason, str(error)))
                elif place not in verdict:
                    pack.append(self._load(sample))
                place += 1
            packs.append(pack)
        return packs, lost

    def planned_samples(self, start: int, count: int) -> int:
        """Samples in `count` packs from position `start` on."""
        return sum(len(self._plan[self._wrap(index)]) for index in range(start, start + count))

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
        return {"position": self.position, "order": self._order, "overdue": sorted(self.overdue)}

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
        self.overdue |= set(state.get("overdue", ()))  # older checkpoints have none

    def _wrap(self, index: int) -> int:
        return index if self.period is None else index % self.period

    def _load(self, sample: int) -> Sample:
        row, part = self._plan.sizes.place(sample)
        if sample in self.overdue:
            raise BadSample(Reason.TIMEOUT, f"{self.name}, row {row}: took too long once, and is left out for good")
        try:
            with time_limit(self._timeout, _Overdue()):
                if self._plan.sizes.parts is not None and isinstance(self._dataset, RowsOfSamples):
                    loaded = self._dataset.sample(row, part)
                else:
                    loaded = self._dataset[row]
        except _Overdue:
            raise BadSample(
                Reason.TIMEOUT, f"{self.name}, row {row}: more than {self._timeout:g} seconds (--sample-timeout)"
            ) from None
        except BadSample:
            raise
        except Exception as error:
            error.add_note(f"while loading sample {row} of {self.name}")
            raise
        sizes = self._plan.sizes
        found = (len(loaded.input_ids), int(loaded.grid_thw.prod(-1).sum()))
        planned = (int(sizes.tokens[sample]), int(sizes.patches[sample]))
        if found != planned:
            raise BadSample(
                Reason.CHANGED,
                f"{loaded.id}: {found[0]} tokens and {found[1]} patches, and {planned[0]} and {planned[1]} when it was "
                "measured; delete the sizes-* files in --data-cache-path",
            )
        return loaded


class _Overdue(BaseException):
    """Not an Exception: libraries that swallow those in the middle of a decode mustn't swallow this."""

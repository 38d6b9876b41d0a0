"""What a run does about broken samples: skips them and keeps count, or stops."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.sizes import EXAMPLES, Sizes

if TYPE_CHECKING:
    from data.pack import Lost

# Loaded samples below which a share says nothing.
LEAST_LOADED = 100


@dataclass(frozen=True)
class BadSamplePolicy:
    """`--on-bad-sample` and `--max-bad-fraction`.

    fails: the first broken sample ends the run.
    max_fraction: share of broken samples that a run bears. Samples that are too long, cut or untrained don't count.
    """

    fails: bool = False
    max_fraction: float = 0.05

    @classmethod
    def of(cls, args: Namespace) -> BadSamplePolicy:
        return cls(args.on_bad_sample == "fail", args.max_bad_fraction)

    def check_measured(self, name: str, sizes: Sizes) -> None:
        """Stop a run whose data is too broken, before it trains.

        Raises:
            ValueError: counts the reasons, names the first samples and the file with all.
        """
        bad = sum(sizes.broken.values())
        rows = len(sizes.tokens) if sizes.parts is None else int((sizes.parts == 0).sum())
        if not bad or (not self.fails and bad <= self.max_fraction * rows):
            return
        examples = "\n".join(f"  {example}" for example in sizes.examples)
        where = f"\nall of them: {sizes.bad_file}" if sizes.bad_file else ""
        raise ValueError(
            f"{name}: {bad} of {rows} samples are broken ({_counted(sizes.broken)}); {self._fix}\n{examples}{where}"
        )

    @property
    def _fix(self) -> str:
        if self.fails:
            return "--on-bad-sample skip leaves them out"
        return f"--max-bad-fraction {self.max_fraction:g} allows fewer; repair them or raise it"


class BadSampleLog:
    """Counts what a loading rank has read, and says what was broken.

    Args:
        name: of the dataset.
        file: JSON lines with every broken sample; None keeps none.
    """

    def __init__(self, name: str, policy: BadSamplePolicy, file: Path | None) -> None:
        self._name, self._policy, self._file = name, policy, file
        self._loaded = 0
        self._broken: Counter[str] = Counter()
        self._named: set[int] = set()  # they come again every epoch

    def count(self, planned: int, lost: Sequence[Lost]) -> None:
        """A micro-batch was read.

        Args:
            planned: samples that it was to hold.
            lost: those that it doesn't.

        Raises:
            ValueError: a broken sample that the policy doesn't bear, or too many of them.
        """
        self._loaded += planned
        if not lost:
            return
        for sample in lost:
            self._broken[str(sample.reason)] += 1
            if sample.sample not in self._named and len(self._named) < EXAMPLES:
                print(
                    f"> {self._name}: skipped: {sample.message} ({sample.reason}); the MoE routers' auxiliary losses "
                    f"still count its {sample.trained} trained tokens",
                    flush=True,
                )
        new = [sample for sample in lost if sample.sample not in self._named]
        self._named |= {sample.sample for sample in lost}
        if self._file is not None and new:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                for sample in new:
                    file.write(
                        json.dumps({"reason": sample.reason, "sample": sample.message}, ensure_ascii=False) + "\n"
                    )
        bad = self._broken.total()
        if self._policy.fails:
            raise ValueError(f"{lost[0].message} ({lost[0].reason}); --on-bad-sample skip leaves it out")
        if self._loaded >= LEAST_LOADED and bad > self._policy.max_fraction * self._loaded:
            raise ValueError(
                f"{self._name}: {bad} of {self._loaded} samples that this rank loaded are broken "
                f"({_counted(self._broken)}): more than --max-bad-fraction {self._policy.max_fraction:g}; "
                f"the last: {lost[-1].message}"
            )


def _counted(broken: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(broken.items()))

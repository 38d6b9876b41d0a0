"""Losses and weights that became NaN or infinite: counted in the log, and never the end of a run that reports success.

megatron-core 0.19.2 stops at a NaN gradient. With `--no-check-for-nan-in-loss-and-grad`, or in fp16, it goes on, logs
"number of nan iterations: 0" (training/training.py:2608 looks at skipped iterations alone) and ends with code 0.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightsNotFinite(RuntimeError):
    """Training has ended with weights that are NaN or infinite."""


class LossWatch:
    """Counts iterations with a loss that isn't finite, on the device: the host asks when Megatron's log does anyway."""

    def __init__(self) -> None:
        self._bad: Tensor | None = None  # [2] int64: since the last log; the first such iteration, 0 if none

    def see(self, losses: Iterable[Tensor], iteration: int) -> None:
        """Take note of an iteration's losses (any shape, on one device)."""
        sums = [loss.detach().float().sum() for loss in losses]
        if not sums:
            return  # not the last pipeline stage
        is_bad = ~torch.stack(sums).isfinite().all()
        if self._bad is None:
            self._bad = torch.zeros(2, dtype=torch.int64, device=is_bad.device)
        self._bad[0] += is_bad
        self._bad[1] = torch.where(is_bad & (self._bad[1] == 0), iteration, self._bad[1])

    def count(self) -> int:
        """Iterations since the last call; waits for the device."""
        if self._bad is None:
            return 0
        found = int(self._bad[0])
        self._bad[0] = 0
        return found

    @property
    def first(self) -> int:
        """The first iteration with such a loss; 0: none, or another rank knows. Waits for the device."""
        return 0 if self._bad is None else int(self._bad[1])


WATCH = LossWatch()


@functools.cache
def install() -> None:
    """Count in Megatron's log, which its training loop calls by name; calling it again changes nothing."""
    from megatron.training import training
    from megatron.training.global_vars import get_args

    log = training.training_log

    @functools.wraps(log)
    def counting(
        losses: dict[str, Tensor], totals: dict[str, Any], rate: Any, iteration: int, *args: Any, **kwargs: Any
    ) -> Any:
        skipped = args[2]
        if not skipped:  # Megatron counts skipped ones itself
            WATCH.see(losses.values(), iteration)
        if iteration % get_args().log_interval == 0:
            totals["nan iterations"] = totals.get("nan iterations", 0) + WATCH.count()
        return log(losses, totals, rate, iteration, *args, **kwargs)

    training.training_log = counting


@contextmanager
def no_silent_end(chunks: list[nn.Module]) -> Iterator[None]:
    """Refuse to end well, or by `--exit-interval` and its like, with weights that aren't finite.

    Args:
        chunks: the wrapped stages of this rank; may be filled inside the block.

    Raises:
        WeightsNotFinite: naming the parameters and the iteration.
    """
    try:
        yield
    except SystemExit as ended:
        if not ended.code:
            _check(chunks)
        raise
    _check(chunks)


def _check(chunks: list[nn.Module]) -> None:
    names = [name for chunk in chunks for name, parameter in chunk.named_parameters() if not _is_finite(parameter)]
    if names:
        first = WATCH.first
        when = f"the loss wasn't finite for the first time in iteration {first}" if first else "see the log for when"
        raise WeightsNotFinite(
            f"{len(names)} parameters have NaN or infinity, {names[0]} the first; {when}. Start again from an earlier "
            "checkpoint without --no-check-for-nan-in-loss-and-grad, which stops at the iteration that makes the first"
        )


def _is_finite(parameter: nn.Parameter) -> bool:
    values = parameter.detach()
    if isinstance(values, DTensor):
        values = values.to_local()
    # NaN and infinity both show in the extremes, which need no copy.
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())

"""Tokens/s, images/s, TFLOP/s, MFU, padding share and the balance of the vision work for Megatron's own log line.

Megatron prints each key of a micro-batch's report as a ratio of sums over micro-batches and data-parallel ranks.
So a rate is reported as a pair (amount, seconds): a micro-batch's amounts go out with the report of the one after
it, when its time is known. The pairs always belong together; the line's window is shifted by one micro-batch, and
time spent saving a checkpoint counts.
"""

from __future__ import annotations

import time

from data.batch import BatchStats


class Throughput:
    """Counts the training micro-batches of this rank.

    Args:
        model_ranks: ranks that share one micro-batch (TP x CP x PP).
        context_ranks: ranks among which Megatron's reduction counts one micro-batch more than once (CP).
        data_ranks: data-parallel replicas.
        peak_tflops: what one device can do at most, in TFLOP/s; None leaves MFU out.
    """

    def __init__(
        self, *, model_ranks: int, context_ranks: int, data_ranks: int, peak_tflops: float | None = None
    ) -> None:
        self._model_ranks = model_ranks
        self._context_ranks = context_ranks
        self._reporting_ranks = context_ranks * data_ranks
        self._peak_tflops = peak_tflops
        self._running: tuple[BatchStats, float] | None = None  # a micro-batch under way, and when it started
        self._finished: tuple[BatchStats, float] | None = None  # one that is done, and how long it took

    def pause(self) -> None:
        """Validation begins: what is under way ends here."""
        if self._running is not None:
            stats, start = self._running
            self._finished, self._running = (stats, time.perf_counter() - start), None

    def lap(self, stats: BatchStats) -> dict[str, tuple[float, float]]:
        """Start a training micro-batch; returns the previous one's (amount, divisor) pairs."""
        self.pause()
        previous, self._finished = self._finished, None
        self._running = (stats, time.perf_counter())
        processed = stats.tokens + stats.padding_tokens
        report: dict[str, tuple[float, float]] = {"padding share": (stats.padding_tokens, processed)}
        if self._context_ranks > 1:
            # Over a micro-batch's context-parallel ranks: 1 when all encode as many patches.
            report["patches max/mean"] = (stats.busiest_patches, stats.mean_patches)
        names = ["tokens/s", "images/s", "TFLOP/s/GPU", *(["MFU"] if self._peak_tflops else [])]
        if previous is None:
            return {**report, **dict.fromkeys(names, (0.0, 1.0))}
        done, seconds = previous
        share = seconds / self._reporting_ranks
        tflop = done.flops / 1e12 / self._model_ranks
        rates = [
            (done.tokens / self._context_ranks, share),
            (done.images / self._context_ranks, share),
            (tflop, seconds),
        ]
        if self._peak_tflops:
            rates.append((tflop, seconds * self._peak_tflops))
        return {**report, **dict(zip(names, rates, strict=True))}

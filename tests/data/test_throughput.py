"""What the log line gets of a micro-batch."""

from __future__ import annotations

from data.batch import BatchStats
from data.throughput import Throughput

STATS = BatchStats(
    documents=2,
    tokens=30,
    trained_tokens=10,
    mean_trained_tokens=10.0,
    padding_tokens=2,
    images=3,
    patches=40,
    busiest_patches=24,
    mean_patches=20.0,
    flops=1e12,
    samples=[],
)


def test_the_balance_of_the_vision_work_is_of_context_ranks() -> None:
    """Megatron prints sums of firsts over sums of seconds: the mean over micro-batches, weighted by their patches."""
    shared = Throughput(model_ranks=2, context_ranks=2, data_ranks=1).lap(STATS)
    assert shared["patches max/mean"] == (24, 20.0)
    assert shared["padding share"] == (2, 32)
    assert "patches max/mean" not in Throughput(model_ranks=1, context_ranks=1, data_ranks=1).lap(STATS)


def test_a_micro_batchs_rates_come_with_the_next_ones_report() -> None:
    clock = Throughput(model_ranks=4, context_ranks=2, data_ranks=2)
    assert clock.lap(STATS)["tokens/s"] == (0.0, 1.0)
    report = clock.lap(STATS)
    assert report["tokens/s"][0] == 15 and report["images/s"][0] == 1.5
    assert report["TFLOP/s/GPU"][0] == 0.25
    clock.pause()
    tokens, seconds = clock.lap(STATS)["tokens/s"]
    assert tokens == 15 and seconds > 0


def test_mfu_is_of_the_devices_peak() -> None:
    clock = Throughput(model_ranks=4, context_ranks=2, data_ranks=2, peak_tflops=500.0)
    assert clock.lap(STATS)["MFU"] == (0.0, 1.0)
    report = clock.lap(STATS)
    (tflop, seconds), (same, at_peak) = report["TFLOP/s/GPU"], report["MFU"]
    assert tflop == same == 0.25 and at_peak == 500 * seconds
    assert "MFU" not in Throughput(model_ranks=1, context_ranks=1, data_ranks=1).lap(STATS)

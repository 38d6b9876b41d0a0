"""NaN: the right iteration and the samples are named, the batch is saved, and no run ends well with NaN weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from runtime.not_finite import LossWatch, WeightsNotFinite, no_silent_end
from tests.training_server import Job, Result, TrainingServer

FLAGS = ("--model-variant", "tiny", "--train-iters", "6")
# The weights are infinite after the first step, and the second's loss is NaN.
INFINITE = ("--lr", "1e36", "--min-lr", "1e36", "--clip-grad", "0", "--optimizer", "adam")
UNCHECKED = "--no-check-for-nan-in-loss-and-grad"


@pytest.fixture(scope="module")
def server() -> Iterator[TrainingServer]:
    with TrainingServer.running() as server:
        yield server


def train(server: TrainingServer, out: Path, *flags: str) -> Result:
    return server.run(Job(str(out), (*FLAGS, *INFINITE, *flags)))


def test_the_iteration_and_the_samples_are_named_and_the_batch_saved(server: TrainingServer, tmp_path: Path) -> None:
    result = train(server, tmp_path / "out", "--dump-bad-batch", str(tmp_path / "bad"))
    log = result.log()
    assert result.codes == [1]
    last = max(int(number) for number in re.findall(r"iteration +(\d+)/", log))
    assert f"iteration {last + 1}: Unexpected result nan" in log
    (path,) = (tmp_path / "bad").iterdir()
    assert path.name == f"iter_{last + 1:07d}_rank_0000.pt" and f"saved {path}" in log
    saved = torch.load(path, weights_only=True)
    assert saved["iteration"] == last + 1
    for entry in saved["micro_batches"]:
        assert not entry["loss"].isfinite() and entry["samples"]
        assert f"samples {', '.join(entry['samples'])}" in log
        assert entry["batch"]["input_ids"].shape == entry["batch"]["labels"].shape
    assert path.stat().st_size < 2**26


def test_unchecked_nan_is_counted_and_no_success(server: TrainingServer, tmp_path: Path) -> None:
    for name, more in (("end", ()), ("exit", ("--exit-interval", "4"))):
        result = train(server, tmp_path / name, UNCHECKED, *more)
        log = result.log()
        assert result.codes == [1], log[-3000:]
        assert re.search(r"iteration +4/ +6 .* number of nan iterations: +1 ", log), log[-3000:]
        ended = re.search(r"WeightsNotFinite: \d+ parameters have NaN or infinity, .* in iteration (\d+)\. Start", log)
        for iteration, count in ((int(ended[1]) - 1, 0), (int(ended[1]), 1)):
            assert re.search(rf"iteration +{iteration}/ +6 .* number of nan iterations: +{count} ", log)


def test_losses_are_counted_until_the_log_asks() -> None:
    watch = LossWatch()
    assert (watch.count(), watch.first) == (0, 0)
    for iteration, value in enumerate([1.0, torch.nan, 2.0, -torch.inf, torch.nan], start=1):
        watch.see([torch.tensor([value, 1.0]), torch.tensor(1.0)], iteration)
    watch.see([], 6)
    assert (watch.count(), watch.count(), watch.first) == (3, 0, 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_are_looked_at_however_training_ends(value: float) -> None:
    model = nn.Linear(3, 2)
    with no_silent_end([model]):
        pass
    with torch.no_grad():
        model.bias[1] = value
    with (
        pytest.raises(WeightsNotFinite, match="1 parameters have NaN or infinity, bias the first"),
        no_silent_end([model]),
    ):
        pass
    with pytest.raises(WeightsNotFinite), no_silent_end([model]):
        raise SystemExit(0)
    with pytest.raises(SystemExit), no_silent_end([model]):
        raise SystemExit(3)

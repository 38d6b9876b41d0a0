"""Stopping and resuming through the entry: bitwise the uninterrupted run; in another layout, bitwise the same state."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.training_server import Job, Result, Step, TrainingServer

pytestmark = pytest.mark.heavy

# The first loss in another layout: sums are rounded in another order. Measured: 4.8e-7 of 7.
LOSS_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Layout:
    variant: str
    ranks: int = 1
    flags: tuple[str, ...] = ()


PIPELINE = ("--pipeline-model-parallel-size", "2")
EXPERTS = ("--expert-model-parallel-size", "2")
LAYOUTS = {
    "one": Layout("tiny"),
    "one_moe": Layout("tiny_moe"),
    "bf16": Layout("tiny_moe", flags=("--bf16",)),
    "async": Layout("tiny", flags=("--async-save",)),
    "dp2": Layout("tiny", 2),
    "dp2_moe": Layout("tiny_moe", 2),
    "dp2_async": Layout("tiny", 2, ("--async-save",)),
    "cp2": Layout("tiny_moe", 2, ("--context-parallel-size", "2")),
    "tp2_sp": Layout("tiny_moe", 2, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
    "pp2": Layout("tiny_moe", 2, PIPELINE),
    # Tied embeddings have a bucket of their own.
    "pp2_tied": Layout("tiny", 2, PIPELINE),
    "vpp2_tied": Layout("tiny", 2, (*PIPELINE, "--num-virtual-stages-per-pipeline-rank", "2")),
    "ep2": Layout("tiny_moe", 2, EXPERTS),
    "grouped": Layout("tiny_moe", flags=("--moe-grouped-gemm",)),
    "grouped_ep2": Layout("tiny_moe", 2, (*EXPERTS, "--moe-grouped-gemm")),
}


@pytest.fixture(scope="module")
def server() -> Iterator[TrainingServer]:
    with TrainingServer.running() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


def train(server: TrainingServer, out: Path, layout: Layout, iterations: int, *flags: str) -> Result:
    schedule = ("--model-variant", layout.variant, "--train-iters", str(iterations))
    return server.train(out, *schedule, *layout.flags, *flags, ranks=layout.ranks)


def check_resuming(server: TrainingServer, folder: Path, name: str, iterations: int) -> None:
    """A run of `iterations` that saves halfway, and one that goes on from there, step by step on every rank."""
    layout, half = LAYOUTS[name], iterations // 2
    saved = folder / "checkpoints"
    whole = train(server, folder / "whole", layout, iterations, "--save", str(saved), "--save-interval", str(half))
    rest = train(server, folder / "rest", layout, iterations, "--load", str(saved), "--ckpt-step", str(half))
    for rank in range(layout.ranks):
        assert [step.iteration for step in rest.steps(rank)] == list(range(half + 1, iterations + 1))
        assert rest.steps(rank) == whole.steps(rank)[half:]
    samples = [sample for step in whole.steps() for sample in step.samples]
    assert len(set(samples)) == len(samples)  # so that equal samples mean equal positions


@pytest.mark.parametrize("name", ["async", "tp2_sp", "vpp2_tied"])
def test_resuming_is_exact(server: TrainingServer, tmp_path: Path, name: str) -> None:
    check_resuming(server, tmp_path, name, iterations=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_resuming_twenty_steps_is_exact(server: TrainingServer, tmp_path: Path, name: str) -> None:
    check_resuming(server, tmp_path, name, iterations=20)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, gathered: parameters, and the optimizer's masters and moments under their names."""
    reader = FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in stored.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def check_crossing(server: TrainingServer, folder: Path, source: str, target: str) -> None:
    """Load in another layout and save at once: nothing has changed. Then take the next steps."""
    saved_in = LAYOUTS[source]
    loaded_in = Layout(saved_in.variant, LAYOUTS[target].ranks, LAYOUTS[target].flags)
    saved, again = folder / "saved", folder / "again"
    whole = train(server, folder / "whole", saved_in, 4, "--save", str(saved), "--save-interval", "2")
    load = ("--load", str(saved), "--ckpt-step", "2")
    copy = ("--save", str(again), "--save-interval", "100", "--use-checkpoint-opt_param-scheduler")
    train(server, folder / "copy", loaded_in, 2, *load, *copy)
    before, after = tensors(saved / "iter_0000002"), tensors(again / "iter_0000002")
    assert before.keys() == after.keys()
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    for name in before:  # in float32 a master is its parameter
        if name.startswith("optimizer.state.param."):
            assert torch.equal(before[name], before[name.removeprefix("optimizer.state.param.")]), name
    rest = train(server, folder / "rest", loaded_in, 4, *load)
    expected, actual = last_stage(whole)[2:], last_stage(rest)
    losses = [
        (float.fromhex(a.losses["lm loss"]), float.fromhex(b.losses["lm loss"]))
        for a, b in zip(expected, actual, strict=True)
    ]
    print(f"{source} -> {target}: (uninterrupted, resumed) losses {losses}")
    assert losses[0][1] == pytest.approx(losses[0][0], rel=LOSS_TOLERANCE)


def last_stage(result: Result) -> list[Step]:
    """The steps of the rank that has losses."""
    return result.steps(result.job.ranks - 1)


@pytest.mark.parametrize(("source", "target"), [("one_moe", "grouped_ep2")])
def test_another_layout_starts_from_the_same_state(
    server: TrainingServer, tmp_path: Path, source: str, target: str
) -> None:
    check_crossing(server, tmp_path, source, target)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("one_moe", "ep2"),
        ("grouped", "ep2"),
        ("ep2", "one_moe"),
        ("vpp2_tied", "one"),
        ("ep2", "tp2_sp"),
        ("tp2_sp", "ep2"),
        ("tp2_sp", "pp2"),
        ("cp2", "one_moe"),
        ("pp2_tied", "dp2"),
        ("dp2", "vpp2_tied"),
        ("one", "pp2_tied"),
    ],
)
def test_layouts_exchange_checkpoints(server: TrainingServer, tmp_path: Path, source: str, target: str) -> None:
    check_crossing(server, tmp_path, source, target)


def rates(result: Result) -> list[str]:
    """The learning rates of the log's lines, of the last rank."""
    return re.findall(r"learning rate: (\S+)", result.log(result.job.ranks - 1))


OTHER_RATES = ("--lr", "5e-4", "--min-lr", "5e-5")
OVERRIDE = "--override-opt_param-scheduler"


@pytest.mark.parametrize(
    ("source", "target"),
    [("one_moe", "ep2"), *(pytest.param(n, n, marks=pytest.mark.slow) for n in ("ep2", "bf16", "tp2_sp", "vpp2_tied"))],
)
def test_another_learning_rate(server: TrainingServer, tmp_path: Path, source: str, target: str) -> None:
    """README's recipe: from the checkpoint on, the rates are those of a run that always had the new ones."""
    saved, layout = tmp_path / "checkpoints", LAYOUTS[target]
    train(server, tmp_path / "old", LAYOUTS[source], 4, "--save", str(saved), "--save-interval", "2")
    load = ("--load", str(saved), "--ckpt-step", "2")
    resumed = train(server, tmp_path / "new", layout, 4, *load, *OTHER_RATES, OVERRIDE)
    # Warm-up of 2, cosine over 40 from 5e-4 to 5e-5: of the iterations 3 and 4.
    expected = [5e-5 + (5e-4 - 5e-5) * (1 + math.cos(math.pi * n / 38)) / 2 for n in (1, 2)]
    assert [float(rate) for rate in rates(resumed)] == pytest.approx(expected, rel=1e-6)  # printed to 7 digits
    again = train(server, tmp_path / "kept", layout, 4, *load, *OTHER_RATES, "--use-checkpoint-opt_param-scheduler")
    old = [1e-4 + (1e-3 - 1e-4) * (1 + math.cos(math.pi * n / 38)) / 2 for n in (1, 2)]
    assert [float(rate) for rate in rates(again)] == pytest.approx(old, rel=1e-6)


@pytest.mark.parametrize("rate", [("--lr", "5e-4"), pytest.param(("--min-lr", "5e-5"), marks=pytest.mark.slow)])
def test_another_learning_rate_needs_a_switch(server: TrainingServer, tmp_path: Path, rate: tuple[str, str]) -> None:
    flags = ("--model-variant", "tiny", "--train-iters", "2", "--save", str(tmp_path / "checkpoints"))
    server.train(tmp_path / "old", *flags, "--exit-interval", "1")
    refused = server.run(Job(str(tmp_path / "new"), (*flags, "--load", str(tmp_path / "checkpoints"), *rate)))
    assert refused.codes == [1]
    assert "was made at other learning rates (max_lr 0.001, min_lr 0.0001)" in refused.log()
    assert "CKPT_OVERRIDE_SCHEDULER=1" in refused.log()


def test_every_line_of_the_log_has_its_own_loss(server: TrainingServer, tmp_path: Path) -> None:
    result = train(server, tmp_path, LAYOUTS["one"], 3)
    printed = [float(loss) for loss in re.findall(r"lm loss: (\S+)", result.log())]
    assert printed == pytest.approx([float.fromhex(step.losses["lm loss"]) for step in result.steps()], rel=1e-6)


def test_finetuning_starts_anew(server: TrainingServer, folder: Path) -> None:
    """Only the weights come from the checkpoint: the first step counts as the first and reads the first samples.

    A `--pretrained-checkpoint` is the same.
    """
    layout, saved = LAYOUTS["one"], folder / "finetune"
    first = train(server, folder / "first", layout, 2, "--save", str(saved), "--save-interval", "2")
    tuned = train(server, folder / "tuned", layout, 2, "--load", str(saved), "--finetune")
    assert [step.iteration for step in tuned.steps()] == [1, 2]
    assert [step.samples for step in tuned.steps()] == [step.samples for step in first.steps()]
    assert tuned.steps()[0].losses != first.steps()[0].losses
    pretrained = train(server, folder / "pretrained", layout, 2, "--pretrained-checkpoint", str(saved))
    assert pretrained.steps() == tuned.steps()


@pytest.mark.parametrize("flags", [(), pytest.param(("--async-save",), marks=pytest.mark.slow)])
def test_keeping_the_last(server: TrainingServer, tmp_path: Path, flags: tuple[str, ...]) -> None:
    saved = tmp_path / "checkpoints"
    keep = ("--save", str(saved), "--save-interval", "1", "--keep-last", "2", *flags)
    train(server, tmp_path / "run", LAYOUTS["one"], 4, *keep)
    assert sorted(path.name for path in saved.glob("iter_*")) == ["iter_0000003", "iter_0000004"]
    assert sorted(path.name for path in (saved / "data").iterdir()) == ["iter_0000003", "iter_0000004"]
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "4"

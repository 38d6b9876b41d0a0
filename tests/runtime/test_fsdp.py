"""Megatron-FSDP on CPU ranks, with the real model: from the meta device, and its checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.heavy

PROGRAM = Path(__file__).with_name("fsdp_runs.py")
MODEL = [
    *("--model-variant", "tiny_moe", "--dataset-provider", "mock", "--image-size", "64", "--image-seq-length", "4"),
    *("--use-packed-sequence", "--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "2"),
    *("--lr", "1e-3", "--train-iters", "3", "--num-workers", "0", "--eval-iters", "0", "--eval-interval", "1000"),
    *(
        "--distributed-timeout-minutes",
        "3",
        "--moe-router-enable-expert-bias",
        "--moe-router-score-function",
        "sigmoid",
    ),
]
FSDP = [
    "--use-megatron-fsdp",
    "--data-parallel-sharding-strategy",
    "optim_grads_params",
    "--ckpt-format",
    "fsdp_dtensor",
]
META = "--init-model-with-meta-device"
EP = ["--expert-model-parallel-size", "2"]
LONG = ["--train-iters", "4"]

type Run = dict[str, Any]


def run_jobs(folder: Path, jobs: dict[str, tuple[int, list[str]]]) -> dict[str, Run]:
    """What each job held; see fsdp_runs.py."""
    described = {name: {"ranks": ranks, "flags": [*MODEL, *flags]} for name, (ranks, flags) in jobs.items()}
    (folder / "jobs.json").write_text(json.dumps({"out": str(folder), "jobs": described}))
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
    command = [sys.executable, str(PROGRAM), str(folder / "jobs.json")]
    done = subprocess.run(
        command,
        env={**environment, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in jobs}


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert actual.keys() == expected.keys()
    return [name for name, value in actual.items() if not torch.equal(value, expected[name])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Run]:
    save = ["--save-interval", "1", "--save", str(folder / "saved")]
    load = ["--load", str(folder / "saved"), "--ckpt-step", "2"]
    return run_jobs(
        folder,
        {
            "one": (1, ["--bf16", "--train-iters", "1", "--no-moe-grouped-gemm"]),  # FSDP's experts are single
            "whole": (2, [*FSDP, META, "--bf16", *save]),
            "resumed": (2, [*FSDP, META, "--bf16", *load]),
        },
    )


class TestFromTheMetaDevice:
    def test_parameters_had_no_memory(self, runs: dict[str, Run]) -> None:
        assert runs["whole"]["meta"] and not runs["one"]["meta"]

    def test_initial_weights_follow_one_ranks_distributions(self, runs: dict[str, Run]) -> None:
        """Mean and deviation of each parameter, within six standard errors of two samples; constants are equal."""
        expected, actual = (runs[name]["states"][0] for name in ("one", "whole"))
        for name, built in expected.items():
            built, reset = built.double(), actual[name].double()
            deviation, count = built.std(correction=0), built.numel()
            if deviation == 0:
                assert torch.equal(built, reset), name
                continue
            # Kurtosis at most a normal distribution's: the deviation's standard error is at most this.
            error = 6 * deviation * count**-0.5
            assert (reset.mean() - built.mean()).abs() < error * 2**0.5, name
            assert (reset.std(correction=0) - deviation).abs() < error, name

    def test_no_two_parameters_are_copies(self, runs: dict[str, Run]) -> None:
        """Nor two halves of one: ranks that share a parameter hold different parts of one draw."""
        seen: dict[tuple[float, ...], str] = {}
        for name, value in runs["whole"]["states"][0].items():
            if "exp_avg" in name or value.numel() < 32 or value.std() == 0:
                continue
            for part, half in enumerate(value.flatten().chunk(2)):
                other = seen.setdefault(tuple(half[:8].tolist()), f"{name} {part}")
                assert other == f"{name} {part}"

    def test_marks_and_dtypes_survive(self, runs: dict[str, Run]) -> None:
        for kind in ("marks", "dtypes"):
            assert runs["whole"][kind] == runs["one"][kind]
        wide = {name for name, dtype in runs["whole"]["dtypes"].items() if dtype == torch.float32}
        assert {name.partition("self_attention.")[2] for name in wide} == {"A_log", "dt_bias", "out_norm.weight"}


class TestCheckpoints:
    def test_resuming_is_exact(self, runs: dict[str, Run]) -> None:
        """Weights, moments and steps after loading, and after the step from there.

        From the second checkpoint, since in the first one every parameter is at step 1, counted or not.
        """
        whole, resumed = (runs[name]["states"] for name in ("whole", "resumed"))
        assert [differences(*pair) for pair in zip(resumed, whole[2:], strict=True)] == [[], []]

    def test_a_step_changes_everything(self, runs: dict[str, Run]) -> None:
        """Else the test above would prove little."""
        first, second = runs["whole"]["states"][1:3]
        same = set(first) - set(differences(second, first))
        assert not [name for name in same if "exp_avg" in name]


@pytest.fixture(scope="module")
def across(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("across")

    def saving(name: str) -> list[str]:
        return ["--save-interval", "1", "--save", str(folder / name)]

    def loading(name: str, step: int) -> list[str]:
        return ["--load", str(folder / name), "--ckpt-step", str(step)]

    return run_jobs(
        folder,
        {
            "two": (2, [*FSDP, *LONG, *saving("two")]),
            "two_again": (2, [*FSDP, *LONG, *loading("two", 2)]),
            "slower": (2, [*FSDP, *LONG, *loading("two", 2), "--lr", "5e-4", "--override-opt_param-scheduler"]),
            "one_from_two": (1, [*FSDP, *LONG, *loading("two", 2), *saving("one")]),
            "two_from_one": (2, [*FSDP, *LONG, *loading("one", 3)]),
            "experts_from_two": (2, [*FSDP, *EP, *LONG, *loading("two", 2), *saving("experts")]),
            "experts_again": (2, [*FSDP, *EP, *LONG, *loading("experts", 3)]),
            "two_from_experts": (2, [*FSDP, *LONG, *loading("experts", 3)]),
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "source", "step"),
    [
        ("two_again", "two", 2),
        ("one_from_two", "two", 2),
        ("two_from_one", "one_from_two", 1),
        ("experts_from_two", "two", 2),
        ("experts_again", "experts_from_two", 1),
        ("two_from_experts", "experts_from_two", 1),
    ],
)
def test_what_is_loaded_is_what_was_saved(across: dict[str, Run], run: str, source: str, step: int) -> None:
    """Float32, between numbers of ranks and expert parallelism: weights, moments and steps, bit by bit."""
    assert differences(across[run]["states"][0], across[source]["states"][step]) == []


@pytest.mark.slow
@pytest.mark.parametrize(("run", "source", "step"), [("two_again", "two", 2), ("experts_again", "experts_from_two", 1)])
def test_the_same_layout_goes_on_exactly(across: dict[str, Run], run: str, source: str, step: int) -> None:
    pairs = zip(across[run]["states"], across[source]["states"][step:], strict=True)
    assert [names for pair in pairs if (names := differences(*pair))] == []


@pytest.mark.slow
def test_going_on_at_another_learning_rate(across: dict[str, Run]) -> None:
    """Half of it is exactly half in every step."""
    assert across["slower"]["rates"] == [rate / 2 for rate in across["two"]["rates"][2:]]
    assert differences(across["slower"]["states"][0], across["two"]["states"][2]) == []

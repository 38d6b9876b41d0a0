"""The real model through the entry, in bf16: what a run prints and leaves, and going on from there."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[1]
FLAGS = [
    *("--model-variant", "tiny_moe", "--dataset-provider", "mock", "--image-size", "64", "--image-seq-length", "4"),
    *("--use-packed-sequence", "--seq-length", "128", "--micro-batch-size", "2", "--global-batch-size", "4"),
    *("--bf16", "--lr", "1e-3", "--train-iters", "4", "--use-distributed-optimizer", "--num-workers", "0"),
    *("--eval-interval", "4", "--eval-iters", "1", "--log-interval", "1", "--save-interval", "2"),
    *("--log-time-split", "2"),
]
PROFILE = ("--profile", "--use-pytorch-profiler", "--profile-step-start", "2", "--profile-step-end", "3")


def train(folder: Path, *flags: str) -> str:
    """Run it in a process of its own; returns what it printed."""
    output = ["--save", str(folder / "checkpoints"), "--tensorboard-dir", str(folder / "tensorboard")]
    command = [sys.executable, str(ROOT / "pretrain_multimodal.py"), *FLAGS, *output, *flags]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def figures(log: str, iteration: int) -> dict[str, float]:
    """What the progress line of an iteration says."""
    line = next(line for line in log.splitlines() if re.search(rf"iteration +{iteration}/", line))
    return {name.strip(): float(value) for name, value in re.findall(r"\| ([^|:]+): +([-+.0-9E]+) ", line)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("train")
    return folder, train(folder, *PROFILE)


def test_progress_line_and_losses(run: tuple[Path, str]) -> None:
    _, log = run
    first, last = figures(log, 1), figures(log, 4)
    assert first["lm loss"] == pytest.approx(6.93, abs=0.2)  # the logarithm of 1024 ids, before anything is learnt
    assert last["lm loss"] < first["lm loss"]
    assert last["grad norm"] > 0
    assert last["mtp_1 loss"] > 0 and last["load_balancing_loss"] > 0
    assert min(last["tokens/s"], last["images/s"], last["TFLOP/s/GPU"]) > 0
    assert last["padding share"] == 0  # packed documents on one rank need none
    assert re.search(r"validation loss at iteration 4 .*lm loss value", log)


def test_what_a_run_leaves(run: tuple[Path, str]) -> None:
    folder, _ = run
    checkpoints = folder / "checkpoints"
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "4"
    resolved = json.loads((checkpoints / "arguments.json").read_text())
    assert resolved["arguments"]["padded_vocab_size"] == 1024 and resolved["versions"]["megatron-core"]
    config = json.loads((checkpoints / "hf/config.json").read_text())
    assert config["model_type"] == "qwen3_5_moe" and config["text_config"]["num_experts"] == 4
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_where_the_time_goes(run: tuple[Path, str]) -> None:
    """A line and TensorBoard's scalars every second iteration, whose parts add up to the step; names in a trace."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, log = run
    lines = re.findall(r"> iteration (\d+): the step's ([\d.]+) ms: (.*); host waiting [\d.]+$", log, re.MULTILINE)
    assert [int(iteration) for iteration, _, _ in lines] == [2, 4]
    parts = ["data wait", "ViT", "decoder", "loss", "optimizer", "communication", "other"]
    for _, whole, listed in lines:
        spent = {name: float(value) for name, value in re.findall(r"([\w ]+?) ([\d.]+)(?:, |$)", listed)}
        assert list(spent) == parts and min(spent["ViT"], spent["decoder"], spent["optimizer"]) > 0
        assert sum(spent.values()) == pytest.approx(float(whole), abs=0.5)  # of rounding
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for name in (*parts, "host waiting"):
        assert [event.step for event in events.Scalars(f"time split/{name}")] == [2, 4]
    with gzip.open(folder / "torch_profile/rank-0.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"ViT", "PackedGatedDeltaNet", "output layer and loss"} <= names


def test_wide_parameters_are_float32_in_the_checkpoint(run: tuple[Path, str]) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    saved = FileSystemReader(run[0] / "checkpoints/iter_0000004").read_metadata().state_dict_metadata
    layer = "language_model.decoder.layers.0.self_attention."
    names = ("A_log", "dt_bias", "out_norm.weight", "out_proj.weight")
    wide = {name: saved[layer + name].properties.dtype == torch.float32 for name in names}
    assert wide == {"A_log": True, "dt_bias": True, "out_norm.weight": True, "out_proj.weight": False}


def test_going_on_repeats_the_uninterrupted_run(run: tuple[Path, str], tmp_path: Path) -> None:
    folder, log = run
    resumed = train(tmp_path, "--load", str(folder / "checkpoints"), "--ckpt-step", "2")
    names = ("lm loss", "mtp_1 loss", "load_balancing_loss", "grad norm")
    expected, actual = figures(log, 3), figures(resumed, 3)
    assert [actual[name] for name in names] == [expected[name] for name in names]


@pytest.mark.parametrize(("packed", "stages", "expected"), [(True, 2, True), (True, 1, False), (False, 2, False)])
def test_pipeline_stages_agree_on_packed_lengths(packed: bool, stages: int, expected: bool) -> None:
    """Otherwise Megatron sends rows of --seq-length, and a packed row is shorter."""
    from pretrain_multimodal import model_provider

    spec = Namespace(
        check_kernels=lambda args, config: None,
        build_model=lambda args, config, language_config, **stage: language_config,
    )
    args = Namespace(use_packed_sequence=packed, pipeline_model_parallel_size=stages, init_model_with_meta_device=False)
    args.freeze = args.lora_rank = None
    args.transformer_impl = "local"
    model = model_provider(spec, None, args, config=Namespace(), pg_collection="groups")
    assert model.variable_seq_lengths is expected

"""A seeded sample of command lines over layouts: what the preflight accepts, Megatron's own validation accepts too."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from random import Random

import pytest

import arguments
from arguments import Refused, preflight
from runtime.flag_table import Effect, flag_table
from runtime.megatron_flags import megatron_flags
from tests.command_lines import LAPTOP, accepted
from tests.test_flag_table import values_of

# Folders are this machine's.
FOLDERS = ("load", "save", "pretrained_checkpoint", "tensorboard_dir")
USABLE = [
    flag
    for flag in megatron_flags()
    if flag_table()[flag.names[0]].effect in (Effect.UNTESTED, Effect.WORKS) and flag.dest not in FOLDERS
]


class Line:
    """A command line in the making: most of its values fit together, some don't.

    words: so far. ranks: of the job.
    """

    def __init__(self, random: Random, folder: Path) -> None:
        self._random = random
        self._folder = folder
        self._odd = random.random() < 0.3
        self.words: list[str] = []
        self.variant = random.choice(["tiny", "tiny_moe", "tiny_moe", "tiny_moe", "proxy", "9b", "397b_a17b"])
        self.tp = random.choice([1, 1, 2] if self.variant.startswith("tiny") else [1, 1, 2, 4])
        self.pp, self.cp, self.dp = random.choice([1, 1, 1, 2, 4]), random.choice([1, 1, 1, 2]), random.choice([1, 2])
        self.ranks = self.tp * self.pp * self.cp * self.dp
        self._layout()
        self._experts()
        self._sharding()
        self._schedule()
        self._recomputation()
        for flag in random.sample(USABLE, random.choice([0, 0, 1, 2])):
            self.words += [flag.names[0], *random.choice(values_of(flag))]

    def _add(self, flag: str, fits: Sequence[object] = (), doesnt: Sequence[object] = (), share: float = 1.0) -> bool:
        """Give a flag in a share of the lines, with a value that fits or, in odd lines and rarely, one that may not."""
        if self._random.random() >= share:
            return False
        strange = bool(doesnt) and self._odd and self._random.random() < 0.15
        values = doesnt if strange else fits
        self.words += [flag, *([str(self._random.choice(values))] if values else [])]
        return True

    def _layout(self) -> None:
        self._add("--model-variant", [self.variant])
        self._add("--tensor-model-parallel-size", [self.tp], [3, 0, -1, 8])
        self._add("--sequence-parallel", share=0.95 if self.tp > 1 else 0.2)
        self._add("--context-parallel-size", [self.cp], [3, 0, -2, 8])
        self._add("--pipeline-model-parallel-size", [self.pp], [3, 0, 8])
        if self.pp > 1:
            self._add("--num-virtual-stages-per-pipeline-rank", [1, 2], [4, 0], 0.3)
            self._add("--decoder-first-pipeline-num-layers", [1, 2], [0, 9], 0.05)
            self._add("--num-layers-per-virtual-pipeline-stage", [1, 2], [0], 0.05)
        self._add("--num-layers", [4, 8], [2, 0, 3], 0.1)
        self._add("--mtp-num-layers", [0, 1], [2, -1], 0.2)

    def _experts(self) -> None:
        if self.variant == "9b" or (self.variant == "tiny" and not self._odd):
            return
        self._add("--expert-model-parallel-size", [1, 2], [4, 3, 0], 0.5)
        self._add("--expert-tensor-parallel-size", [1, self.tp], [2, 0, -1], 0.3)
        self._add("--num-experts", [8], [0, 4, 6, -1], 0.1)
        self._add("--moe-router-topk", [2], [1, 9, 0], 0.1)
        self._add("--moe-token-dispatcher-type", ["alltoall"], ["allgather", "flex"], 0.2)
        self._add("--moe-grouped-gemm", share=0.1)

    def _sharding(self) -> None:
        if self.pp == 1 and self._add("--use-megatron-fsdp", share=0.2):
            self._add("--ckpt-format", ["fsdp_dtensor"], ["torch_dist"])
            kinds = ["no_shard", "optim", "optim_grads"]
            self._add("--data-parallel-sharding-strategy", ["optim_grads_params"], kinds, 0.5)
            self._add("--init-model-with-meta-device", share=0.3)
            return
        self._add("--ckpt-format", ["torch_dist"], ["torch", "torch_dcp", "fsdp_dtensor"], 0.1)
        if self._add("--use-distributed-optimizer", share=0.6) and self._add("--overlap-grad-reduce", share=0.2):
            self._add("--overlap-param-gather", share=0.5)
        self._add("--optimizer", ["adam", "sgd"], share=0.1)

    def _schedule(self) -> None:
        self._add("--bf16", share=0.6) or self._add("--fp16", share=0.1)
        self._add("--use-packed-sequence", share=0.7)
        self._add("--seq-length", [64, 128, 256, 4096], [100, 1, 0, 63])
        self._add("--micro-batch-size", [1, 2], [0, -1, 3])
        self._add("--global-batch-size", [2 * self.dp * n for n in (1, 2, 4)], [0, 7, -4], 0.8)
        self._add("--train-iters", [4, 100], [1, 0])
        self._add("--lr", ["1e-3", "1e-4"], ["0", "5e-7", "-1"])
        self._add("--min-lr", ["0", "1e-5"], ["1", "-1"], 0.2)
        self._add("--lr-decay-style", ["constant", "linear", "cosine", "inverse-square-root"], ["WSD"], 0.3)
        self._add("--lr-warmup-iters", [0, 1], [10], 0.2)
        self._add("--lr-decay-iters", [50], [1, 0], 0.2)
        self._add("--eval-iters", [0, 1], [-1], 0.2)
        self._add("--eval-interval", [1, 100], [0], 0.2)
        self._add("--num-workers", [0, 2], [-1], 0.1)
        if self._add("--save", [self._folder], share=0.4):
            self._add("--save-interval", [2, 10], [0], 0.5)
            self._add("--save-retain-interval", [20], [3, 0], 0.2)
            self._add("--async-save", share=0.2)
        self._add("--max-patches-per-pack", [64, 4096], [0, -1], 0.05)
        self._add("--attention-backend", ["auto", "flash", "fused", "unfused"], ["local"], 0.1)
        self._add("--freeze", ["vision", "language", "projector"], ["x", "("], 0.1) or self._add(
            "--lora-rank", [1, 8], [0, -1], 0.1
        )
        self._add("--lr-mult", ["vision=0.1"], ["vision", "vision=x", "vision=-1"], 0.1)

    def _recomputation(self) -> None:
        self._add("--recompute-vision", share=0.1)
        kind = self._random.choice(["none", "none", "full", "selective"])
        if kind == "full":
            self._add("--recompute-granularity", ["full"])
            self._add("--recompute-method", ["uniform", "block"], share=0.9)
            self._add("--recompute-num-layers", [1, 2], [0, 99, -1], 0.9)
        elif kind == "selective":
            self._add("--recompute-granularity", ["selective"])
            parts = ["core_attn", "moe", "mlp", "layernorm", "shared_experts", "moe_act"]
            self._add("--recompute-modules", parts, ["mla_up_proj", "x"], 0.5)
            self._add("--recompute-method", ["block"], share=0.05)


@pytest.mark.parametrize(
    ("seed", "count"), [pytest.param(0, 250, id="250"), pytest.param(1, 1000, id="1000", marks=pytest.mark.slow)]
)
def test_what_the_preflight_accepts_megatron_accepts(
    seed: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime import prepare

    prepare()
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    random = Random(seed)
    raw, accepted = [], 0
    for _ in range(count):
        line = Line(random, tmp_path)
        if "--use-megatron-fsdp" in line.words:
            monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
        else:
            monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        monkeypatch.setenv("WORLD_SIZE", str(line.ranks))
        try:
            command_line = preflight(line.words, LAPTOP, line.ranks)
        except Refused:
            continue
        accepted += 1
        try:
            with redirect_stdout(io.StringIO()):
                pretrain_cfg_container_from_args(arguments.resolve(command_line))
        except (Exception, SystemExit) as error:
            raw.append(f"{line.ranks} ranks: {' '.join(line.words)}\n    {type(error).__name__}: {error}")
    if raw:
        pytest.fail("\n".join(raw), pytrace=False)
    assert accepted > count / 4  # so that it isn't all refused


def test_what_megatron_alone_refuses_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from runtime import flag_values, prepare

    prepare()
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(flag_values, "recomputation_refusals", lambda args: [])  # as if nobody had thought of it
    command_line = accepted("--recompute-granularity", "full", "--recompute-method", "uniform")
    with pytest.raises(SystemExit) as left:
        arguments.parse(command_line)
    assert left.value.code == 2
    assert "Refused:\n  - Megatron's validation (transformer_config.py:" in capsys.readouterr().err

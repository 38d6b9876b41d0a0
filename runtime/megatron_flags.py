"""Megatron's flags without importing Megatron, whose import takes seconds."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# What the preflight and the architectures read, with Megatron's own defaults (tests compare them with its parser).
NUMBERS: dict[str, int | None] = {
    "--num-layers": None,
    "--hidden-size": None,
    "--ffn-hidden-size": None,
    "--num-attention-heads": None,
    "--num-query-groups": 1,
    "--kv-channels": None,
    "--max-position-embeddings": None,
    "--padded-vocab-size": None,
    "--linear-conv-kernel-dim": 4,
    "--linear-key-head-dim": 128,
    "--linear-value-head-dim": 128,
    "--linear-num-key-heads": 16,
    "--linear-num-value-heads": 32,
    "--rotary-base": 10000,
    "--mtp-num-layers": None,
    "--num-experts": None,
    "--moe-router-topk": 2,
    "--moe-ffn-hidden-size": None,
    "--moe-shared-expert-intermediate-size": None,
    "--tensor-model-parallel-size": 1,
    "--pipeline-model-parallel-size": 1,
    "--context-parallel-size": 1,
    "--expert-model-parallel-size": 1,
    "--expert-tensor-parallel-size": None,
    "--decoder-first-pipeline-num-layers": None,
    "--decoder-last-pipeline-num-layers": None,
    "--num-layers-per-virtual-pipeline-stage": None,
    "--num-virtual-stages-per-pipeline-rank": None,
    "--micro-batch-size": None,
    "--global-batch-size": None,
    "--seq-length": None,
    "--ckpt-step": None,
    "--save-retain-interval": None,
}
_SWITCHES = (
    "--group-query-attention",
    "--untie-embeddings-and-output-weights",
    "--sequence-parallel",
    "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split",
    "--use-megatron-fsdp",
    "--init-model-with-meta-device",
    "--exit-on-missing-checkpoint",
    "--async-save",
    "--finetune",
)
_TEXTS: dict[str, str | None] = {
    "--linear-attention-freq": None,
    "--pipeline-model-parallel-layout": None,
    "--ckpt-format": "torch_dist",
    "--load": None,
    "--pretrained-checkpoint": None,
    "--save": None,
    "--tensorboard-dir": None,
    "--wandb-project": None,
}

REQUIRED = ("--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length", "--micro-batch-size")
MAY_BE_ZERO = ("--num-experts", "--mtp-num-layers")

# Files of the megatron package that define flags: literally, or as the fields of a configuration.
_SOURCES = (
    "training/arguments.py",
    "training/config/*.py",
    "core/fault_injector.py",
    "core/model_parallel_config.py",
    "core/transformer/transformer_config.py",
)


def add_megatron_flags(parser: ArgumentParser) -> None:
    """Give a light parser the flags of Megatron's that the checks read, under Megatron's names.

    `cp_comm_type` and `transformer_impl` are None when not given: `arguments.machine_flags` chooses.
    """
    for flag, default in NUMBERS.items():
        parser.add_argument(flag, type=int, default=default)
    for flag in _SWITCHES:
        parser.add_argument(flag, action="store_true")
    for flag, text in _TEXTS.items():
        parser.add_argument(flag, default=text)
    parser.add_argument("--rotary-percent", type=float, default=1.0)
    parser.add_argument("--init-method-std", type=float, default=0.02)
    parser.add_argument("--norm-epsilon", dest="layernorm_epsilon", type=float, default=1e-5)
    parser.add_argument("--mrope-section", type=int, nargs="+", default=None)
    parser.add_argument("--cp-comm-type", nargs="+", default=None)
    parser.add_argument("--recompute-modules", nargs="+", default=None)
    parser.add_argument("--transformer-impl", default=None)


@cache
def known_flags() -> frozenset[str]:
    """Every flag of the installed Megatron, read from its sources; a few too many, none missing."""
    package = find_spec("megatron")  # a namespace: finding a module inside would import it
    folders = [] if package is None else map(Path, package.submodule_search_locations or [])
    root = next((folder for folder in folders if (folder / "training/arguments.py").is_file()), None)
    if root is None:
        raise ModuleNotFoundError("megatron-core isn't installed; scripts/env.sh makes an environment that has it")
    flags: set[str] = {"-h", "--help"}
    for path in (path for pattern in _SOURCES for path in root.glob(pattern)):
        text = path.read_text()
        for name in re.findall(r"""["']--([a-z][\w-]*)["']""", text):
            flags |= {f"--{name}", f"--no-{name}"}  # the second is argparse's BooleanOptionalAction
        for field, is_on in re.findall(r"^    ([a-z]\w*) *:(.*True)?", text, flags=re.MULTILINE):
            name = field.replace("_", "-")
            flags |= {f"--no-{name}", f"--disable-{name}"} if is_on else {f"--{name}"}
    return frozenset(flags)

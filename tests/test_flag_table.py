"""Every Megatron flag is classified, docs/flags.md says how, and what the preflight accepts Megatron accepts too."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

import arguments
from arguments import Refused, preflight
from models import MODEL_REGISTRY
from runtime.flag_table import DOCUMENT, Effect, flag_table, given_flags, markdown, named_flags
from runtime.megatron_flags import Flag, megatron_flags
from tests.command_lines import LAPTOP

BASE = [
    "--micro-batch-size",
    "1",
    "--seq-length",
    "256",
    "--train-iters",
    "4",
    "--lr",
    "1e-3",
    "--model-variant",
    "tiny_moe",
]
PAIRS = 150


def refused(*flags: str) -> str:
    with pytest.raises(Refused) as refusal:
        preflight([*BASE, *flags], LAPTOP, 1)
    return str(refusal.value)


def test_the_table_has_megatron_s_flags_and_each_once() -> None:
    assert [flag for flag, count in Counter(named_flags()).items() if count > 1] == []
    assert set(named_flags()) <= set(flag_table())
    assert list(flag_table()) == [flag.names[0] for flag in megatron_flags()]


def test_the_document_is_the_table_s() -> None:
    """`python scripts/list_flags.py --rewrite` makes it so."""
    assert DOCUMENT.read_text() == markdown()


ROOT = DOCUMENT.parents[1]
# What trains, besides tests: the launcher, benchmarks and proofs, and the flags that every run gets.
PROGRAMS = ("arguments.py", "proofs/*.py", "scripts/benchmark_train.py", "scripts/check_*.py", "tests/*_losses.py")
# How a test trains, or looks at the data as training does.
TRAINING = re.compile(
    r"train_jobs|training_server|tiny_pretrain|fsdp_runs|state_runs|build_model|inspect_data|arguments\.resolve\("
)
ONLY_LOOKED_AT = {
    *("test_arguments.py", "test_command_lines.py", "test_flag_table.py", "test_hf_arguments.py", "test_launcher.py"),
    *("test_preflight.py", "test_readme.py", "test_rooms.py"),
}


def words_of(file: Path) -> Iterator[str]:
    """The words of a Python file's texts, but not of docstrings and errors, nor the names of its own options."""
    tree = ast.parse(file.read_text())
    spoken = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    spoken |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.Raise) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            spoken |= {id(argument) for argument in node.args}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spoken:
            yield from node.value.split()


def flags_trained_with() -> set[str]:
    files = [file for pattern in PROGRAMS for file in ROOT.glob(pattern)]
    tests = [file for file in (ROOT / "tests").rglob("*.py") if file.name not in ONLY_LOOKED_AT]
    files += [file for file in tests if TRAINING.search(file.read_text())]
    words = {word for file in files for word in words_of(file)}
    words |= {word for spec in MODEL_REGISTRY.values() for model in spec.variants.values() for word in model.to_flags()}
    launcher = re.sub(r"#.*", "", (ROOT / "scripts/run_qwen35_vl.sh").read_text())
    words |= set(re.findall(r"--[a-z][\w-]*", launcher))
    return set(given_flags(words))


def test_flags_that_work_are_trained_with() -> None:
    table, trained_with = flag_table(), flags_trained_with()
    assert [flag for flag in table if table[flag].effect is Effect.WORKS and flag not in trained_with] == []


def test_flags_that_do_nothing_are_refused_unless_harmless() -> None:
    for flag in megatron_flags():
        entry = flag_table()[flag.names[0]]
        if entry.effect in (Effect.REFUSED, Effect.NONE) and entry.reason:
            for values in values_of(flag)[:1]:
                for name in flag.names:
                    # The other spelling of a flag with a --no- form too.
                    assert f"{flag.names[0]}: " in refused(name, *values)
    assert preflight([*BASE, "--use-mcore-models", "--use-flash-attn"], LAPTOP, 1).notices == []


def test_flags_that_our_code_reads_are_not_said_to_do_nothing() -> None:
    files = [path for room in ("data", "models", "runtime", "weights") for path in (ROOT / room).rglob("*.py")]
    read = set(re.findall(r"\bargs\.(\w+)", "".join(path.read_text() for path in [*files, ROOT / "arguments.py"])))
    idle = [flag for flag in megatron_flags() if flag_table()[flag.names[0]].reason]
    assert [flag.names[0] for flag in idle if flag.dest in read] == []


def test_one_notice_names_all_untested_flags() -> None:
    (notice,) = preflight([*BASE, "--log-throughput", "--te-rng-tracker", "--bf16"], LAPTOP, 1).notices
    assert notice.startswith("--log-throughput, --te-rng-tracker: not tested here")


VALUES = {
    "--lr inf": "--lr inf: give a finite number",
    "--lr nan": "--lr nan: give a finite number",
    "--lr 5e-7 --min-lr 1e-6": "--min-lr 1e-06: above --lr 5e-07",
    "--lr-warmup-init 2e-3": "--lr-warmup-init 0.002: above --lr 0.001",
    "--weight-decay-incr-style linear --start-weight-decay 0.2 --end-weight-decay 0.1": "--end-weight-decay 0.1: below",
    "--save-params-interval 0": "--save-params-interval 0: has to be at least 1",
    "--lr-decay-style WSD --lr-wsd-decay-iters 9": "--lr-wsd-decay-iters 9: above --train-iters 4",
    "--profile --profile-step-start 3 --profile-step-end 3": "--profile-step-end 3: not above --profile-step-start 3",
    "--experimental-attention-variant dsa": "--experimental-attention-variant dsa: gated_delta_net is built here",
    "--save-interval 0 --save-retain-interval 4 --save /tmp": "--save-interval 0: has to be at least 1",
    "--log-interval 0 --log-memory-interval 4": "--log-interval 0: has to be at least 1",
    "--eval-interval 0": "--eval-interval 0: has to be at least 1",
    "--save-interval 0": "--save-interval 0: has to be at least 1",
    "--train-iters -1": "--train-iters -1: has to be at least 1",
    "--lr-warmup-iters 4": "--lr-warmup-iters 4: has to be below --train-iters 4",
    "--lr-warmup-iters 3 --lr-decay-iters 2": "has to be below --lr-decay-iters 2",
    "--num-attention-heads 3": "--num-attention-heads 3: not a multiple of --num-query-groups 2",
    "--seed -1": "--seed -1: has to be at least 1",
    "--weight-decay -1": "--weight-decay -1.0: has to be at least 0",
    "--max-shard-size inf": "--max-shard-size 'inf' isn't a size",
    "--optimizer sgd --use-distributed-optimizer": "--optimizer sgd: --use-distributed-optimizer",
    "--optimizer muon": "--optimizer muon: not built",
    "--train-samples 8": "use --train-iters",
    "--lr-warmup-fraction 0.1": "use --lr-warmup-iters",
    "--moe-token-dispatcher-type flex": "--moe-token-dispatcher-type flex",
    "--moe-router-load-balancing-type global_aux_loss": "use aux_loss",
    "--moe-router-load-balancing-type seq_aux_loss --use-packed-sequence": "a pack would count as one sequence",
    "--recompute-granularity full": "needs --recompute-num-layers, 1 for the least memory",
    "--recompute-granularity full --recompute-num-layers 1": "needs --recompute-method uniform or block",
    "--recompute-method block": "of --recompute-granularity full; give both or neither",
    "--recompute-granularity selective --recompute-modules mla_up_proj": "no such part of a layer here",
    "--recompute-granularity selective --recompute-modules moe_act": "needs --moe-grouped-gemm",
    "--moe-router-topk 1": "use at least 2",
    "--attention-backend local": "use auto",
    "--use-precision-aware-optimizer --use-distributed-optimizer": "FusedAdam, isn't installed",
    "--moe-grouped-gemm --no-moe-grouped-gemm": "give one",
    "--num-experts 0 --no-moe-grouped-gemm": "the model is dense",
    "--fp8-format e4m3": "--fp8-format: needs --transformer-impl transformer_engine",
    "--overlap-param-gather": "--overlap-param-gather: needs --use-distributed-optimizer or --use-megatron-fsdp",
    "--lr high": "--lr: invalid float value: 'high'",
    "--optimizer best": "--optimizer: invalid choice: 'best'",
    "--lr 1e-3 1e-4": "unrecognized arguments: 1e-4",
}


@pytest.mark.parametrize("flags", VALUES)
def test_values_that_cannot_be_trained_with(flags: str) -> None:
    assert VALUES[flags] in refused(*flags.split())


def values_of(flag: Flag) -> list[list[str]]:
    """What to give a flag: a value or two of its type."""
    if flag.action != "store":
        return [[]]
    values = [str(choice) for choice in flag.choices or ()] or {"int": ["1", "2"], "float": ["0.5"]}.get(
        flag.type or "", ["x"]
    )
    return [[value] * (flag.nargs if isinstance(flag.nargs, int) else 1) for value in values]


def command_lines() -> list[list[str]]:
    """Pairs of flags that the preflight doesn't refuse by name, with seeded values."""
    random = Random(0)
    usable = [f for f in megatron_flags() if flag_table()[f.names[0]].effect in (Effect.UNTESTED, Effect.WORKS)]
    # Folders and the number of ranks are this machine's.
    usable = [flag for flag in usable if flag.dest not in ("load", "save", "pretrained_checkpoint", "tensorboard_dir")]
    pairs = [random.sample(usable, 2) for _ in range(PAIRS)]
    return [[word for flag in pair for word in (flag.names[0], *random.choice(values_of(flag)))] for pair in pairs]


def singles() -> list[list[str]]:
    usable = [flag for flag in megatron_flags() if flag_table()[flag.names[0]].effect is Effect.UNTESTED]
    return [[flag.names[0], *values] for flag in usable for values in values_of(flag)]


@pytest.mark.parametrize(
    "lines", [command_lines, pytest.param(singles, marks=pytest.mark.slow)], ids=["pairs", "every flag by itself"]
)
def test_what_the_preflight_accepts_megatron_s_validation_accepts(lines, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime import prepare

    prepare()
    from megatron.training.argument_utils import core_transformer_config_from_args, pretrain_cfg_container_from_args

    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    raw, accepted = {}, 0
    for flags in lines():
        try:
            command_line = preflight([*BASE, *flags], LAPTOP, 1)
        except Refused:
            continue
        accepted += 1
        try:
            args = arguments.resolve(command_line)
            core_transformer_config_from_args(args)
            pretrain_cfg_container_from_args(args)
        except (Exception, SystemExit) as error:
            raw[" ".join(flags)] = f"{type(error).__name__}: {error}"
    assert "\n".join(f"{flags}: {error}" for flags, error in raw.items()) == ""
    assert accepted > PAIRS / 3  # so that it isn't all refused

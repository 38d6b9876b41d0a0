"""The command line as Megatron's own parser resolves it: expansion, precedence, agreement with the preflight."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

import pytest

import arguments
from models.qwen35_vl.configuration import VARIANTS
from runtime.machine import detect
from runtime.megatron_flags import add_megatron_flags, describe, megatron_flags

ROOT = Path(__file__).parents[1]
BASE = ["--micro-batch-size", "1", "--seq-length", "256", "--train-iters", "2", "--lr", "1e-3", "--allow-slow-kernels"]
SP = ("--sequence-parallel", "--expert-tensor-parallel-size", "1")


@pytest.fixture(autouse=True)
def one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's wish for TP and CP
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture(scope="module")
def megatron_parser() -> ArgumentParser:
    from runtime import prepare

    prepare()
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(ArgumentParser(allow_abbrev=False))


def resolve(*flags: str) -> Namespace:
    return arguments.resolve(arguments.preflight_or_exit([*BASE, *flags], with_weights=True))


def test_importing_arguments_is_light() -> None:
    code = "import sys, arguments; print({'torch', 'megatron', 'transformers'} & set(sys.modules) or 'light')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "light"


def test_the_list_of_flags_is_megatron_s(megatron_parser: ArgumentParser) -> None:
    """`python scripts/list_flags.py --rewrite` makes it so."""
    assert megatron_flags() == tuple(describe(megatron_parser))


def test_light_parser_reads_what_megatron_reads(megatron_parser: ArgumentParser) -> None:
    """Names, destinations, kinds and defaults of argparse's own actions."""
    light = ArgumentParser(add_help=False)
    add_megatron_flags(light)
    assert describe(light) == describe(megatron_parser)


def test_our_flags_are_not_megatrons(megatron_parser: ArgumentParser) -> None:
    ours = ArgumentParser(add_help=False)
    arguments.add_multimodal_args(ours)
    assert not set(ours._option_string_actions) & set(megatron_parser._option_string_actions)
    assert all(action.help for action in ours._actions)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_arrives_whole(variant: str) -> None:
    from megatron.training.argument_utils import core_transformer_config_from_args

    args = resolve("--model-variant", variant)
    assert VARIANTS[variant].with_flags(args) == VARIANTS[variant]
    config = core_transformer_config_from_args(args)
    assert config.num_moe_experts == VARIANTS[variant].num_experts
    assert config.experimental_attention_variant == "gated_delta_net"
    assert config.layernorm_zero_centered_gamma and config.qk_layernorm and config.attention_output_gate
    assert (config.mtp_num_layers, config.mtp_loss_scaling_factor) == (1, 0.1)


@pytest.mark.parametrize("variant", ["0.8b", "397b_a17b", "tiny_moe"])
def test_hf_folder_gives_the_same_flags(variant: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(VARIANTS[variant].to_hf()))
    flags = [*BASE, "--hf-config", str(tmp_path), "--vision-num-layers", "3"]
    command_line = arguments.preflight_or_exit(flags)
    expected = VARIANTS[variant].replace(vision=replace(VARIANTS[variant].vision, num_layers=3))
    assert command_line.config == expected
    assert VARIANTS[variant].with_flags(arguments.resolve(command_line)) == expected


def test_explicit_flags_win() -> None:
    explicit = {
        "num_layers": 8,
        "num_attention_heads": 8,
        "rotary_base": 5,
        "vision_num_layers": 1,
        "image_token_id": 7,
        "padded_vocab_size": 2048,
    }
    flags = [text for name, value in explicit.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    config = VARIANTS["tiny"].with_flags(resolve("--model-variant", "tiny", *flags))
    assert (config.num_layers, config.num_attention_heads, config.rotary_base) == (8, 8, 5)
    assert (config.vision.num_layers, config.token_ids.image, config.vocab_size) == (1, 7, 2048)
    assert config.hidden_size == VARIANTS["tiny"].hidden_size


def test_an_evaluation_interval_is_always_there() -> None:
    """Without one Megatron divides the iterations by None, whatever --eval-iters says."""
    assert resolve("--eval-iters", "0").eval_interval == 1000
    assert resolve("--eval-interval", "7").eval_interval == 7


def test_no_experts_makes_a_variant_dense() -> None:
    from megatron.training.argument_utils import core_transformer_config_from_args

    args = resolve("--model-variant", "35b_a3b", "--num-experts", "0")
    dense = VARIANTS["35b_a3b"].dense_ffn_hidden_size
    assert VARIANTS["35b_a3b"].with_flags(args) == VARIANTS["35b_a3b"].replace(
        num_experts=None,
        ffn_hidden_size=dense,
        moe_router_topk=None,
        moe_ffn_hidden_size=None,
        moe_shared_expert_intermediate_size=None,
    )
    config = core_transformer_config_from_args(args)
    assert (config.num_moe_experts, config.ffn_hidden_size) == (None, 9 * 512)
    assert config.moe_shared_expert_intermediate_size is None


def test_no_mtp() -> None:
    args = resolve("--model-variant", "tiny", "--mtp-num-layers", "0")
    assert args.mtp_num_layers is None  # 0 would lose the decoder's final norm in megatron-core
    assert VARIANTS["tiny"].with_flags(args).mtp_num_layers == 0


@pytest.mark.parametrize(("variant", "ranks"), [("9b", 1), ("9b", 8), ("397b_a17b", 8), ("tiny", 4)])
def test_vocabulary_is_the_architectures_at_every_tp(variant: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    args = resolve("--model-variant", variant, "--tensor-model-parallel-size", str(ranks), *SP)
    build_tokenizer(args)  # Megatron pads here, to a multiple of 128 * TP of the tokenizer's size
    assert args.padded_vocab_size == VARIANTS[variant].vocab_size
    assert args.tensor_model_parallel_size == ranks


LAYOUTS = {
    "TP and CP": ("tiny", 4, ["--tensor-model-parallel-size", "2", *SP, "--context-parallel-size", "2"]),
    "VPP": ("tiny", 2, ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]),
    "uneven PP": ("tiny", 2, ["--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "1"]),
    "EP": ("tiny_moe", 2, ["--expert-model-parallel-size", "2"]),
    "packed": ("tiny", 1, ["--use-packed-sequence"]),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_what_the_preflight_accepts_megatron_accepts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.argument_utils import core_transformer_config_from_args, pretrain_cfg_container_from_args

    variant, ranks, flags = LAYOUTS[case]
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    args = resolve("--model-variant", variant, *flags)
    core_transformer_config_from_args(args)
    pretrain_cfg_container_from_args(args)
    assert args.dataloader_type == "external" and args.calculate_per_token_loss


@pytest.mark.parametrize(("cp", "kind"), [(2, "a2a"), (4, "all_gather")])
def test_cp_exchange_is_chosen_and_printed(
    cp: int, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if detect().gpus:
        kind = kind.replace("all_gather", "p2p")
    monkeypatch.setenv("WORLD_SIZE", str(cp))
    args = resolve("--model-variant", "tiny", "--context-parallel-size", str(cp))  # 2 KV heads
    assert args.cp_comm_type == [kind]
    assert f"notice: --cp-comm-type {kind}" in capsys.readouterr().err
    given = resolve("--model-variant", "tiny", "--context-parallel-size", str(cp), "--cp-comm-type", "all_gather")
    assert given.cp_comm_type == ["all_gather"]
    assert "notice" not in capsys.readouterr().err


def test_retired_flags_say_what_does_their_job(capsys: pytest.CaptureFixture[str]) -> None:
    resolve("--model-variant", "tiny", "--use-vanilla-collate-fn", "--total-seq-length", "1024")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("notice: ")]
    assert [line.split()[1] for line in lines] == ["--use-vanilla-collate-fn", "--total-seq-length"]
    assert "data/batch.py" in lines[0] and "--seq-length" in lines[1]


def test_megatrons_refusal_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        resolve("--model-variant", "tiny", "--lr", "high")
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "--lr" in message and "high" in message and len(message.splitlines()) <= 4


def test_refusal_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        resolve("--model-variant", "tiny", "--expert-model-parallel-size", "2")
    assert exit_.value.code == 2
    assert "--expert-model-parallel-size 2" in capsys.readouterr().err


def test_listing_is_left_out_when_it_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log of a run starts with the run, not with 800 arguments."""
    argv = sys.argv.copy()
    resolve("--model-variant", "tiny", "--save", str(tmp_path))
    saved = capsys.readouterr().out
    resolve("--model-variant", "tiny")
    listed = capsys.readouterr().out
    assert "using world size: 1" in saved and len(saved.splitlines()) < 10
    assert "make_vocab_size_divisible_by" in listed and "make_vocab_size_divisible_by" not in saved
    assert sys.argv == argv

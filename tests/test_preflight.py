"""Refusals: each names the flag and the fix, none needs torch or megatron, and what is right passes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from arguments import Refused, preflight
from models.qwen35_vl.configuration import VARIANTS
from runtime.machine import Machine
from tests.command_lines import LAPTOP

GPUS = Machine(8, transformer_engine=True, flash_linear_attention=True, fused_weight_gradients=False, wandb=True)
BARE_GPU = Machine(1, transformer_engine=False, flash_linear_attention=False, fused_weight_gradients=False, wandb=False)

BASE = "--micro-batch-size 1 --seq-length 1024 --train-iters 1 --lr 1e-3"
TINY = f"{BASE} --model-variant tiny"
MOE = f"{BASE} --model-variant tiny_moe"
TP, CP, PP, EP = (f"--{kind}-parallel-size" for kind in ("tensor-model", "context", "pipeline-model", "expert-model"))
SP = "--sequence-parallel"

# flags, ranks, what the message has to say
REFUSED = {
    "EP on a dense variant": (f"{TINY} {EP} 2", 2, [f"{EP} 2", "dense", "use 1"]),
    "split of the time": (f"{TINY} --log-time-split -1", 1, ["--log-time-split -1", "0 for never"]),
    "EP on a variant made dense": (f"{MOE} --num-experts 0 {EP} 2", 2, [f"{EP} 2", "dense"]),
    "experts over EP": (f"{MOE} --num-experts 6 {EP} 4", 4, [f"{EP} 4", "6 experts", "[1, 2, 3, 6]"]),
    "EP over the ranks": (f"{MOE} {EP} 4", 2, [f"{EP} 4", "2 ranks"]),
    "ETP is TP unless given": (f"{MOE} {EP} 2 {TP} 2 {SP}", 2, ["--expert-tensor-parallel-size 2", "TP unless given"]),
    "top-k above experts": (f"{MOE} --moe-router-topk 5", 1, ["--moe-router-topk 5", "4 experts"]),
    "grouped products of odd sizes": (
        f"{MOE} --bf16 --moe-grouped-gemm --moe-ffn-hidden-size 100",
        1,
        ["--moe-ffn-hidden-size 100", "multiples of 8"],
    ),
    "grouped experts under FSDP": (
        f"{MOE} --moe-grouped-gemm --use-megatron-fsdp --ckpt-format fsdp_dtensor",
        1,
        ["--moe-grouped-gemm", "--use-megatron-fsdp"],
    ),
    "experts on a dense variant": (f"{TINY} --num-experts 4", 1, ["--moe-ffn-hidden-size", "tiny_moe"]),
    "query heads": (f"{TINY} {TP} 8 {SP}", 8, [f"{TP} 8", "4 query heads", "[1, 2, 4]"]),
    "KV heads": (
        f"{BASE} --model-variant 4b --num-query-groups 6 --num-attention-heads 24 {TP} 4 {SP}", 4,
        ["6 KV heads", "neither a multiple nor a divisor", "[1, 2, 3, 6, 12, 24]"],
    ),
    "ViT heads": (f"{BASE} --model-variant 0.8b {TP} 8 {SP}", 8, [f"{TP} 8", "ViT's 12 heads", "divides 12"]),
    "GDN heads over TP": (f"{TINY} --linear-num-key-heads 3 {TP} 2 {SP}", 2, ["3 GatedDeltaNet key heads"]),
    "GDN heads over TP * CP": (
        f"{TINY} {TP} 2 {SP} {CP} 4 --cp-comm-type all_gather", 8,
        ["4 GatedDeltaNet key heads", "TP * CP = 8", f"{CP} 2 is the largest"],
    ),
    "GDN value heads": (f"{TINY} --linear-num-value-heads 6 {CP} 4", 4, ["6 GatedDeltaNet value heads", f"{CP} 2"]),
    "GDN value heads over key heads": (f"{TINY} --linear-num-value-heads 6", 1, ["not a multiple of --linear-num-key"]),
    "TP without SP": (f"{TINY} {TP} 2", 2, [f"{TP} 2", "add --sequence-parallel"]),
    "a2a with too few KV heads": (
        f"{TINY} {CP} 4 --cp-comm-type a2a", 4, ["--cp-comm-type a2a", "2 KV heads", "use all_gather"],
    ),
    "p2p without Transformer Engine": (
        f"{TINY} {CP} 2 --cp-comm-type p2p", 2, ["--cp-comm-type p2p", "local has no such", "use a2a or all_gather"],
    ),
    "CP types per layer": (f"{TINY} {CP} 2 --cp-comm-type a2a a2a", 2, ["--cp-comm-type: 2 values", "4 layers"]),
    "sequence over CP": (f"{TINY} --seq-length 1002 {CP} 2", 2, ["--seq-length 1002", "multiple of 4", "1000 or 1004"]),
    "sequence over SP": (f"{TINY} --seq-length 1001 {TP} 2 {SP}", 2, ["--seq-length 1001", "1000 or 1002"]),
    "sequence over CP and SP": (
        f"{BASE} --model-variant 4b --seq-length 1000 {CP} 4 {TP} 4 {SP}", 16, ["multiple of 16", "992 or 1008"],
    ),
    "packed budget over CP": (f"{TINY} --use-packed-sequence --seq-length 1002 {CP} 2", 2, ["multiple of 4"]),
    "sequence beyond positions": (f"{TINY} --seq-length 65536", 1, ["--seq-length 65536", "32768"]),
    "ranks": (f"{TINY} {CP} 2", 3, [f"{CP} 2", "3 ranks", "multiple of 2"]),
    "below zero": (f"{TINY} --num-experts -1", 1, ["--num-experts -1", "at least 0"]),
    "zero ranks": (f"{TINY} {TP} 0", 1, [f"{TP} 0", "at least 1"]),
    "global batch": (f"{TINY} --global-batch-size 3", 2, ["--global-batch-size 3", "2 data-parallel ranks", "2 or 4"]),
    "layers over PP": (f"{TINY} {PP} 3", 3, [f"{PP} 3", "4 layers", "--decoder-first-pipeline-num-layers"]),
    "layers left over PP": (f"{TINY} {PP} 3 --decoder-first-pipeline-num-layers 1", 3, ["3 layers", "2 stages"]),
    "VPP without PP": (f"{TINY} --num-virtual-stages-per-pipeline-rank 2", 1, ["--num-virtual", f"{PP} above 1"]),
    "VPP by layers without PP": (f"{TINY} --num-layers-per-virtual-pipeline-stage 1", 1, [f"{PP} above 1"]),
    "VPP twice": (
        f"{TINY} {PP} 2 --num-virtual-stages-per-pipeline-rank 2 --num-layers-per-virtual-pipeline-stage 1", 2,
        ["--num-virtual-stages-per-pipeline-rank and --num-layers-per-virtual", "give one"],
    ),
    "VPP over layers": (f"{TINY} {PP} 2 --num-virtual-stages-per-pipeline-rank 3", 2, ["2 layers per stage", "3"]),
    "FSDP with PP": (f"{TINY} {PP} 2 --use-megatron-fsdp --ckpt-format fsdp_dtensor", 2, ["USE_FSDP=0 or PP=1"]),
    "FSDP's format": (f"{TINY} --use-megatron-fsdp", 1, ["--ckpt-format torch_dist", "use --ckpt-format fsdp_dtensor"]),
    "meta without FSDP": (f"{TINY} --init-model-with-meta-device", 1, ["--use-megatron-fsdp", "--load"]),
    "format without FSDP": (f"{TINY} --ckpt-format fsdp_dtensor", 1, ["use --ckpt-format torch_dist"]),
    "variant": (f"{BASE} --model-variant tinny", 1, ["--model-variant tinny", "did you mean tiny?", *VARIANTS]),
    "arch": (f"{TINY} --model-arch qwen35", 1, ["--model-arch qwen35", "did you mean qwen35_vl?"]),
    "provider": (f"{TINY} --dataset-provider cord", 1, ["did you mean cord_v2?", "mock, ragged, receipts, cord_v2"]),
    "processor": (f"{TINY} --hf-processor-path /nowhere/at/all", 1, ["--hf-processor-path /nowhere", "no such folder"]),
    "processor's folder": (f"{TINY} --hf-processor-path {Path(__file__).parent}", 1, ["preprocessor_config.json"]),
    "checkpoint": (f"{TINY} --load /nowhere --exit-on-missing-checkpoint", 1, ["--load /nowhere", "CKPT_LOAD"]),
    "TE without TE": (f"{TINY} --transformer-impl transformer_engine", 1, ["isn't installed", "no CUDA device"]),
    "implementation": (f"{TINY} --transformer-impl inference_optimized", 1, ["use local or transformer_engine"]),
    "wandb": (f"{TINY} --wandb-project x", 1, ["--wandb-project x", "pip install wandb"]),
    "misspelt": (f"{TINY} --sequence-paralel", 1, ["--sequence-paralel: no such", "did you mean --sequence-parallel?"]),
    "invented": (f"{TINY} --teleport=1", 1, ["--teleport: no such flag"]),
    "not a number": (f"{TINY} --num-layers four", 1, ["--num-layers", "four"]),
    "unsupported": (f"{TINY} --yaml-cfg=x.yaml", 1, ["--yaml-cfg", "--model-variant"]),
    "missing": ("--model-variant tiny --micro-batch-size 1", 1, ["--seq-length is missing"]),
    "no schedule": ("--model-variant tiny --micro-batch-size 1 --seq-length 64", 1, ["--lr is", "--train-iters is"]),
    "mrope section": (f"{TINY} --mrope-section 11 11 10", 1, ["--mrope-section 11 11 10", "leave 4 frequencies"]),
    "image token": (f"{TINY} --image-token-id 248056", 1, ["--image-token-id 248056", "1024 rows"]),
    "mock's image": (f"{TINY} --image-size 100", 1, ["--image-size 100", "multiple of 32"]),
    "no ViT": (f"{TINY} --vision-num-layers 0", 1, ["--vision-num-layers 0"]),
    "layer pattern": (f"{TINY} --linear-attention-freq [1,0]*2", 1, ["--linear-attention-freq [1,0]*2"]),
    "vocabulary over TP": (f"{TINY} --padded-vocab-size 1023 {TP} 2 {SP}", 2, ["1023 rows"]),
    "two architectures": (f"{TINY} --hf-config /x", 1, ["--hf-config and --model-variant"]),
    "no such config": (f"{BASE} --hf-config /nowhere", 1, ["--hf-config /nowhere", "no such folder"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    flags, ranks, fragments = REFUSED[case]
    with pytest.raises(Refused) as refusal:
        preflight(flags.split(), LAPTOP, ranks)
    for fragment in fragments:
        assert fragment in str(refusal.value)


ACCEPTED = {
    "one rank": (TINY, 1),
    "TP with SP": (f"{TINY} {TP} 2 {SP}", 2),
    "more TP than KV heads": (f"{TINY} {TP} 4 {SP}", 4),
    "CP": (f"{TINY} {CP} 2", 2),
    "CP beyond the KV heads": (f"{TINY} {CP} 4", 4),
    "packed, any budget with SP": (f"{TINY} --use-packed-sequence --seq-length 1001 {TP} 2 {SP}", 2),
    "TP and CP": (f"{TINY} {TP} 2 {SP} {CP} 2", 4),
    "PP": (f"{TINY} {PP} 4", 4),
    "PP, uneven": (f"{TINY} {PP} 2 --decoder-first-pipeline-num-layers 1", 2),
    "PP, both ends given": (
        f"{TINY} {PP} 2 --decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 3",
        2,
    ),
    "VPP": (f"{TINY} {PP} 2 --num-virtual-stages-per-pipeline-rank 2", 2),
    "EP": (f"{MOE} {EP} 2", 2),
    "EP and TP": (f"{MOE} {EP} 2 --expert-tensor-parallel-size 1 {TP} 2 {SP}", 4),
    "FSDP": (f"{TINY} --use-megatron-fsdp --ckpt-format fsdp_dtensor", 2),
    "data parallel": (f"{TINY} --global-batch-size 4 --use-distributed-optimizer", 4),
    "hub processor": (f"{BASE} --model-variant 0.8b --hf-processor-path Qwen/Qwen3.5-0.8B", 1),
    "experts on a dense variant": (
        f"{TINY} --num-experts 4 --moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 64",
        1,
    ),
    "largest, on a cluster": (
        f"{BASE} --model-variant 397b_a17b {TP} 4 {SP} {PP} 4 {EP} 32 --expert-tensor-parallel-size 1",
        512,
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    flags, ranks = ACCEPTED[case]
    assert preflight(flags.split(), LAPTOP, ranks)


def test_every_problem_in_one_message() -> None:
    with pytest.raises(Refused) as refusal:
        preflight(f"{TINY} {TP} 2 {EP} 2 --seq-length 1001 --wandb-project x".split(), LAPTOP, 2)
    assert len(refusal.value.problems) == 3


@pytest.mark.parametrize(
    ("machine", "flags", "fragments"),
    [
        (BARE_GPU, "", ["flash-linear-attention and Transformer Engine", "--allow-slow-kernels"]),
        (BARE_GPU, "--transformer-impl local", ["--allow-slow-kernels"]),
        (BARE_GPU, "--transformer-impl transformer_engine --allow-slow-kernels", ["isn't installed"]),
    ],
)
def test_slow_fallbacks_on_a_gpu_are_refused(machine: Machine, flags: str, fragments: list[str]) -> None:
    with pytest.raises(Refused) as refusal:
        preflight(f"{TINY} {flags}".split(), machine, 1)
    for fragment in fragments:
        assert fragment in str(refusal.value)


def test_recomputation_that_is_compiled_needs_a_compiler() -> None:
    flags = f"{TINY} --recompute-granularity selective --recompute-modules core_attn layernorm gdn_norm_out".split()
    preflight(flags, LAPTOP, 1)
    with pytest.raises(Refused, match=r"--recompute-modules gdn_norm_out layernorm: .*ninja"):
        preflight(flags, replace(LAPTOP, compiler=False), 1)
    preflight(flags[:-2], replace(LAPTOP, compiler=False), 1)


def test_slow_fallbacks_on_a_gpu_can_be_allowed() -> None:
    flags = preflight(f"{TINY} --allow-slow-kernels".split(), BARE_GPU, 1).words
    assert flags[flags.index("--transformer-impl") + 1] == "local"


def test_gpus_get_transformer_engine_and_its_exchanges() -> None:
    flags = preflight(f"{BASE} --model-variant 397b_a17b {CP} 4".split(), GPUS, 8).words
    assert flags[flags.index("--transformer-impl") + 1] == "transformer_engine"
    assert flags[flags.index("--cp-comm-type") + 1] == "p2p"  # 2 KV heads
    assert {"--moe-grouped-gemm", "--moe-permute-fusion", "--moe-router-fusion"} <= set(flags)
    assert "--no-persist-layer-norm" not in flags
    plain = preflight(f"{BASE} --model-variant 397b_a17b --no-moe-fusion".split(), GPUS, 8).words
    assert not {"--moe-permute-fusion", "--moe-router-fusion"} & set(plain)


@pytest.mark.parametrize(
    ("flags", "machine", "expected"),
    [
        ("--bf16", "LAPTOP", True),
        ("", "LAPTOP", False),  # in float32 it would be a loop over experts, too
        ("--bf16 --moe-ffn-hidden-size 100", "LAPTOP", False),
        ("--bf16 --use-megatron-fsdp --ckpt-format fsdp_dtensor", "LAPTOP", False),
        ("--bf16 --lora-rank 2 --lora-experts", "LAPTOP", False),
        ("--bf16", "GPUS", True),
        ("--bf16 --use-megatron-fsdp --ckpt-format fsdp_dtensor", "GPUS", True),  # Transformer Engine's own
    ],
)
def test_who_gets_grouped_products(flags: str, machine: str, expected: bool) -> None:
    words = preflight(f"{MOE} {flags}".split(), {"LAPTOP": LAPTOP, "GPUS": GPUS}[machine], 1).words
    assert ("--moe-grouped-gemm" in words) == expected


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ("", False),
        ("--expert-model-parallel-size 2", True),
        ("--moe-token-dispatcher-type allgather", True),
        ("--moe-expert-capacity-factor 1.5", True),
        ("--use-transformer-engine-op-fuser", True),
    ],
)
def test_graphs_of_experts_need_counts_on_the_device(flags: str, refused: bool) -> None:
    graphs = "--bf16 --cuda-graphs --use-packed-sequence --max-patches-per-pack 64"
    try:
        preflight(f"{MOE} {graphs} {flags}".split(), GPUS, 2)
        problems = ""
    except Refused as refusal:
        problems = str(refusal)
    assert ("how many tokens each expert gets" in problems) == refused, problems


def test_fsdp_refuses_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.raises(Refused, match="CUDA_DEVICE_MAX_CONNECTIONS=1"):
        preflight(f"{TINY} --use-megatron-fsdp --ckpt-format fsdp_dtensor".split(), LAPTOP, 1)


def test_offline_processor_has_to_be_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    flags = f"{TINY} --hf-processor-path Qwen/Qwen3.5-0.8B".split()
    with pytest.raises(Refused, match="HF_HUB_OFFLINE=1"):
        preflight(flags, LAPTOP, 1)
    cached = tmp_path / "models--Qwen--Qwen3.5-0.8B"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("abc")
    (cached / "snapshots/abc").mkdir(parents=True)
    (cached / "snapshots/abc/preprocessor_config.json").write_text("{}")
    assert preflight(flags, LAPTOP, 1)


def test_foreign_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(Refused, match=f"--hf-config {tmp_path}.*llama"):
        preflight([*BASE.split(), "--hf-config", str(tmp_path)], LAPTOP, 1)


def test_the_process_imports_neither_torch_nor_megatron() -> None:
    """As the launcher runs it; refused and accepted command lines alike."""
    code = (
        "import sys, runpy\n"
        "sys.argv[0] = 'arguments.py'\n"
        "try: runpy.run_path('arguments.py', run_name='__main__'); code = 0\n"
        "except SystemExit as error: code = error.code\n"
        "heavy = {'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)\n"
        "print(heavy or 'light'); sys.exit(code)\n"
    )
    root = Path(__file__).parents[1]
    for flags, exit_code in ((TINY, 0), (f"{TINY} {EP} 2", 2)):
        run = subprocess.run(
            [sys.executable, "-c", code, *flags.split()], cwd=root, capture_output=True, text=True, check=False
        )
        assert (run.stdout.strip(), run.returncode) == ("light", exit_code), run.stderr
        assert ("Refused" in run.stderr) == (exit_code == 2)


def test_a_rank_refuses_before_it_imports_megatron() -> None:
    """As torchrun starts it: the same message, and no process group is waited for."""
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "pretrain_multimodal.py", *f"{TINY} {TP} 2".split()],
        cwd=root,
        env={**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2 and "add --sequence-parallel" in run.stderr
    imported = {line.split("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert "arguments" in imported and not {"torch", "megatron", "transformers"} & imported


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_a_checkpoint_of_another_depth(tmp_path: Path, flag: str) -> None:
    """Instead of hundreds of names in a KeyError, once Megatron has been imported."""
    from runtime.checkpoints import TRACKER
    from tests.small_checkpoint import write

    write(tmp_path, 2)
    (tmp_path / TRACKER).write_text("2")
    (tmp_path / "hf").mkdir()
    for depth in (4, 6):
        config = VARIANTS["tiny"].replace(num_layers=depth).to_hf()
        (tmp_path / "hf/config.json").write_text(json.dumps(config))
        if depth == 4:
            preflight([*TINY.split(), flag, str(tmp_path)], LAPTOP, 1)
            continue
        with pytest.raises(Refused, match=r"num_layers is 4 by the flags and 6 in the folder's config\.json"):
            preflight([*TINY.split(), flag, str(tmp_path)], LAPTOP, 1)


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(Refused, match=f"MASTER_PORT={port}: Address already in use; give another"):
            preflight(TINY.split(), LAPTOP, 2)
        monkeypatch.setenv("RANK", "1")  # the first rank's may be there by then
        preflight(TINY.split(), LAPTOP, 2)


@pytest.mark.parametrize("name", [":build", "module:", "a b:build", ".here:build", "__main__:build", "module:a:b"])
def test_providers_that_are_no_names(name: str) -> None:
    with pytest.raises(Refused, match=f"--dataset-provider {name}: expected package.module:function"):
        preflight([*TINY.split(), "--dataset-provider", name], LAPTOP, 1)


def test_another_depth_of_multi_token_prediction(tmp_path: Path) -> None:
    from tests.small_checkpoint import write

    write(tmp_path, 4)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    (tmp_path / "hf").mkdir()
    load = [*TINY.split(), "--load", str(tmp_path)]

    def refused(*flags: str) -> str:
        with pytest.raises(Refused) as refusal:
            preflight([*load, *flags], LAPTOP, 1)
        return str(refusal.value)

    (tmp_path / "hf/config.json").write_text(json.dumps(VARIANTS["tiny"].to_hf()))
    preflight(load, LAPTOP, 1)
    assert "has checkpoints of a model with 1; give --mtp-num-layers 1, or --finetune" in refused(
        "--mtp-num-layers", "0"
    )
    preflight([*load, "--mtp-num-layers", "0", "--finetune"], LAPTOP, 1)
    (tmp_path / "hf/config.json").write_text(json.dumps(VARIANTS["tiny"].replace(mtp_num_layers=0).to_hf()))
    assert "--mtp-num-layers 1: " in refused("--finetune") and "give --mtp-num-layers 0" in refused()

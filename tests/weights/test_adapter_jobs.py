"""LoRA through `pretrain()`: checkpoints of adapters, resuming in the same and another layout, export, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import arguments
from models import MODEL_REGISTRY
from models.weight_map import Rank, fill
from proofs.float64 import float64
from runtime.machine import Machine
from tests.build_model import build_model
from tests.errors import relative_error
from tests.hf_reference import load_hf_folder
from tests.models.test_hf_parity import DOCUMENTS, load, make_sample, our_inputs, run_hf
from tests.models.test_lora_peft import adapter_parameters, table, with_peft
from tests.train_jobs import FLAGS, run
from weights.adapter import AdapterFolder
from weights.adapter_export import export

pytestmark = pytest.mark.slow

LORA = ["--lora-rank", "4", "--lora-alpha", "8", "--lora-vision"]
TRAIN = ["--lr", "1e-2", "--train-iters", "4", "--lr-decay-style", "constant", "--log-interval", "1"]
CPU = Machine(
    gpus=0,
    transformer_engine=False,
    flash_linear_attention=False,
    fused_weight_gradients=False,
    compiler=False,
    wandb=False,
)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(first: Path, second: Path) -> bool:
    one, other = tensors(first), tensors(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module", params=["tiny", "tiny_moe"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base; LoRA of four steps with a checkpoint in the middle; and from random weights."""
    folder = tmp_path_factory.mktemp(request.param)
    variant = ["--model-variant", request.param]
    lora = [*LORA, *(["--lora-experts"] if request.param == "tiny_moe" else [])]
    (folder / "flags.json").write_text(json.dumps(lora))
    saved = ["--save", str(folder / "checkpoints"), "--save-interval", "2"]
    ends = ["--save-adapter", str(folder / "adapter"), "--save-hf", str(folder / "merged")]
    at_random = [*variant, *lora, *TRAIN, "--save", str(folder / "random"), "--save-interval", "2"]
    run(
        folder,
        [
            [*variant, "--save-hf", str(folder / "base")],
            ["--load-hf", str(folder / "base"), *lora, *TRAIN, *saved, *ends],
            [*at_random, "--save-adapter", str(folder / "random-adapter")],
        ],
    )
    return folder


def test_resuming_is_exact_and_finds_the_base(trained: Path) -> None:
    lora = json.loads((trained / "flags.json").read_text())
    model = ["--hf-config", str(trained / "base"), *lora, *TRAIN, "--ckpt-step", "2"]
    run(
        trained,
        [
            [*model, "--load", str(trained / "checkpoints"), "--save-adapter", str(trained / "resumed")],
            [*model, "--load", str(trained / "random"), "--save-adapter", str(trained / "random-resumed")],
        ],
    )
    assert same(trained / "adapter", trained / "resumed")
    assert same(trained / "random-adapter", trained / "random-resumed")


def test_another_layout_reads_the_same_adapter(trained: Path) -> None:
    """Nothing is left to train, so what TP2 and PP2 have loaded comes out."""
    lora = json.loads((trained / "flags.json").read_text())
    loaded = ["--load", str(trained / "checkpoints"), "--hf-config", str(trained / "base"), *lora, *TRAIN]
    tensor_parallel = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    if "--lora-experts" in lora:
        tensor_parallel += ["--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]
    run(
        trained,
        [
            [*loaded, *tensor_parallel, "--save-adapter", str(trained / "tp2")],
            [*loaded, "--pipeline-model-parallel-size", "2", "--save-adapter", str(trained / "pp2")],
        ],
        ranks=2,
    )
    assert same(trained / "adapter", trained / "tp2")
    assert same(trained / "adapter", trained / "pp2")


def test_export_gives_the_adapter_and_the_merged_model(trained: Path, tmp_path: Path) -> None:
    export(trained / "checkpoints", tmp_path / "adapter", quiet=True)
    assert same(trained / "adapter", tmp_path / "adapter")
    export(trained / "checkpoints", tmp_path / "merged", merge=True, quiet=True)
    export(trained / "base", tmp_path / "by-hand", merge=True, adapter=trained / "adapter", quiet=True)
    base, job, *others = (
        load_file(folder / "model.safetensors")
        for folder in (trained / "base", trained / "merged", tmp_path / "merged", tmp_path / "by-hand")
    )
    assert any(not torch.equal(base[name], job[name]) for name in base)
    for other in others:
        assert job.keys() == other.keys()
        for name in job:
            # Sums of products in another order, rounded to bf16.
            torch.testing.assert_close(other[name], job[name], rtol=2**-7, atol=1e-6)


def test_peft_gives_our_logits(trained: Path, single_rank: None, tmp_path: Path) -> None:
    """What four steps have made, through peft on transformers' base and in our model, in float64."""
    lora = json.loads((trained / "flags.json").read_text())
    described = json.loads((trained / "base/config.json").read_text())
    architecture = MODEL_REGISTRY["qwen35_vl"].from_hf(described).replace(mtp_num_layers=0)
    with float64():
        reference = load_hf_folder(architecture, trained / "base").double()
        mapping = table(architecture, tmp_path, tuple(lora))
        model = build_model(architecture, tmp_path, torch.float64, *lora)
        load(model, reference, architecture)
        sample = make_sample(architecture, DOCUMENTS["one_image"], torch.float64)
        inputs, _ = our_inputs(architecture, sample)
        base = model(**inputs).detach()
        state = AdapterFolder.open(trained / "adapter").read(mapping)
        fill(mapping.weights, adapter_parameters(model, architecture), Rank(), state)
        logits = model(**inputs).detach()
        theirs = run_hf(with_peft(reference, trained / "adapter"), architecture, sample).logits
    print(f"logits {relative_error(logits, theirs):.1e}, and without the adapter {relative_error(base, theirs):.1e}")
    assert relative_error(logits, theirs) < 1e-12
    assert relative_error(base, theirs) > 1e-3


def test_the_checkpoint_holds_adapters_alone(trained: Path) -> None:
    from weights.checkpoint import CheckpointTensors

    kept = CheckpointTensors(trained / "checkpoints/iter_0000004").metadata
    assert kept and all(".adapter." in key or key.startswith(("rng_state",)) for key in kept), sorted(kept)[:5]


def test_another_base_or_another_adapter_is_refused(trained: Path, tmp_path: Path) -> None:
    lora = json.loads((trained / "flags.json").read_text())
    loaded = ["--load", str(trained / "checkpoints")]

    def refusal(*flags: str) -> str:
        with pytest.raises(arguments.Refused) as refused:
            arguments.preflight([*FLAGS, *flags], CPU, 1)
        return str(refused.value)

    assert "hold a LoRA adapter" in refusal(*loaded, "--hf-config", str(trained / "base"))
    changed = [*lora, "--lora-rank", "5"]
    assert "--lora-rank 4, and the command line 5" in refusal(*loaded, "--hf-config", str(trained / "base"), *changed)
    other = AdapterFolder.open(trained / "adapter").config["target_modules"]
    assert "in_proj_qkv" in other
    narrower = [*lora, "--lora-targets", "q_proj"]
    assert "adapts other modules" in refusal(*loaded, "--hf-config", str(trained / "base"), *narrower)


@pytest.mark.parametrize("start", ["hf", "random"])
def test_fsdp_checkpoints_hold_adapters_and_resume_exactly(trained: Path, start: str, tmp_path: Path) -> None:
    """Saved by two ranks; resumed by two, and exported."""
    from weights.checkpoint import CheckpointTensors

    lora = json.loads((trained / "flags.json").read_text())
    fsdp = ["--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params"]
    common = [*lora, *TRAIN, *fsdp, "--ckpt-format", "fsdp_dtensor"]
    model = ["--hf-config", str(trained / "base")]
    saved = tmp_path / "checkpoints"
    begin = ["--load-hf", str(trained / "base")] if start == "hf" else model
    run(
        tmp_path,
        [
            [*begin, *common, "--save", str(saved), "--save-interval", "2", "--save-adapter", str(tmp_path / "whole")],
            [*model, *common, "--load", str(saved), "--ckpt-step", "2", "--save-adapter", str(tmp_path / "resumed")],
        ],
        ranks=2,
        fsdp=True,
    )
    assert same(tmp_path / "whole", tmp_path / "resumed")
    kept = CheckpointTensors(saved / "iter_0000004").metadata
    parameters = [key for key in kept if key.startswith(("model.", "optimizer."))]
    assert parameters and all(".adapter." in key for key in parameters)
    export(saved, tmp_path / "exported", quiet=True)
    assert same(tmp_path / "whole", tmp_path / "exported")

"""LoRA against peft on transformers' model, in float64: forward, the gradient of every A and B, merging, the format."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import arguments
from models.adapters import AdapterMap, lora_of_args
from models.qwen35_vl.configuration import VARIANTS, Qwen35VLConfig
from models.weight_map import Rank, assemble, fill, shares
from proofs.float64 import float64
from tests.build_model import build_model, command_line_of
from tests.errors import relative_error
from tests.hf_reference import build_hf
from tests.models.test_hf_parity import DOCUMENTS, load, make_sample, our_inputs, run_hf

pytestmark = pytest.mark.usefixtures("single_rank")

DENSE, MOE = (VARIANTS[name].replace(mtp_num_layers=0) for name in ("tiny", "tiny_moe"))
CASES = {
    "dense": (DENSE, ("--lora-rank", "4", "--lora-alpha", "6", "--lora-vision")),
    "moe": (MOE, ("--lora-rank", "3", "--lora-alpha", "5", "--lora-experts", "--lora-rslora")),
    "grouped": (MOE, ("--lora-rank", "3", "--moe-grouped-gemm")),
    "some": (
        DENSE,
        ("--lora-rank", "2", "--lora-targets", "k_proj", "up_proj", "in_proj_z", "in_proj_qkv", "attn.qkv"),
    ),
}


def table(architecture: Qwen35VLConfig, folder: Path, flags: tuple[str, ...]) -> AdapterMap:
    command_line = command_line_of(architecture, folder, *flags)
    return lora_of_args(command_line.args, command_line.spec, command_line.config)


def random_state(mapping: AdapterMap) -> dict[str, Tensor]:
    """Neither A nor B is zero: a zero B hides A's gradient."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5
        for name, shape in mapping.weights.tensors.items()
    }


def adapter_parameters(model: nn.Module, architecture: Qwen35VLConfig) -> list[tuple[str, nn.Parameter]]:
    from models.qwen35_vl.hf_weights import canonical_parameters
    from models.trained import is_adapter

    return [(name, p) for name, p in canonical_parameters(architecture, model) if is_adapter(name)]


def with_peft(reference: nn.Module, folder: Path) -> nn.Module:
    """transformers' model with the adapter of a folder, to be trained."""
    model = peft.PeftModel.from_pretrained(reference, folder, is_trainable=True, autocast_adapter_dtype=False)
    return model.double()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path):
    """Our model with random adapters, transformers' with the same through peft, and a document with images."""
    from weights.adapter import write_adapter

    architecture, flags = CASES[request.param]
    with float64():
        mapping = table(architecture, tmp_path, flags)
        state = random_state(mapping)
        reference = build_hf(architecture).double()
        model = build_model(architecture, tmp_path, torch.float64, *flags)
        load(model, reference, architecture)
        fill(mapping.weights, adapter_parameters(model, architecture), Rank(), state)
        write_adapter(tmp_path / "adapter", state, mapping, reference.state_dict(), None)
        sample = make_sample(architecture, DOCUMENTS["three_images"], torch.float64)
        yield architecture, mapping, state, model, reference, sample, tmp_path / "adapter"


def test_forward_and_gradients_equal_peft(case) -> None:
    """Measured: see the assertion's bound; every A and B has a gradient, and the base has none."""
    from weights.adapter import to_peft

    architecture, mapping, _, model, reference, sample, folder = case
    inputs, batch = our_inputs(architecture, sample)
    logits = model(**inputs).detach()
    losses = model(**inputs, labels=batch.labels, loss_mask=batch.loss_mask)
    ((losses * batch.loss_mask).sum() / batch.loss_mask.sum()).backward()
    ours = to_peft(
        assemble(
            mapping.weights,
            shares(mapping.weights, adapter_parameters(model, architecture), Rank(), lambda parameter: parameter.grad),
        ),
        mapping,
    )
    expected = run_hf(with_peft(reference, folder), architecture, sample)
    theirs = {
        name.replace(".default", ""): gradient for name, gradient in expected.gradients.items() if "lora_" in name
    }
    assert relative_error(logits, expected.logits) < 1e-12
    assert ours.keys() == theirs.keys()
    worst = max(relative_error(ours[name], theirs[name]) for name in theirs)
    print(f"logits {relative_error(logits, expected.logits):.1e}, worst gradient {worst:.1e} of {len(ours)}")
    assert all(gradient.norm() > 0 for gradient in theirs.values())
    assert worst < 1e-11
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapter." not in name)


def test_merged_equals_unmerged(case, tmp_path: Path) -> None:
    """The merged folder in transformers against peft's unmerged model."""
    from tests.hf_reference import load_hf_folder
    from weights.job import HfExporter, save_hf
    from weights.origin import HfOrigin, write_hf_folder

    architecture, _, _, model, reference, sample, folder = case
    record = dict.fromkeys(reference.state_dict(), "F64")
    command_line = command_line_of(architecture, tmp_path)
    exporter = HfExporter(
        arguments.resolve(command_line),
        command_line.spec,
        command_line.config,
        record,
        lambda new: write_hf_folder(new, architecture.to_hf(), None, HfOrigin(record=record), with_record=False),
    )
    exporter.chunks = [model]
    save_hf(exporter, tmp_path / "merged")
    merged = run_hf(load_hf_folder(architecture, tmp_path / "merged"), architecture, sample)
    unmerged = run_hf(with_peft(reference, folder), architecture, sample)
    print(f"merged {relative_error(merged.logits, unmerged.logits):.1e}")
    assert relative_error(merged.logits, unmerged.logits) < 1e-12


def test_a_peft_adapter_comes_back_the_same(case, tmp_path: Path) -> None:
    """What peft writes, read into our model and written again: names and bits."""
    from safetensors.torch import load_file

    from weights.adapter import AdapterFolder, write_adapter

    architecture, mapping, _, model, reference, _, folder = case
    with_peft(reference, folder).save_pretrained(tmp_path / "theirs")
    state = AdapterFolder.open(tmp_path / "theirs").read(mapping)
    parameters = adapter_parameters(model, architecture)
    for _, parameter in parameters:
        parameter.data.fill_(torch.nan)
    fill(mapping.weights, parameters, Rank(), state)
    back = assemble(mapping.weights, shares(mapping.weights, parameters, Rank()))
    write_adapter(tmp_path / "ours", back, mapping, reference.state_dict(), None)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert set(config["target_modules"]) == set(
        json.loads((tmp_path / "theirs/adapter_config.json").read_text())["target_modules"]
    )


def test_all_linear_is_pefts_without_the_vision(tmp_path: Path) -> None:
    """peft's own choice of modules on transformers' model, dense and MoE."""
    for architecture in (DENSE, MOE):
        adapted = peft.get_peft_model(build_hf(architecture), peft.LoraConfig(r=2, target_modules="all-linear"))
        theirs = {
            name.removeprefix("base_model.model.").removesuffix(".lora_A")
            for name, _ in adapted.named_modules()
            if name.endswith(".lora_A")
        }
        ours = set(table(architecture, tmp_path, ("--lora-rank", "2", "--lora-vision")).modules)
        assert ours == theirs
        language = set(table(architecture, tmp_path, ("--lora-rank", "2")).modules)
        assert language == {name for name in theirs if ".visual." not in name}


def test_frozen_grouped_experts_have_no_weight_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, where torch groups the products: two linears of each layer, forward and for their input's gradient.

    In float64 there is nothing to count; against peft they stand above.
    """
    products = []

    def counted(*args: Tensor, original=F.grouped_mm, **kwargs: Tensor) -> Tensor:
        products.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "grouped_mm", counted)
    flags = ("--lora-rank", "4", "--bf16")
    model = build_model(MOE, tmp_path, torch.bfloat16, *flags)
    mapping = table(MOE, tmp_path, flags)
    adapters = adapter_parameters(model, MOE)
    fill(mapping.weights, adapters, Rank(), random_state(mapping))
    inputs, batch = our_inputs(MOE, make_sample(MOE, DOCUMENTS["text"], torch.bfloat16))
    (model(**inputs, labels=batch.labels, loss_mask=batch.loss_mask) * batch.loss_mask).sum().backward()
    assert len(products) == 4 * MOE.num_layers
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for _, parameter in adapters)
    assert all(".adapter." in name for name, parameter in model.named_parameters() if parameter.requires_grad)

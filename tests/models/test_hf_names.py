"""The weight mapping against built models: names of either backend, parameter counts, round trips."""

from __future__ import annotations

import importlib.util
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.qwen35_vl.configuration import VARIANTS, Qwen35VLConfig
from tests.build_model import build_model, command_line_of
from tests.hf_folders import random_tensors, write_folder
from tests.hf_reference import build_hf_meta

pytestmark = pytest.mark.usefixtures("single_rank")

ARCHITECTURES = {
    "dense_tied": VARIANTS["tiny"],
    "dense_untied": VARIANTS["tiny"].replace(tie_word_embeddings=False),
    "moe_untied": VARIANTS["tiny_moe"],
    "moe_tied": VARIANTS["tiny_moe"].replace(tie_word_embeddings=True),
    "no_mtp": VARIANTS["tiny_moe"].replace(mtp_num_layers=0),
    "layers_that_do_not_divide": VARIANTS["tiny"].replace(num_layers=7),
}
# Up to 30,720 modules of one expert each: random initialisation, even of meta tensors, is half of building them.
HUGE = ("35b_a3b", "122b_a10b", "397b_a17b")
MEMORY_LIMIT = 2 * 2**30  # bytes


def check_names_and_size(model: nn.Module, architecture: Qwen35VLConfig) -> None:
    """Every parameter has its place in the table, and every place its parameter; sizes are HF's."""
    from models.qwen35_vl.hf_weights import canonical_parameters, weight_map

    assert all(parameter.is_meta for parameter in model.parameters())
    sources = weight_map(architecture).sources
    named = list(canonical_parameters(architecture, model))
    assert sorted(name for name, _ in named) == sorted(sources)
    for name, parameter in named:
        assert tuple(parameter.shape) == sources[name].shape, name

    ours = sum(parameter.numel() for name, parameter in named if ".mtp." not in name)
    assert ours == sum(parameter.numel() for parameter in build_hf_meta(architecture).parameters())


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.heavy) if name in HUGE else name for name in VARIANTS]
)
def test_every_variant_builds_on_the_meta_device_in_hf_s_size(variant: str, tmp_path: Path):
    from runtime.meta import meta_device

    before = peak_memory()
    with meta_device():
        model = build_model(VARIANTS[variant], tmp_path, torch.bfloat16, perform_initialization=variant not in HUGE)
    assert peak_memory() - before < MEMORY_LIMIT
    check_names_and_size(model, VARIANTS[variant])


def peak_memory() -> int:
    """The process' largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's modules, which refuse to be built where CUDA says that it isn't there."""
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine isn't installed")
    pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine doesn't import")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_builds_of_transformer_engine_s_layers(variant: str, tmp_path: Path, transformer_engine: None):
    from runtime.meta import meta_device

    with meta_device():
        model = build_model(
            VARIANTS[variant],
            tmp_path,
            torch.bfloat16,
            transformer_impl="transformer_engine",
            moe_grouped_gemm=VARIANTS[variant].is_moe,
        )
    names = {name for name, _ in model.named_parameters()}
    assert "vision_model.decoder.layers.0.self_attention.linear_qkv.layer_norm_bias" in names
    assert "language_model.decoder.layers.0.self_attention.in_proj.layer_norm_weight" in names
    check_names_and_size(model, VARIANTS[variant])


def random_state(architecture: Qwen35VLConfig, **layout: bool) -> dict[str, Tensor]:
    from models.qwen35_vl.hf_weights import ExpertStorage, weight_map

    generator = torch.Generator().manual_seed(0)
    shapes = weight_map(architecture, ExpertStorage(**layout)).tensors
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip_is_exact(name: str, tmp_path: Path):
    from models.qwen35_vl.hf_weights import ExpertStorage
    from tests.hf_states import export_hf_state, load_hf_state

    architecture = ARCHITECTURES[name]
    model = build_model(architecture, tmp_path, torch.float32)
    layouts = [{"stacked_experts": a, "stacked_mtp_experts": b} for a in (True, False) for b in (True, False)]
    for layout in layouts if architecture.is_moe else layouts[:1]:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        state = random_state(architecture, **layout)
        load_hf_state(model, state, architecture)
        assert not any(parameter.isnan().any() for parameter in model.parameters())
        assert_equal(export_hf_state(model, architecture, ExpertStorage(**layout)), state)


def test_bfloat16_weights_and_wide_ones_keep_their_bits(tmp_path: Path):
    """Everything in bf16 but what a run holds in float32."""
    from models.qwen35_vl.hf_weights import is_wide
    from tests.hf_states import export_hf_state, load_hf_state

    architecture = ARCHITECTURES["moe_untied"]
    model = build_model(architecture, tmp_path, torch.bfloat16)
    state = {
        name: tensor if is_wide(name) else tensor.bfloat16() for name, tensor in random_state(architecture).items()
    }
    load_hf_state(model, state, architecture)
    assert_equal(export_hf_state(model, architecture), state)


def test_weights_that_do_not_fit_are_listed_and_nothing_is_written(tmp_path: Path):
    from models.weight_map import WeightMismatch
    from tests.hf_states import load_hf_state

    architecture = ARCHITECTURES["dense_tied"]
    model = build_model(architecture, tmp_path, torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = random_state(architecture)
    del state["mtp.norm.weight"]
    state["model.visual.merger.norm.bias"] = torch.zeros(3)
    state["model.language_model.layers.0.linear_attn.surprise"] = torch.zeros(3)
    with pytest.raises(WeightMismatch) as mismatch:
        load_hf_state(model, state, architecture)
    for part in (
        "mtp.norm.weight: missing",
        "model.visual.merger.norm.bias: has shape (3,), expected (128,)",
        "model.language_model.layers.0.linear_attn.surprise: maps to no parameter",
    ):
        assert part in str(mismatch.value)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_model_of_another_architecture_is_refused(tmp_path: Path):
    from models.weight_map import WeightMismatch
    from tests.hf_states import export_hf_state, load_hf_state

    model = build_model(ARCHITECTURES["dense_tied"], tmp_path, torch.float32)
    wider = ARCHITECTURES["dense_tied"].replace(ffn_hidden_size=512)
    with pytest.raises(WeightMismatch, match=r"linear_fc1\.weight: the model has shape \(768, 128\)"):
        load_hf_state(model, random_state(wider), wider)
    with pytest.raises(WeightMismatch, match=r"mtp\.layers\.0\.enorm\.weight: the model's parameter has no source"):
        export_hf_state(model, ARCHITECTURES["dense_tied"].replace(mtp_num_layers=0))


def test_load_hf_refuses_bad_values_by_name(tmp_path: Path):
    """NaN is found while a rank reads, in the tensor that has it; with the flag it is loaded."""
    import arguments
    from models.weight_map import WeightMismatch
    from weights.job import load_hf

    architecture = ARCHITECTURES["dense_tied"]
    tensors = random_tensors(architecture)
    tensors["mtp.norm.weight"][5] = torch.nan
    write_folder(tmp_path / "hf", architecture, tensors)
    model = build_model(architecture, tmp_path, torch.bfloat16)
    line = command_line_of(architecture, tmp_path, "--load-hf", str(tmp_path / "hf"))
    args = arguments.resolve(line)
    with pytest.raises(WeightMismatch, match=r"^weights don't fit:\n  mtp\.norm\.weight: has NaN or infinity"):
        load_hf(args, line.spec, line.config, line.hf_source, [model])
    args.allow_nonfinite_weights = True
    load_hf(args, line.spec, line.config, line.hf_source, [model])
    assert [name for name, parameter in model.named_parameters() if parameter.isnan().any()] == [
        "language_model.mtp.layers.0.final_layernorm.weight"
    ]


def test_load_hf_says_what_it_leaves_out_and_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import arguments
    from weights.job import load_hf

    architecture = ARCHITECTURES["no_mtp"]
    with_mtp = architecture.replace(mtp_num_layers=1)
    tensors = random_tensors(with_mtp)
    tensors["model.visual.pos_embed.weight"] = tensors["model.visual.pos_embed.weight"].float()
    write_folder(tmp_path / "hf", with_mtp, tensors)
    model = build_model(architecture, tmp_path, torch.bfloat16)
    line = command_line_of(architecture, tmp_path, "--load-hf", str(tmp_path / "hf"), "--mtp-num-layers", "0", "--bf16")
    args = arguments.resolve(line)
    load_hf(args, line.spec, line.config, line.hf_source, [model])
    printed = capsys.readouterr().out
    count = sum(name.startswith("mtp.") for name in tensors)
    assert f"{count} tensors left out, mtp.fc.weight the first: the model is built without MTP" in printed
    assert "1 tensors, model.visual.pos_embed.weight the first, are rounded from F32 to BF16" in printed

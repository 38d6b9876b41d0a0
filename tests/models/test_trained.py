"""`--freeze` and `--lr-mult`: gradients of what is trained, what isn't computed, the optimizer's groups, refusals."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import arguments
from models import MODEL_REGISTRY
from models.qwen35_vl.configuration import VARIANTS, Qwen35VLConfig
from models.qwen35_vl.flops import FlopCount
from models.qwen35_vl.hf_weights import GROUPS, canonical_parameters, weight_map
from models.trained import Trained, frozen_names, rate_factors, trains_in_front
from proofs.float64 import float64
from tests.build_decoder import perturb
from tests.build_model import build_model, command_line_of
from tests.errors import relative_error
from tests.hf_reference import build_hf
from tests.models.test_hf_parity import DOCUMENTS, load, make_sample, our_inputs

DENSE, MOE = (VARIANTS[name].replace(mtp_num_layers=0) for name in ("tiny", "tiny_moe"))
RECOMPUTE = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
    "--recompute-vision",
)
BLOCKS = ("--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "1")
SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules", "layernorm", "gdn_norm_out", "core_attn")
# The first trained layer stands behind frozen ones: in the decoder, or in the ViT and then in both.
FRONT = ("vision", "projector", "embeddings", r"layers\.[01]\.")
BEHIND = ("embeddings", "projector", r"layers\.[01]\.", r"patch_embed|pos_embed|blocks\.0\.")


def gradients(architecture: Qwen35VLConfig, model: nn.Module, sample) -> dict[str, Tensor]:
    """By canonical name, of the parameters that have one."""
    inputs, batch = our_inputs(architecture, sample)
    losses = model(**inputs, labels=batch.labels, loss_mask=batch.loss_mask)
    (losses * batch.loss_mask).sum().backward()
    named = canonical_parameters(architecture, model)
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


@pytest.fixture(scope="module")
def full_run(single_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """Of each architecture: transformers' weights, a document with images, and the gradients of all parameters."""
    with float64():
        runs = {}
        for name, architecture in (("dense", DENSE), ("moe", MOE)):
            reference = build_hf(architecture).double()
            sample = make_sample(architecture, DOCUMENTS["three_images"], torch.float64)
            model = build_model(architecture, tmp_path_factory.mktemp(name), torch.float64)
            load(model, reference, architecture)
            runs[name] = (architecture, reference, sample, gradients(architecture, model, sample))
        yield runs


@pytest.mark.parametrize(
    ("name", "words", "flags"),
    [
        ("dense", ("vision",), ()),
        ("dense", ("vision", "language", "embeddings"), ()),
        ("dense", ("language", "projector"), RECOMPUTE),
        ("dense", BEHIND, RECOMPUTE),
        ("dense", FRONT, RECOMPUTE),
        ("dense", FRONT, BLOCKS),
        ("dense", FRONT, SELECTIVE),
        ("dense", BEHIND, SELECTIVE),
        ("moe", ("vision", "embeddings"), RECOMPUTE),
        ("moe", (r"mlp\.(experts|gate)\.",), ()),
    ],
)
def test_what_is_trained_gets_the_full_runs_gradients(full_run, name: str, words, flags, tmp_path: Path) -> None:
    """Measured: the same bits where the same kernels sum, else 3.5e-14."""
    architecture, reference, sample, expected = full_run[name]
    frozen = frozen_names(weight_map(architecture), GROUPS, words)
    model = build_model(architecture, tmp_path, torch.float64, "--freeze", *words, *flags)
    load(model, reference, architecture)
    found = gradients(architecture, model, sample)
    assert found.keys() == expected.keys() - frozen
    worst = max(relative_error(found[parameter], expected[parameter]) for parameter in found)
    print(f"worst {worst:.1e}")
    assert worst < 1e-13


def test_a_frozen_vit_runs_without_a_graph(full_run, tmp_path: Path) -> None:
    architecture, _, sample, _ = full_run["dense"]
    for flags in ((), ("--recompute-vision",)):
        model = build_model(architecture, tmp_path, torch.float64, "--freeze", "vision", "projector", *flags)
        inputs, _ = our_inputs(architecture, sample)
        assert not model.vision_model(**inputs["vision"]).requires_grad


@pytest.mark.parametrize(
    ("words", "flags"),
    [(FRONT, ()), (FRONT, RECOMPUTE), (FRONT, BLOCKS), (FRONT, SELECTIVE), (BEHIND, RECOMPUTE)],
    ids=["plain", "full", "blocks", "selective", "vision"],
)
def test_frozen_layers_in_front_store_nothing(full_run, words, flags: tuple[str, ...], tmp_path: Path) -> None:
    """No tensor is kept for a backward pass, and no layer runs again in it."""
    architecture, _, sample, _ = full_run["dense"]
    model = build_model(architecture, tmp_path, torch.float64, "--freeze", *words, *flags)
    frozen = [model.vision_model.decoder.layers[0]]
    if words == FRONT:
        frozen += model.language_model.decoder.layers[:2]
    runs: list[nn.Module] = []
    stored: list[nn.Module] = []
    inside: list[nn.Module] = []

    def enter(layer: nn.Module, _: object) -> None:
        inside.append(layer)
        runs.append(layer)

    def leave(*_: object) -> None:
        inside.pop()

    for layer in frozen:
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)

    def pack(tensor: Tensor) -> Tensor:
        stored.extend(inside)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(architecture, model, sample)
    assert runs == frozen
    assert not stored


def test_mtp_alone_is_trained_under_recomputation(single_rank: None, tmp_path: Path) -> None:
    """Nothing that its input depends on is trained."""
    architecture = VARIANTS["tiny"]
    with float64():
        sample = make_sample(architecture, DOCUMENTS["one_image"], torch.float64)
        found = []
        for flags in ((), RECOMPUTE):
            torch.manual_seed(0)
            model = build_model(architecture, tmp_path, torch.float64, "--freeze", r"^model\.", *flags)
            perturb(model)
            found.append(gradients(architecture, model, sample))
    plain, recomputed = found
    assert plain.keys() == recomputed.keys() and all(".mtp." in name for name in plain)
    assert sum(".mtp." in name for name in weight_map(architecture).sources) == len(plain)
    assert [name for name in plain if not torch.equal(recomputed[name], plain[name])] == []


def test_a_stage_knows_whether_its_input_is_trained() -> None:
    names = weight_map(DENSE).sources.keys()

    def in_front(*words: str, layer: int) -> bool:
        return trains_in_front(Trained(frozen_names(weight_map(DENSE), GROUPS, words)), names, layer)

    assert in_front("vision", "language", layer=2)  # projector and embeddings
    assert not in_front("vision", "projector", "embeddings", layer=0)
    assert in_front("vision", "projector", "embeddings", layer=1)
    assert [in_front(*FRONT, layer=layer) for layer in range(4)] == [False, False, False, True]
    assert in_front(*BEHIND, layer=2)
    adapted = Trained(adapters={"language_model.decoder.layers.2.mlp.linear_fc2.weight": (1, 1)})
    assert [trains_in_front(adapted, names, layer) for layer in (2, 3)] == [False, True]


@pytest.mark.parametrize("trains", [False, True])
def test_a_stage_behind_frozen_ones_differentiates_nothing(full_run, trains: bool, tmp_path: Path) -> None:
    """What Megatron sends back is there either way; only where it is of use has it been computed."""
    architecture = full_run["dense"][0]
    model = build_model(architecture, tmp_path, torch.float64, "--freeze", *BEHIND)
    model.trains_in_front = trains
    received = torch.zeros(3, 1, architecture.hidden_size, dtype=torch.float64, requires_grad=True)
    model.set_input_tensor([received])
    handed = model.language_model.decoder.input_tensor
    assert handed.requires_grad == trains
    assert (received.grad is None) == trains
    assert trains or (torch.equal(received.grad, torch.zeros_like(received)) and handed.is_leaf)


def test_rates_are_multiplied_and_weight_decay_stays_off_norms(single_rank: None, tmp_path: Path) -> None:
    """Each parameter of Megatron's own groups, which don't hold what is frozen."""
    from megatron.core.optimizer import _get_param_groups
    from megatron.training import training

    from runtime.learning_rates import LearningRates

    flags = ("--freeze", "language", "--lr-mult", "vision=0.5", "projector=4", "--lr", "1e-3", "--min-lr", "1e-4")
    command_line = command_line_of(DENSE, tmp_path, *flags)
    args = arguments.resolve(command_line)
    model = build_model(DENSE, tmp_path, torch.float32, *flags)
    before = training.get_megatron_optimizer_config
    LearningRates(args, command_line.spec, command_line.config).attach([model])
    config, overrides = training.get_megatron_optimizer_config(args)
    training.get_megatron_optimizer_config = before
    groups = _get_param_groups([model], config, overrides)
    names = {id(parameter): name for name, parameter in canonical_parameters(DENSE, model)}
    seen = set()
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            factor = 4 if ".merger." in name else 0.5 if name.startswith("vision") else 1
            assert (group["max_lr"], group["min_lr"]) == pytest.approx((factor * 1e-3, factor * 1e-4)), name
            assert group["lr_mult"] == factor, name
            assert group["wd_mult"] == (0.0 if parameter.dim() == 1 else 1.0), name
    assert seen == weight_map(DENSE).sources.keys() - frozen_names(weight_map(DENSE), GROUPS, ["language"])


def test_groups_cover_the_model_once() -> None:
    for architecture in (VARIANTS["tiny"], VARIANTS["tiny_moe"], DENSE.replace(tie_word_embeddings=False)):
        mapping = weight_map(architecture)
        parts = [frozen_names(mapping, GROUPS, [group]) for group in GROUPS]
        assert sum(map(len, parts)) == len(mapping.sources) == len(frozenset().union(*parts))


def test_flops_of_what_is_frozen() -> None:
    """What is frozen in front costs its forward alone; behind what is trained, it has no weights' gradients."""
    from models.spec import BatchShape

    shape = BatchShape((64, 32), torch.tensor([[1, 8, 8]]))
    text = BatchShape((64, 32), torch.zeros(0, 3, dtype=torch.int64))
    config = VARIANTS["9b"]
    mapping = weight_map(config)

    def flops(*words: str, of: BatchShape = shape) -> float:
        return FlopCount.of(config, Trained(frozen_names(mapping, GROUPS, words))).of_batch(of)

    def vision(*words: str) -> float:
        return flops(*words) - flops(*words, of=text)

    assert flops() > flops("vision") > flops("vision", "projector")
    # Whole: twice backward for each forward, less the pixels' gradients, which nobody asks for.
    assert vision() / vision("vision", "projector") == pytest.approx(3, rel=0.01)
    # The decoder's weights aside, the gradients still go through it to the projector.
    assert 0.6 < flops("language", "embeddings", of=text) / flops(of=text) < 0.75
    # Nothing upstream of a decoder that starts at its last layer: forward alone but for that, the head and MTP.
    front = flops("embeddings", "vision", "projector", r"language_model\.layers\.(\d|[12]\d|30)\.", of=text)
    assert 1 / 3 < front / flops(of=text) < 0.55


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vison"], "matches no tensor"),
        (["q_proj"], "match all of"),
        (["("], "nor a regular expression"),
        (list(GROUPS), "nothing to train"),
    ],
)
def test_freeze_refuses(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        frozen_names(weight_map(DENSE), GROUPS, words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vision"], "GROUP=FACTOR"),
        (["vision=0"], "above 0"),
        (["vision=nan"], "above 0"),
        (["vision=0.1", "blocks=2"], "has a factor"),
        (["projector=2"], "holds all of it still"),
    ],
)
def test_lr_mult_refuses(words: list[str], said: str) -> None:
    mapping = weight_map(DENSE)
    with pytest.raises(ValueError, match=said):
        rate_factors(mapping, GROUPS, words, frozen_names(mapping, GROUPS, ["projector"]))


def test_an_architecture_without_a_table_refuses() -> None:
    from dataclasses import replace

    from runtime.checkpoints import Start
    from weights.adapter_check import tuning_refusals

    spec = replace(MODEL_REGISTRY["qwen35_vl"], hf_weights=None)
    args = Namespace(freeze=["vision"], lr_mult=None, model_arch="yours", lora_rank=None, load=None, finetune=False)
    found = tuning_refusals(args, {"freeze": ["vision"]}, spec, DENSE, Start())
    assert found == ["--freeze: yours has no table of HuggingFace weights"]


def test_resuming_with_other_frozen_parts_is_refused(tmp_path: Path) -> None:
    import json

    from runtime.checkpoints import Start
    from weights.adapter_check import tuning_refusals

    spec = MODEL_REGISTRY["qwen35_vl"]
    (tmp_path / "arguments.json").write_text(json.dumps({"arguments": {"freeze": ["vision"]}}))
    start = Start(folder=tmp_path / "iter_0000002", step=2)

    def refusals(freeze: list[str] | None, *, finetune: bool = False) -> list[str]:
        args = Namespace(freeze=freeze, lr_mult=None, lora_rank=None, decoupled_lr=None, load=str(tmp_path))
        vars(args).update(finetune=finetune, no_load_optim=None)
        return tuning_refusals(args, {}, spec, DENSE, start)

    assert refusals(["vision"]) == refusals(["^model.visual.(?!merger.)"]) == []
    assert refusals(None, finetune=True) == []
    (problem,) = refusals(["vision", "projector"])
    assert "its run had --freeze vision" in problem and "--finetune" in problem

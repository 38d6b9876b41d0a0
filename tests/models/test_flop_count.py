"""FLOPs of a run against those that torch counts while it runs: of the products with weights, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Size, nn
from torch.utils.flop_counter import FlopCounterMode

import arguments
from models.adapters import trained_of_args
from models.common.lora import LoRA
from models.common.moe import PerTokenLossRouter
from models.qwen35_vl import flops
from models.qwen35_vl.configuration import VARIANTS
from models.spec import BatchShape
from tests.build_model import build_model, command_line_of
from tests.models.test_hf_parity import DOCUMENTS, make_sample, our_inputs

pytestmark = pytest.mark.usefixtures("single_rank")

FIRST_LAYERS = ("--freeze", "vision", "projector", "embeddings", r"language_model\.layers\.[01]\.")
LORA = ("--lora-rank", "4")
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


def added_product(total: Size, left: Size, right: Size, **_: object) -> int:
    """Of `addmm_`, which torch's counter doesn't know."""
    return flops.MULTIPLY_ADD * left[0] * left[1] * right[1]


def without_kernels(count: flops.FlopCount) -> flops.FlopCount:
    """Of attention, how many pairs are computed is the kernel's choice."""
    macs = list(count.macs)
    macs[flops.PAIR] = macs[flops.PATCH_PAIR] = 0
    return replace(count, macs=tuple(macs))


def spread(model: nn.Module) -> int:
    """Multiply-adds of a token with the zeros between the rows of B, where one product serves several modules."""
    adapters = (module for module in model.modules() if isinstance(module, LoRA))
    return sum(adapter.placed_b().numel() - adapter.lora_B.numel() for adapter in adapters)


def frozen_routers(model: nn.Module) -> int:
    """Multiply-adds of a token for weight gradients that megatron-core's routers compute for nobody."""
    routers = (module.weight for module in model.modules() if isinstance(module, PerTokenLossRouter))
    return sum(weight.numel() for weight in routers if not weight.requires_grad)


@pytest.fixture
def products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """GatedDeltaNet's recurrence and convolution are no products with a weight."""
    products = flops._gated_delta_net

    def kept(*args: object) -> object:
        for product in products(*args):
            is_kernel = product.weight is None or ".conv1d." in product.weight
            yield replace(product, macs=0) if is_kernel else product

    monkeypatch.setattr(flops, "_gated_delta_net", kept)


@pytest.mark.usefixtures("products_alone")
@pytest.mark.parametrize(
    ("variant", "flags"),
    [
        ("tiny", ()),
        pytest.param("tiny", ("--freeze", "vision"), marks=pytest.mark.slow),
        ("tiny", FIRST_LAYERS),
        ("tiny", LORA),
        pytest.param("tiny", (*LORA, "--lora-vision"), marks=pytest.mark.slow),
        ("tiny_moe", ()),
        pytest.param("tiny_moe", FIRST_LAYERS, marks=pytest.mark.slow),
        ("tiny_moe", (*LORA, "--lora-experts")),
    ],
)
def test_torch_counts_the_same(variant: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    """To the operation."""
    architecture = VARIANTS[variant]
    # Without kept logits their product is computed again in the backward pass.
    flags = (*flags, "--keep-logits")
    command_line = command_line_of(architecture, tmp_path, *flags)
    what = trained_of_args(arguments.resolve(command_line), command_line.spec, command_line.config)
    model = build_model(architecture, tmp_path, torch.float32, *flags)
    sample = make_sample(architecture, DOCUMENTS["three_images"], torch.float32)
    inputs, batch = our_inputs(architecture, sample)
    rows = batch.trained_rows[0]
    model.step.mean_trained_tokens = 1.0
    for name, module in model.named_modules():
        if name.endswith("out_proj"):
            # With a frozen weight torch takes a batched product for rows with odd strides, which counts as attention's.
            module.register_forward_pre_hook(
                lambda _, inputs: (inputs[0].clone(memory_format=torch.contiguous_format), *inputs[1:])
            )
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
        losses = model(**inputs, labels=batch.labels, loss_mask=batch.loss_mask, trained_rows=rows)
        (losses * batch.loss_mask).sum().backward()
    found = counter.get_flop_counts()["Global"]
    measured = sum(found.get(operation, 0) for operation in PRODUCTS)
    tokens = len(sample.input_ids)
    # Rows behind the trained ones fill up what the output layer is given.
    shape = BatchShape((tokens,), sample.grid_thw, trained=(rows.size(1),) * len(rows))
    expected = without_kernels(flops.FlopCount.of(architecture, what)).of_batch(shape)
    unwanted = 3 * spread(model) + frozen_routers(model) if what.adapters else 0
    assert measured == expected + flops.MULTIPLY_ADD * tokens * unwanted

"""On a GPU: micro-batches as CUDA graphs train as those without, also when a graph runs on other documents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.qwen35_vl.configuration import VARIANTS, Qwen35VLConfig
from tests.build_model import build_model
from tests.errors import relative_error
from tests.models.test_hf_parity import make_sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("single_rank"),
]

# Head sizes that the GPU kernels are made for.
_HEADS = {"kv_channels": 64, "mrope_section": (3, 3, 2), "linear_key_head_dim": 64, "linear_value_head_dim": 64}
ARCHITECTURES = {name: VARIANTS[name].replace(**_HEADS, vocab_size=1024) for name in ("tiny", "tiny_moe")}
# Large enough for the routers' auxiliary loss to show in their gradients.
FLAGS = ("--transformer-impl", "transformer_engine", "--bf16", "--moe-aux-loss-coeff", "0.1")
PACKS = (
    ([[1, 4, 4], [1, 8, 6]], [], [[1, 2, 10]]),
    ([[1, 6, 8]], [[1, 2, 2], [1, 4, 4]]),
    ([], [], [], [[1, 10, 4]], []),
)
# Kernels may add in any order in backward; losses are compared to the bit.
TOLERANCE = 5e-3


def make_batch(architecture: Qwen35VLConfig, grids: tuple):
    from data.batch import collate, flatten, unflatten
    from data.static_shapes import StaticShapes, pad_batch
    from models.qwen35_vl.inputs import Qwen35VLInputs

    inputs = Qwen35VLInputs(architecture)
    batch = collate(
        [[make_sample(architecture, of_document, torch.bfloat16) for of_document in grids]],
        inputs,
        alignment=1,
        packed=True,
        seq_len=512,
        dtype=torch.bfloat16,
        pad_token_id=0,
    )
    padded = pad_batch(batch, StaticShapes(tokens=640, documents=8, patches=128, frames=12), inputs, 0)
    assert padded is not batch
    flat = flatten(padded)
    return unflatten(type(flat)(flat.header, flat.buffer.cuda()))


def step(model: nn.Module, run, batch) -> dict[str, Tensor]:
    for parameter in model.parameters():
        parameter.grad, parameter.grad_added_to_main_grad = None, False
        parameter.main_grad = parameter.main_grad.zero_() if hasattr(parameter, "main_grad") else new_grad(parameter)
    model.step.mean_trained_tokens = batch.stats.mean_trained_tokens
    losses = run(model, batch)
    (losses * batch.loss_mask).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        left = None if parameter.grad_added_to_main_grad else parameter.grad  # as Megatron's hook sees it
        gradients[name] = parameter.main_grad + (0 if left is None else left.float())
    return {"losses": losses.detach().clone(), **gradients}


def new_grad(parameter: nn.Parameter) -> Tensor:
    return torch.zeros(parameter.shape, device="cuda")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_graph_runs_on_other_documents(name: str, fused: bool, tmp_path: Path) -> None:
    from forward_step import MicroBatchGraphs, model_inputs

    architecture = ARCHITECTURES[name]
    flags = (*FLAGS, "--fuse-weight-gradients") if fused else FLAGS
    model = build_model(architecture, tmp_path, torch.bfloat16, *flags).cuda().to(torch.bfloat16).train()
    batches = [make_batch(architecture, grids) for grids in PACKS]
    expected = [step(model, lambda model, batch: model(**model_inputs(batch)), batch) for batch in batches]
    graphs = MicroBatchGraphs()
    for _ in range(MicroBatchGraphs.WARM_UP):
        step(model, graphs.run, batches[0])
    for turn in (0, 1, 2, 1):
        actual = step(model, graphs.run, batches[turn])
        shapes = {batch.trained_rows.shape for batch in batches}
        assert len(graphs._graphs) <= len(shapes)
        assert torch.equal(actual["losses"], expected[turn]["losses"]), turn
        errors = {name: relative_error(actual[name], value) for name, value in expected[turn].items()}
        assert max(errors.values()) < TOLERANCE, (turn, errors)
    assert graphs._graphs
    assert not torch.equal(expected[1]["losses"], expected[2]["losses"])

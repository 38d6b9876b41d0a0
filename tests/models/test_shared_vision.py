"""Images shared by two context-parallel ranks against every rank encoding all of them, on the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.qwen35_vl.configuration import VARIANTS
from proofs.float64 import float64
from tests.build_decoder import perturb
from tests.build_model import build_model
from tests.errors import relative_error
from tests.models.test_hf_parity import make_sample
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.heavy

ARCHITECTURE = VARIANTS["tiny_moe"]
RANKS = 2
SEQ_LEN = 192
# Grids of each document's images, and the patches that the two ranks then encode.
CASES: dict[str, tuple[list[list[list[int]]], list[int]]] = {
    "three_images": ([[[1, 6, 10]], [[1, 4, 4], [1, 8, 6]]], [60, 64]),
    "one_image": ([[], [[1, 4, 6]]], [24, 4]),
    "none": ([[], []], [4, 4]),
    "a_huge_one": ([[[1, 4, 4], [1, 16, 16]], [[1, 2, 2]], [[1, 6, 4]]], [256, 44]),
    "video": ([[[3, 4, 4], [1, 4, 8]], [[2, 4, 4]]], [48, 64]),
}
TOLERANCE = 1e-12  # measured: 1.1e-14 at worst


def run(model: nn.Module, grids: list[list[list[int]]], *, packed: bool, shared: bool) -> tuple[list[int], dict]:
    """One micro-batch: patches that each rank encoded; loss and gradients by name, summed over the ranks."""
    from megatron.core import mpu

    from data.batch import collate, partition_batch
    from forward_step import model_inputs
    from models.qwen35_vl.inputs import Qwen35VLInputs

    group = mpu.get_context_parallel_group()
    batch = collate(
        [[make_sample(ARCHITECTURE, document, torch.float64)] for document in grids],
        Qwen35VLInputs(ARCHITECTURE),
        alignment=2 * RANKS,
        packed=packed,
        seq_len=SEQ_LEN,
        dtype=torch.float64,
        pad_token_id=0,
        context_ranks=RANKS,
        vision_ranks=RANKS if shared else 1,
    )
    batch = partition_batch(batch, group)
    model.step.mean_trained_tokens = batch.stats.mean_trained_tokens
    encoded: list[int] = []
    hook = model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(kwargs["pixel_values"].size(0)), with_kwargs=True
    )
    model.zero_grad()
    loss = (model(**model_inputs(batch)) * batch.loss_mask).sum()
    loss.backward()
    hook.remove()
    results: dict[str, Tensor] = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        results[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    for tensor in results.values():
        torch.distributed.all_reduce(tensor, group=group)
    of_ranks: list = [None] * RANKS
    torch.distributed.all_gather_object(of_ranks, encoded, group=group)
    assert all(len(calls) == 1 for calls in of_ranks), of_ranks
    return [calls[0] for calls in of_ranks], results


def compare(folder: Path) -> None:
    rank = torch.distributed.get_rank()
    with float64():
        model = build_model(ARCHITECTURE, folder, torch.float64, "--context-parallel-size", str(RANKS))
        perturb(model)
        errors: dict[str, float] = {}
        for case, (grids, patches) in CASES.items():
            for packed in (True, False) if case == "three_images" else (True,):
                together, expected = run(model, grids, packed=packed, shared=False)
                shared, actual = run(model, grids, packed=packed, shared=True)
                assert shared == patches, (case, shared)
                total = sum(grid[0] * grid[1] * grid[2] for document in grids for grid in document)
                assert together == [max(total, 4)] * RANKS
                is_vision = [name.startswith("vision_model.") for name in expected]
                assert sum(is_vision) > 20
                for name, tensor in expected.items():
                    if "vision_model." not in name:
                        assert tensor.norm() > 0, name
                    elif case == "none":
                        assert not tensor.any() and not actual[name].any(), name
                key = f"{case} {'THD' if packed else 'BSHD'}"
                errors[key] = max(relative_error(actual[name], tensor) for name, tensor in expected.items())
    if rank == 0:
        print(*(f"{key}: worst relative error {error:.1e}" for key, error in errors.items()), sep="\n", flush=True)
    assert max(errors.values()) < TOLERANCE, errors


def test_shared_vision_equals_redundant_vision(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Loss and every parameter's gradient, summed over the ranks, in float64."""
    run_on_ranks(compare, RANKS, tmp_path, context_parallel_size=RANKS)

"""Batches padded to static shapes train the same: losses and every gradient, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.backends.documents import chunk_indices
from models.qwen35_vl.configuration import VARIANTS
from proofs.float64 import float64
from tests.build_model import build_model
from tests.errors import relative_error
from tests.models.test_hf_parity import make_sample

pytestmark = pytest.mark.usefixtures("single_rank")

ARCHITECTURE = VARIANTS["tiny"]
GRIDS = ([[1, 4, 4], [1, 8, 6]], [], [[1, 2, 10]])
TOLERANCE = 1e-10


def test_chunks_of_documents() -> None:
    chunks = chunk_indices([100, 0, 64, 1], 64)
    assert chunks.tolist() == [[0, 0], [0, 1], [2, 0], [3, 0]]
    assert chunks.dtype == torch.int32


def make_batch():
    from data.batch import collate
    from models.qwen35_vl.inputs import Qwen35VLInputs

    return collate(
        [[make_sample(ARCHITECTURE, grids, torch.float64) for grids in GRIDS]],
        Qwen35VLInputs(ARCHITECTURE),
        alignment=1,
        packed=True,
        seq_len=512,
        dtype=torch.float64,
        pad_token_id=3,
    )


def pad(batch, **changes: int):
    from data.static_shapes import StaticShapes, pad_batch
    from models.qwen35_vl.inputs import Qwen35VLInputs

    sizes = {"tokens": 320, "documents": 6, "patches": 240, "frames": 8} | changes
    return pad_batch(batch, StaticShapes(**sizes), Qwen35VLInputs(ARCHITECTURE), 3)


def test_every_batch_has_one_shape() -> None:
    from data.batch import flatten, tensors_of, unflatten

    whole = make_batch()
    padded = pad(whole)
    assert padded.input_ids.shape == padded.labels.shape == padded.loss_mask.shape == (1, 320)
    assert padded.cu_seqlens.tolist() == [*whole.cu_seqlens.tolist(), 320, 320, 320]
    assert padded.chunk_indices.shape == (320 // 64 + 6, 2)
    assert padded.trained_rows.size(2) % (320 // 8) == 0
    vision = padded.vision[0]
    assert vision["pixel_values"].shape[0] == vision["position_index"].shape[0] == 240
    assert vision["cu_seqlens"].tolist() == [0, 16, 64, 84, 132, 180, 228, 240, 240]
    assert (padded.max_seqlen, vision["max_seqlen"]) == (320, 240)
    assert padded.stats.padding_tokens == 320 - int(whole.cu_seqlens[-1])
    again = tensors_of(unflatten(flatten(padded)))
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors_of(padded).items())


@pytest.mark.parametrize("size", ["tokens", "documents", "patches", "frames"])
def test_what_does_not_fit_stays_as_it_is(size: str) -> None:
    whole = make_batch()
    assert pad(whole, **{size: 3}) is whole


def run(model, batch) -> dict[str, Tensor]:
    from forward_step import model_inputs

    model.zero_grad()
    with float64():
        losses = model(**model_inputs(batch)) * batch.loss_mask
        losses.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": losses.detach(), **gradients}


def test_padding_changes_no_gradient(tmp_path: Path) -> None:
    with float64():
        model = build_model(ARCHITECTURE, tmp_path, torch.float64).double().train()
    whole = make_batch()
    expected, actual = run(model, whole), run(model, pad(whole))
    length = expected["losses"].size(1)
    assert actual["losses"][:, length:].count_nonzero() == 0
    actual["losses"] = actual["losses"][:, :length]
    errors = {name: relative_error(actual[name], value) for name, value in expected.items()}
    assert len(errors) > 80
    assert max(errors.values()) < TOLERANCE, errors

"""The whole model against transformers': logits, loss, and the gradient of every parameter.

The model is built as training builds it, from flags, and fed as training feeds it, through `data.batch.collate`.
float64 proves the meaning; float32 is held to the noise between transformers' own two ways to compute GatedDeltaNet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor, nn

from models.qwen35_vl.configuration import VARIANTS, Qwen35VLConfig
from proofs.float64 import float64
from tests.build_model import build_model
from tests.errors import relative_error
from tests.hf_reference import build_hf, load_hf_folder, modeling, token_types

pytestmark = pytest.mark.usefixtures("single_rank")

# transformers has no MTP; tests/models/test_mtp.py proves ours.
DENSE, MOE = (VARIANTS[name].replace(mtp_num_layers=0) for name in ("tiny", "tiny_moe"))
ARCHITECTURES = {
    "dense_tied": DENSE,
    "dense_untied": DENSE.replace(tie_word_embeddings=False),
    "moe_tied": MOE.replace(tie_word_embeddings=True),
    "moe_untied": MOE,
    "dense_text": DENSE.language_model(),
    "moe_text": MOE.language_model(),
}
# Grids of the images of a document; all documents are longer than one chunk (64) of GatedDeltaNet's kernel.
DOCUMENTS = {"text": [], "one_image": [[1, 6, 10]], "three_images": [[1, 4, 4], [1, 8, 6], [1, 2, 10]]}


@dataclass
class Result:
    """logits [1, S, vocabulary], mean loss of the trained tokens, gradient by HF name."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def make_sample(architecture: Qwen35VLConfig, grids: list[list[int]], dtype: torch.dtype):
    """A document of random words around images; the second half of its text is trained."""
    from data.sample import Sample

    generator = torch.Generator().manual_seed(len(grids))
    ids, vision = architecture.token_ids, architecture.vision
    features = [grid[0] * grid[1] * grid[2] // vision.spatial_merge_size**2 for grid in grids]
    tokens = torch.randint(1, 1000, (23,), generator=generator).tolist()
    for count in features:
        words = torch.randint(1, 1000, (11,), generator=generator).tolist()
        tokens += [ids.vision_start, *[ids.image] * count, ids.vision_end, *words]
    tokens += torch.randint(1, 1000, (50,), generator=generator).tolist()
    input_ids = torch.tensor(tokens)
    trained = (torch.arange(len(tokens)) > len(tokens) // 2) & (input_ids < 1000)
    patch_values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(
        sum(features) * vision.spatial_merge_size**2, patch_values, generator=generator, dtype=torch.float64
    )
    grid_thw = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
    return Sample(input_ids, trained, pixels.to(dtype), grid_thw, "parity")


def our_inputs(architecture: Qwen35VLConfig, sample):
    """A batch of one document: the model's arguments, and the batch for labels and mask."""
    from data.batch import collate
    from models.qwen35_vl.inputs import Qwen35VLInputs

    batch = collate(
        [[sample]],
        Qwen35VLInputs(architecture),
        alignment=1,
        packed=False,
        seq_len=len(sample.input_ids),
        dtype=sample.pixel_values.dtype,
        pad_token_id=0,
        with_vision=not architecture.language_model_only,
    )
    inputs = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "vision_index": batch.vision_index,
        "vision": batch.vision[0] if batch.vision else None,
        "padding_mask": batch.padding_mask,
    }
    return inputs, batch


def run_ours(model: nn.Module, architecture: Qwen35VLConfig, sample) -> Result:
    from tests.hf_states import export_hf_state

    inputs, batch = our_inputs(architecture, sample)
    logits = model(**inputs).detach()
    losses = model(**inputs, labels=batch.labels, loss_mask=batch.loss_mask, trained_rows=batch.trained_rows[0])
    loss = (losses * batch.loss_mask).sum() / batch.loss_mask.sum()
    loss.backward()
    gradients = export_hf_state(model, architecture, value=lambda parameter: parameter.grad)
    return Result(logits, loss.detach(), gradients)


def run_hf(model: nn.Module, architecture: Qwen35VLConfig, sample) -> Result:
    input_ids = sample.input_ids[None]
    images = {}
    if len(sample.grid_thw):
        images = {
            "pixel_values": sample.pixel_values,
            "image_grid_thw": sample.grid_thw,
            "mm_token_type_ids": token_types(input_ids, architecture),
        }
    model.zero_grad()
    labels = torch.where(sample.trained, sample.input_ids, -100)[None]
    output = model(input_ids=input_ids, labels=labels, use_cache=False, **images)
    output.loss.backward()
    # Without an image transformers leaves the ViT out; ours runs it on a dummy and gets zeros.
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    return Result(output.logits.detach(), output.loss.detach(), gradients)


def load(model: nn.Module, reference: nn.Module, architecture: Qwen35VLConfig) -> None:
    from tests.hf_states import load_hf_state

    load_hf_state(model, reference.state_dict(), architecture)


@contextmanager
def recurrent_rule(architecture: Qwen35VLConfig) -> Iterator[None]:
    """transformers computes GatedDeltaNet step by step instead of by chunks."""
    module = modeling(architecture)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch_chunk_gated_delta_rule", module.torch_recurrent_gated_delta_rule)
        yield


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_loss_and_gradients_equal_hf_in_float64(name: str, tmp_path: Path):
    """Measured: logits 7e-15, loss 2e-16, worst gradient 2.3e-13."""
    architecture = ARCHITECTURES[name]
    with float64():
        reference = build_hf(architecture).double()
        model = build_model(architecture, tmp_path, torch.float64)
        load(model, reference, architecture)
        for grids in [[]] if architecture.language_model_only else DOCUMENTS.values():
            sample = make_sample(architecture, grids, torch.float64)
            expected, actual = (
                run_hf(reference, architecture, sample),
                run_ours(model, architecture, sample),
            )
            model.zero_grad()
            assert relative_error(actual.logits, expected.logits) < 1e-9
            assert relative_error(actual.loss, expected.loss) < 1e-9
            assert actual.gradients.keys() == expected.gradients.keys()
            for tensor, gradient in expected.gradients.items():
                if grids or not tensor.startswith("model.visual."):
                    assert gradient.norm() > 0, tensor
                assert relative_error(actual.gradients[tensor], gradient) < 1e-7, tensor


@pytest.mark.parametrize(
    "name",
    ["dense_tied", "moe_untied", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dense_text", "moe_text"))],
)
def test_transformers_gets_the_same_logits_from_a_trained_and_saved_model(name: str, tmp_path: Path):
    """Three steps of Adam, then --save-hf's folder in float64 through from_pretrained. Measured: 5.5e-16."""
    import arguments
    from models.qwen35_vl.hf_weights import weight_map
    from tests.build_model import command_line_of
    from weights.job import HfExporter, save_hf
    from weights.origin import HfOrigin, write_hf_folder

    architecture = ARCHITECTURES[name].replace(mtp_num_layers=1)
    with float64():
        grids = [] if architecture.language_model_only else DOCUMENTS["one_image"]
        sample = make_sample(architecture, grids, torch.float64)
        model = build_model(architecture, tmp_path, torch.float64)
        before = run_ours(model, architecture, sample).logits
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.step()
            model.zero_grad()
            trained = run_ours(model, architecture, sample).logits
        assert relative_error(trained, before) > 0.1
        record = dict.fromkeys(weight_map(architecture).tensors, "F64")
        command_line = command_line_of(architecture, tmp_path, "--max-shard-size", "2MB")
        exporter = HfExporter(
            arguments.resolve(command_line),
            command_line.spec,
            command_line.config,
            record,
            lambda folder: write_hf_folder(
                folder, architecture.to_hf(), None, HfOrigin(record=record), with_record=False
            ),
        )
        exporter.attach([model])
        save_hf(exporter, tmp_path / "saved")
        reference = load_hf_folder(architecture, tmp_path / "saved")
        assert relative_error(trained, run_hf(reference, architecture, sample).logits) < 1e-13


@pytest.mark.parametrize("name", ["dense_untied", "moe_untied"])
def test_float32_is_within_the_noise_of_hf(name: str, tmp_path: Path):
    """Errors against float64: ours against those of transformers' own chunked and recurrent rules.

    Measured over all architectures and two seeds: logits 1.3e-6 to 1.9e-6 (theirs 1.4e-6 to 2.4e-6), gradients'
    median 4e-6 to 1.4e-5 (5e-6 to 1.1e-5), worst gradient 1.2e-5 to 6.6e-5 (1.5e-5 to 3.1e-5).
    """
    architecture = ARCHITECTURES[name]
    sample = make_sample(architecture, DOCUMENTS["three_images"], torch.float32)
    reference = build_hf(architecture)
    model = build_model(architecture, tmp_path, torch.float32)
    load(model, reference, architecture)
    actual = run_ours(model, architecture, sample)
    in_float32 = [run_hf(reference, architecture, sample)]
    with recurrent_rule(architecture):
        in_float32.append(run_hf(reference, architecture, sample))
    with float64():
        exact_sample = make_sample(architecture, DOCUMENTS["three_images"], torch.float64)
        exact = run_hf(reference.double(), architecture, exact_sample)

    ours = errors(actual, exact)
    noise = [max(pair) for pair in zip(*(errors(result, exact) for result in in_float32), strict=True)]
    for error, allowed, factor in zip(ours, noise, (2, 2, 4), strict=True):
        assert error < factor * allowed
    assert relative_error(actual.loss, exact.loss) < 1e-6


def errors(result: Result, exact: Result) -> tuple[float, float, float]:
    """Relative errors of the logits, and of the gradients: their median and the worst."""
    gradients = [relative_error(result.gradients[name], gradient) for name, gradient in exact.gradients.items()]
    return relative_error(result.logits, exact.logits), median(gradients), max(gradients)

"""Mock data: any size, the same in every run, no special id by accident."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from toy_data import ToyInputs

from data import DATASET_PROVIDERS
from data.mock import MockDataset


class Inputs(ToyInputs):
    image_token_id = 1000
    patch_size = 16
    patch_dim = 3 * 2 * 16 * 16


def build(split: str = "train", **changes: object) -> MockDataset:
    arguments = {
        "seed": 1,
        "seq_length": 64,
        "image_size": 128,
        "image_seq_length": 256,
        "params_dtype": torch.bfloat16,
        "language_model_only": False,
    } | changes
    return DATASET_PROVIDERS["mock"].build(Namespace(**arguments), split, None, Inputs())


def test_sample_has_the_sizes_asked_for() -> None:
    dataset = build()
    sample = dataset[0]
    assert sample.grid_thw.tolist() == [[1, 8, 8]]  # 128 pixels are 8 patches of 16; a still image has T=1
    assert sample.pixel_values.shape == (64, 1536)
    assert sample.pixel_values.dtype == torch.bfloat16
    placeholders = (sample.input_ids == 1000).nonzero().flatten().tolist()
    assert placeholders == list(range(24, 40))  # 64 patches merge to 16 tokens, in the middle
    assert sample.trained.tolist() == (sample.input_ids != 1000).tolist()
    assert (dataset.size(0).tokens, dataset.size(0).patches) == (len(sample.input_ids), 64)


def test_samples_depend_on_index_split_and_seed_alone() -> None:
    first = build()[3]
    again = build()[3]
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.pixel_values, again.pixel_values)
    for other in (build()[4], build("validation")[3], build(seed=2)[3]):
        assert not torch.equal(first.input_ids, other.input_ids)
        assert not torch.equal(first.pixel_values, other.pixel_values)


def test_without_pixels() -> None:
    sample, bare = build()[3], build().without_pixels()[3]
    assert bare.pixel_values.shape == (0, 1536)
    assert torch.equal(bare.input_ids, sample.input_ids) and torch.equal(bare.grid_thw, sample.grid_thw)


def test_the_default_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    build()[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_text_ids_are_plain() -> None:
    ids = torch.cat([build(image_seq_length=0)[index].input_ids for index in range(200)])
    assert ids.min() == 0 and ids.max() == 899  # special ids are the last of a vocabulary, beside the image's


def test_text_alone() -> None:
    sample = build(image_seq_length=0)[0]
    assert sample.grid_thw.shape == (0, 3)
    assert sample.pixel_values.shape == (0, 1536)
    assert sample.trained.all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 100}, "--image-size 100: .* multiple of 32"),
        ({"image_size": 256}, "--image-size 256: its 64 image tokens don't fit a sample of 64 tokens"),
        ({"image_seq_length": 15}, "--image-size 128 makes 16 image tokens and --image-seq-length allows 15"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)

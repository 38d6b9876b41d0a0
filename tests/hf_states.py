"""HuggingFace tensors into and out of a model that is built in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from models.qwen35_vl.configuration import Qwen35VLConfig
from models.qwen35_vl.hf_weights import ExpertStorage, canonical_parameters, weight_map
from models.trained import is_adapter
from models.weight_map import Rank, Sliceable, TensorSlice, WeightMap, assemble, fill, shares


def load_hf_state(
    model: nn.Module,
    hf_state: Mapping[str, Sliceable],
    config: Qwen35VLConfig,
    storage: ExpertStorage | None = None,
    prefix: str = "",
) -> None:
    """Fill this rank's parameters from HF tensors, reading only the slices that the rank owns.

    Args:
        model, prefix: see `canonical_parameters`.
        hf_state: HF name -> tensor or lazy slice; the whole model's (the whole part's, with a prefix) on every rank.
        storage: how experts are stored; None reads it off the names.

    Raises:
        WeightMismatch: see `models.weight_map.fill`.
    """
    mapping = weight_map(config, storage or ExpertStorage.detect(hf_state)).part(prefix)
    named = canonical_parameters(config, model, prefix)
    parameters = ((name, parameter) for name, parameter in named if not is_adapter(name))
    fill(mapping, parameters, Rank.of(model.pg_collection), hf_state)


def hf_shares(
    model: nn.Module,
    config: Qwen35VLConfig,
    mapping: WeightMap,
    value: Callable[[nn.Parameter], Tensor] | None = None,
    prefix: str = "",
) -> Iterator[tuple[TensorSlice, Tensor]]:
    """This rank's share of the HF tensors; `models.weight_map.assemble` puts those of all ranks together."""
    return shares(mapping, canonical_parameters(config, model, prefix), Rank.of(model.pg_collection), value)


def export_hf_state(
    model: nn.Module,
    config: Qwen35VLConfig,
    storage: ExpertStorage | None = None,
    value: Callable[[nn.Parameter], Tensor] | None = None,
    prefix: str = "",
) -> dict[str, Tensor]:
    """The HF tensors of a model that lies on this rank alone.

    Args:
        model, prefix: see `canonical_parameters`.
        storage: how to store experts; stacked if None.
        value: what to export of a parameter, `lambda parameter: parameter.grad` for its gradient; itself if None.

    Raises:
        WeightMismatch: the model isn't whole on this rank, or has parameters that the mapping doesn't know.
    """
    mapping = weight_map(config, storage).part(prefix)
    return assemble(mapping, hf_shares(model, config, mapping, value, prefix))

"""Which parameters are trained, and how fast: `--freeze` and `--lr-mult`, by HuggingFace names.

A word is the name of one of the architecture's groups, or a regular expression that is searched for in the names of
HuggingFace's tensors. Torch-free to import, for the launcher's preflight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from models.weight_map import WeightMap

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Trained:
    """What a run trains.

    frozen: canonical names of the parameters that it doesn't.
    adapters: multiply-adds of LoRA's A and B beside each weight, for whatever that is multiplied by; nothing but they
        is trained where there are any.
    """

    frozen: frozenset[str] = frozenset()
    adapters: Mapping[str, tuple[int, int]] = field(default_factory=dict)


EVERYTHING = Trained()


def selected(mapping: WeightMap, groups: Mapping[str, str], word: str) -> frozenset[str]:
    """Canonical names of the parameters that a group's name or a regular expression means.

    Args:
        groups: name -> regular expression; see `models.spec.HfWeights`.

    Raises:
        ValueError: no regular expression, one that matches nothing, or one that matches a part of a parameter.
    """
    try:
        pattern = re.compile(groups.get(word, word))
    except re.error as error:
        known = ", ".join(groups)
        raise ValueError(f"{word}: neither a group ({known}) nor a regular expression: {error}") from error
    found = set()
    for name, source in mapping.sources.items():
        tensors = dict.fromkeys(run.name for run in source.row_ranges)
        matching = [tensor for tensor in tensors if pattern.search(tensor)]
        if not matching:
            continue
        if len(matching) < len(tensors):
            rest = next(tensor for tensor in tensors if tensor not in matching)
            raise ValueError(
                f"{word}: matches {matching[0]} and not {rest}; training keeps both in one parameter, so match all of "
                f"{', '.join(tensors)}, or none"
            )
        found.add(name)
    if not found:
        there = ", ".join(name for name, regex in groups.items() if _finds(mapping, regex))
        raise ValueError(f"{word}: matches no tensor of the model; there are the groups {there}")
    return frozenset(found)


def _finds(mapping: WeightMap, regex: str) -> bool:
    return any(re.search(regex, tensor) for tensor in mapping.tensors)


def frozen_names(mapping: WeightMap, groups: Mapping[str, str], words: Iterable[str]) -> frozenset[str]:
    """Canonical names of what `--freeze` holds still; empty without words.

    Raises:
        ValueError: see `selected`; or nothing is left to train.
    """
    words = list(words)
    frozen: frozenset[str] = frozenset().union(*(selected(mapping, groups, word) for word in words))
    if len(frozen) == len(mapping.sources):
        raise ValueError(f"{' '.join(words)}: freezes the whole model, so there is nothing to train; leave one out")
    return frozen


def rate_factors(
    mapping: WeightMap, groups: Mapping[str, str], words: Iterable[str], frozen: frozenset[str]
) -> dict[str, float]:
    """Canonical name -> factor of its learning rates, for the parameters that `--lr-mult` names.

    Args:
        words: GROUP=FACTOR each; the group as in `selected`.
        frozen: from `frozen_names`.

    Raises:
        ValueError: not of that form, a factor that isn't above 0, two factors for one parameter, a frozen group.
    """
    factors: dict[str, float] = {}
    for word in words:
        group, _, number = word.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = 0.0
        if not group or not 0 < factor < float("inf"):
            raise ValueError(
                f"{word}: expected GROUP=FACTOR with a factor above 0, vision=0.1; --freeze trains nothing"
            )
        names = selected(mapping, groups, group)
        if names <= frozen:
            raise ValueError(f"{word}: --freeze holds all of it still; leave one out")
        if again := sorted(names & factors.keys()):
            tensor = next(mapping.sources[again[0]].row_ranges).name
            raise ValueError(f"{word}: an earlier --lr-mult has a factor for {tensor} already")
        factors |= dict.fromkeys(names, factor)
    return factors


def freeze(parameters: Iterable[tuple[str, nn.Parameter]], frozen: frozenset[str]) -> None:
    """Stop training the parameters whose canonical names are frozen; before Megatron wraps the model."""
    for name, parameter in parameters:
        if name in frozen:
            parameter.requires_grad_(False)


def is_adapter(name: str) -> bool:
    """Whether a parameter's canonical name, its name in the model or in a checkpoint is of a LoRA adapter."""
    return ".adapter." in name


def trains(module: nn.Module) -> bool:
    """Whether any parameter of a module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


# Names of a `MultimodalModel`'s parameters in front of any layer of the decoder, and the decoder's layers.
_IN_FRONT = re.compile(r"vision_model\.|language_model\.embedding\.")
_LAYER = re.compile(r"language_model\.decoder\.layers\.(\d+)\.")


def trains_in_front(what: Trained, names: Iterable[str], layer: int) -> bool:
    """Whether anything is trained that the input of a decoder's layer depends on.

    Args:
        names: canonical names of all parameters.
        layer: counted over all pipeline stages; 0 is the first.
    """
    trained = what.adapters.keys() if what.adapters else set(names) - what.frozen
    layers = (int(found[1]) for name in trained if (found := _LAYER.match(name)))
    return any(number < layer for number in layers) or any(_IN_FRONT.match(name) for name in trained)

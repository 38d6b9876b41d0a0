"""A HuggingFace folder against an architecture's table, before anything heavy: imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import MODEL_REGISTRY, ModelConfig, ModelSpec
from models.spec import HfWeights
from models.weight_map import WeightMap
from weights.folder import FolderError, HfFolder, TensorInfo
from weights.schema import description_problems

# What is fetched of a hub repository: to check a command line, and to train.
DESCRIPTION = ("*.json", "*.txt", "*.jinja")
EVERYTHING = ("*.safetensors", *DESCRIPTION)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class HfSource:
    """A folder whose tensors are a model's.

    mapping: of the folder's tensors to the model.
    """

    folder: HfFolder
    mapping: WeightMap


def described(spec: ModelSpec[Any], config: Mapping[str, Any], path: Path) -> ModelConfig:
    """The model of an architecture that a folder's `config.json` describes.

    Raises:
        FolderError: another architecture, or values that can't be used.
    """
    try:
        return spec.from_hf(config)
    except ValueError as error:
        raise FolderError(path, [str(error)]) from error


def model_of(config: Mapping[str, Any], path: Path) -> tuple[ModelSpec[Any], HfWeights[Any], ModelConfig]:
    """What a folder's `config.json` describes: its architecture, that one's table of weights, and the model.

    Raises:
        FolderError: no architecture here has its `model_type`, or values that can't be used.
    """
    known: list[str] = []
    for spec in MODEL_REGISTRY.values():
        if spec.hf_weights is not None:
            if config.get("model_type") in spec.hf_weights.model_types:
                return spec, spec.hf_weights, described(spec, config, path)
            known += spec.hf_weights.model_types
    raise FolderError(
        path, [f"config.json has model_type {config.get('model_type')!r}; there are tables for {', '.join(known)}"]
    )


def check_folder(weights: HfWeights[Any], config: ModelConfig, folder: HfFolder) -> HfSource:
    """The folder with the mapping of its tensors to a model, which all of them fit.

    Raises:
        FolderError: tensors missing, unknown or misshapen, a tokenizer that the embedding hasn't the rows for, small
            files that can't be used; lists everything.
    """
    mapping = mapping_of(weights, config, folder.shapes, folder.path)
    problems = [*mapping.check(folder.shapes), *description_problems(folder.path, config.vocab_size)]
    if problems:
        raise FolderError(folder.path, problems)
    return HfSource(folder, mapping)


def mapping_of(weights: HfWeights[Any], config: ModelConfig, names: Iterable[str], path: Path) -> WeightMap:
    """The mapping of the tensors `names` to the model that the folder `path` describes.

    Raises:
        FolderError: a model that the names can't hold.
    """
    try:
        return weights.mapping(config, names)
    except ValueError as error:
        raise FolderError(path, [str(error)]) from error


def tensor_infos(weights: HfWeights[Any], mapping: WeightMap, record: Mapping[str, str]) -> dict[str, TensorInfo]:
    """What to write for a model: each tensor in the dtype that its source had, or the architecture's usual one."""
    return {
        name: TensorInfo(shape, record[name] if name in record else weights.dtype(name))
        for name, shape in mapping.tensors.items()
    }


def is_hub_name(path: str) -> bool:
    """Whether it can only be a repository's name: no such folder, and the right form."""
    return not Path(path).expanduser().exists() and _HUB_NAME.fullmatch(path) is not None


def local_folder(path: str, patterns: Iterable[str] = EVERYTHING) -> Path:
    """A folder, or a hub repository's snapshot: fetched by one process of this node, while the others wait for it.

    Raises:
        FolderError: it can't be fetched.
    """
    if not is_hub_name(path):
        return Path(path).expanduser()
    import filelock
    from huggingface_hub import constants, snapshot_download

    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(cache / f".{path.replace('/', '--')}.lock"):
        try:
            # Whoever comes second finds everything there.
            return Path(snapshot_download(path, allow_patterns=list(patterns)))
        except Exception as error:  # the client's own errors, and those of what it is built on
            raise FolderError(path, [f"no such folder, and fetching it from the hub failed: {error}"]) from error

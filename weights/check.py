"""A HuggingFace folder against an architecture's table, before anything heavy: imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from models import MODEL_REGISTRY
from models.spec import HfWeights
from models.weight_map import WeightMap
from weights.folder import FolderError, HfFolder, TensorInfo
from weights.schema import description_problems

# What is fetched of a hub repository: to check a command line, and to train.
DESCRIPTION = ("*.json", "*.txt", "*.jinja")
EVERYTHING = ("*.safetensors", *DESCRIPTION)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def hf_weights_of(config: Mapping[str, Any], path: Path) -> HfWeights:
    """The table for a folder's `model_type`.

    Raises:
        FolderError: another architecture.
    """
    known: list[str] = []
    for spec in MODEL_REGISTRY.values():
        if spec.hf_weights is not None:
            if config.get("model_type") in spec.hf_weights.model_types:
                return spec.hf_weights
            known += spec.hf_weights.model_types
    raise FolderError(
        path, [f"config.json has model_type {config.get('model_type')!r}; there are tables for {', '.join(known)}"]
    )


def check_folder(spec: HfWeights, folder: HfFolder, config: Mapping[str, Any]) -> WeightMap:
    """The mapping of a folder's tensors to the model that `config` describes, which all of them fit.

    Raises:
        FolderError: tensors missing, unknown or misshapen, a tokenizer that the embedding hasn't the rows for, small
            files that can't be used; lists everything.
    """
    mapping = mapping_of(spec, config, folder.shapes, folder.path)
    problems = mapping.check(folder.shapes)
    problems += description_problems(folder.path, spec.vocab_size(config))
    if problems:
        raise FolderError(folder.path, problems)
    return mapping


def mapping_of(spec: HfWeights, config: Mapping[str, Any], names: Iterable[str], path: Path) -> WeightMap:
    """The mapping of the tensors `names` to the model that `config`, of the folder `path`, describes.

    Raises:
        FolderError: the config's values can't be used.
    """
    try:
        return spec.mapping(config, names)
    except ValueError as error:
        raise FolderError(path, [str(error)]) from error


def tensor_infos(spec: HfWeights, mapping: WeightMap, record: Mapping[str, str]) -> dict[str, TensorInfo]:
    """What to write for a model: each tensor in the dtype that its source had, or the architecture's usual one."""
    return {
        name: TensorInfo(shape, record[name] if name in record else spec.dtype(name))
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

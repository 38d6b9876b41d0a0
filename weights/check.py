"""A HuggingFace folder against an architecture's table, before anything heavy: imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
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
    record: dtype of each of these tensors, by the names that the model's exports have.
    """

    folder: HfFolder
    mapping: WeightMap
    record: Mapping[str, str]


def described(spec: ModelSpec[Any], config: Mapping[str, Any], path: Path) -> ModelConfig:
    """The model of an architecture that a folder's `config.json` describes.

    Raises:
        FolderError: another architecture, quantised weights, or values that can't be used.
    """
    if problem := _quantization(config):
        raise FolderError(path, [problem])
    try:
        return spec.from_hf(config)
    except ValueError as error:
        raise FolderError(path, [str(error)]) from error


def is_text_only(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of a class without a vision encoder: by transformers' convention, its `model_type`."""
    return str(config.get("model_type")).endswith("_text")


def _quantization(config: Mapping[str, Any]) -> str | None:
    """Why a folder's weights can't be read, if its config.json says that they are quantised."""
    text = config.get("text_config")
    for section, prefix in ((config, ""), (text if isinstance(text, Mapping) else {}, "text_config.")):
        for key in ("quantization_config", "compression_config"):
            if (settings := section.get(key)) is not None:
                method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else settings
                return (
                    f"config.json has {prefix}{key} (method {method}): quantised weights can't be trained; give the "
                    f"folder in bf16 that they were made from, or, if these are plain, take {key} out of config.json"
                )
    return None


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


def ignored_tensors(mapping: WeightMap, folder: HfFolder) -> Iterator[str]:
    """What the folder has and the model doesn't take, by reason."""
    reasons: dict[str, list[str]] = {}
    for name in folder.shapes:
        if name not in mapping.tensors and (reason := mapping.reason_to_ignore(name)) is not None:
            reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        yield f"{len(names)} tensors left out, {names[0]} the first: {reason}"


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
    return HfSource(folder, mapping, weights.as_exported(config, folder.dtypes))


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
    """What to write for a model: each tensor in the dtype that its source had, or the architecture's usual one.

    Copies (a tied folder's `lm_head.weight`) are written where the source had them.
    """
    shapes = dict(mapping.tensors)
    shapes |= {copy: shapes[name] for name, copy in mapping.copies.items() if copy in record}
    return {
        name: TensorInfo(shape, record[name] if name in record else weights.dtype(name))
        for name, shape in shapes.items()
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

"""What the small files of a HuggingFace folder may say: tokenizer, processor, generation settings, template, index.

Checked before any library reads them, so that a wrong kind of value is named with its file and key instead of
surfacing as a library's TypeError in the middle of training. Torch-free: the launcher's preflight does it too.
config.json is the architecture's own (`models/qwen35_vl/config_schema.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models.json_files import JsonError, kind, read_object, regular_file_problem
from models.json_schema import Check, Integer, ListOf, Number, Text, boolean, either, mapping, null, problems

_LONGEST_TEMPLATE = 2**20  # characters; released ones have a few thousand
_TOKEN_ID = Integer(0, 2**24 - 1)


def _added_token(value: Any) -> str | None:
    """A token with its settings, as transformers writes an AddedToken."""
    is_one = isinstance(value, dict) and isinstance(value.get("content"), str)
    return None if is_one else "an object with a text as its content"


_TOKEN = either(Text(), _added_token, null)
_TOKENS = ListOf(either(Text(), _added_token), 0, 100_000)
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_TOKEN_IDS = either(_TOKEN_ID, ListOf(_TOKEN_ID, 0, 1000), null)
_CHANNELS = ListOf(Number(-1000, 1000), 1, 16)
_PIXELS = Integer(1, 2**31)

_IMAGE_PROCESSOR: Mapping[str, Check] = {
    "patch_size": Integer(1, 1024),
    "merge_size": Integer(1, 64),
    "temporal_patch_size": Integer(1, 64),
    "image_mean": either(_CHANNELS, null),
    "image_std": either(ListOf(Number(0, 1000, inclusive=False), 1, 16), null),
    "rescale_factor": either(Number(0, 1000, inclusive=False), null),
    "resample": either(Integer(0, 5), null),
    "min_pixels": either(_PIXELS, null),
    "max_pixels": either(_PIXELS, null),
    "size": either(mapping, null),
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), either(boolean, null)),
}
_SIZE: Mapping[str, Check] = dict.fromkeys(("shortest_edge", "longest_edge", "height", "width"), _PIXELS)
_TOKENIZER_CONFIG: Mapping[str, Check] = {
    **dict.fromkeys(_NAMED_TOKENS, _TOKEN),
    "model_max_length": either(Number(1, 1e31), null),
    "chat_template": either(Text(_LONGEST_TEMPLATE), ListOf(mapping, 1, 100), null),
    "extra_special_tokens": either(mapping, _TOKENS, null),
    "additional_special_tokens": either(_TOKENS, null),
    "added_tokens_decoder": either(mapping, null),
    "tokenizer_class": either(Text(), null),
    "processor_class": either(Text(), null),
}
_GENERATION: Mapping[str, Check] = {
    "bos_token_id": _TOKEN_IDS,
    "eos_token_id": _TOKEN_IDS,
    "pad_token_id": either(_TOKEN_ID, null),
    "temperature": either(Number(0, 1000), null),
    "top_p": either(Number(0, 1), null),
    "top_k": either(Integer(0, 2**24), null),
    "repetition_penalty": either(Number(0, 1000, inclusive=False), null),
    "do_sample": either(boolean, null),
    **dict.fromkeys(("max_new_tokens", "max_length", "min_length"), either(Integer(0, 2**31), null)),
}


def description_problems(folder: Path, rows: int | None = None) -> list[str]:
    """What is wrong with the small files that a folder has, each with file and key; empty when they can be used.

    Args:
        rows: of the model's embedding, above every id of the tokenizer; None: there is no model to compare with.
    """
    found: list[str] = []
    for name, check in _FILES.items():
        path = folder / name
        if not path.exists() and not path.is_symlink():
            continue
        try:
            content = read_object(path)
        except JsonError as error:
            found.append(f"{name}: {error.reason}")
            continue
        wrong = check(content)
        if name == "tokenizer.json" and not wrong and rows is not None and (highest := _highest_id(content)) >= rows:
            wrong = [f"has ids up to {highest}, and the vocabulary has {rows} rows"]
        found += [f"{name}: {problem}" for problem in wrong]
    return [*found, *_template_problems(folder)]


def index_problems(index: Mapping[str, Any]) -> list[str]:
    """What is wrong with a model.safetensors.index.json; what its file names may be is the folder's business."""
    wrong = problems(index, {"weight_map": mapping, "metadata": either(mapping, null)}, required=("weight_map",))
    if wrong:
        return wrong
    names = Text()
    return [
        f"weight_map[{name!r}] is {kind(file)}; it has to be a file's name"
        for name, file in index["weight_map"].items()
        if names(file) is not None
    ]


def _tokenizer(content: Mapping[str, Any]) -> list[str]:
    """tokenizer.json, as the tokenizers library writes it."""
    added = either(ListOf(mapping, 0, 100_000), null)
    wrong = problems(content, {"model": mapping, "added_tokens": added}, required=("model",))
    if wrong:
        return wrong
    for place, token in enumerate(content.get("added_tokens") or ()):
        prefix = f"added_tokens[{place}]."
        wrong += problems(token, {"id": _TOKEN_ID, "content": Text()}, prefix, required=("id", "content"))
    vocabulary = content["model"].get("vocab")
    if not isinstance(vocabulary, dict | list):
        return [*wrong, f"model.vocab is {kind(vocabulary)}; it has to be an object of ids or a list"]
    if isinstance(vocabulary, dict):
        strange = [token for token, number in vocabulary.items() if _TOKEN_ID(number) is not None]
        wrong += [f"model.vocab[{token!r}] has to be {_TOKEN_ID(None)}" for token in strange[:3]]
    return wrong


def _highest_id(tokenizer: Mapping[str, Any]) -> int:
    """The largest id of a tokenizer.json that `_tokenizer` accepts; -1 if it has none."""
    vocabulary = tokenizer["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return max([*ids, *(token["id"] for token in tokenizer.get("added_tokens") or ())], default=-1)


def _image_processor(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    wrong = problems(content, _IMAGE_PROCESSOR, prefix)
    size = content.get("size")
    if isinstance(size, dict):
        wrong += problems(size, _SIZE, f"{prefix}size.")
        smallest, largest = size.get("shortest_edge"), size.get("longest_edge")
    else:
        smallest, largest = content.get("min_pixels"), content.get("max_pixels")
    if not wrong and smallest is not None and largest is not None and smallest > largest:
        wrong.append(f"{prefix}size: the smallest area, {smallest:,} pixels, is above the largest, {largest:,}")
    return wrong


def _processor(content: Mapping[str, Any]) -> list[str]:
    parts = dict.fromkeys(("image_processor", "video_processor"), either(mapping, null))
    wrong = problems(content, parts)
    for part in parts if not wrong else ():
        wrong += _image_processor(content.get(part) or {}, f"{part}.")
    return wrong


def _tokenizer_config(content: Mapping[str, Any]) -> list[str]:
    return problems(content, _TOKENIZER_CONFIG)


def _generation(content: Mapping[str, Any]) -> list[str]:
    return problems(content, _GENERATION)


def _special_tokens(content: Mapping[str, Any]) -> list[str]:
    schema = dict.fromkeys(content, either(_TOKEN, _TOKENS, mapping))
    return problems(content, schema | dict.fromkeys(_NAMED_TOKENS, _TOKEN))


def _added_tokens(content: Mapping[str, Any]) -> list[str]:
    return problems(content, dict.fromkeys(content, _TOKEN_ID))[:3]


def _chat_template(content: Mapping[str, Any]) -> list[str]:
    one = Text(_LONGEST_TEMPLATE)
    return problems(content, {"chat_template": either(one, ListOf(mapping, 1, 100))}, required=("chat_template",))


def _any_object(_: Mapping[str, Any]) -> list[str]:
    return []


_FILES: Mapping[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "tokenizer.json": _tokenizer,
    "tokenizer_config.json": _tokenizer_config,
    "preprocessor_config.json": _image_processor,
    "video_preprocessor_config.json": _image_processor,
    "processor_config.json": _processor,
    "generation_config.json": _generation,
    "special_tokens_map.json": _special_tokens,
    "added_tokens.json": _added_tokens,
    "vocab.json": _any_object,
    "chat_template.json": _chat_template,
}


def _template_problems(folder: Path) -> list[str]:
    path = folder / "chat_template.jinja"
    if not path.exists() and not path.is_symlink():
        return []
    if problem := regular_file_problem(path):
        return [f"{path.name}: {problem}"]
    if path.stat().st_size > _LONGEST_TEMPLATE:
        return [f"{path.name}: has {path.stat().st_size:,} bytes, more than {_LONGEST_TEMPLATE:,}"]
    return []

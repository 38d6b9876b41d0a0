"""More kinds of bad input: adapters, raw safetensors headers, tokenizers' structure, paths that aren't folders."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign.cases import FOLDER_DOORS, SHARDS, Case, replace
from weights.adapter import CONFIG, MODEL

ADAPTER_KINDS = ("adapter's config", "adapter's weights", "adapter's file")
_ADAPTER_DOORS = ("--load-adapter", "adapter")

_FIELDS: dict[str, tuple[Any, ...]] = {
    "r": (0, -1, "8", 1.5, None, True, 10**9, [], 3),
    "lora_alpha": (0, -1, "x", None, [], True, 1e30),
    "lora_dropout": ("x", -0.1, 2, None, []),
    "use_rslora": ("yes", 1, None, []),
    "peft_type": ("IA3", None, 7, []),
    "target_modules": (7, [7], {}),
    "target_parameters": (7, "x", [7], {}),
    "base_model_name_or_path": (7, [], {}),
    "rank_pattern": ({"a": 1}, 7),
    "use_dora": (True, "yes"),
    "bias": ("all", 7, None),
    "modules_to_save": (["x"], "x"),
    "layer_replication": ([[0, 1]],),
}


def _adapter_config(draw: random.Random) -> Case:
    field = draw.choice(list(_FIELDS))
    value = draw.choice(_FIELDS[field])

    def spoil(folder: Path, _: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        replace(folder / CONFIG, json.dumps({**content, field: value}))

    # A rank that the tensors don't have shows in their shapes.
    names = (MODEL, "shape") if (field, value) == ("r", 3) else (CONFIG, field)
    return Case(ADAPTER_KINDS[0], draw.choice(_ADAPTER_DOORS), f"{field} = {str(value)[:30]}", spoil, names)


def _read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _write_header(path: Path, header: str, data: bytes) -> None:
    replace(path, len(header.encode()).to_bytes(8, "little") + header.encode() + data)


def _adapter_weights(draw: random.Random) -> Case:
    how, place = draw.choice(["renamed", "shape", "dtype", "not finite", "cut", "left out"]), draw.random()

    def spoil(folder: Path, _: Path) -> None:
        path = folder / MODEL
        header, data = _read_header(path)
        names = [name for name in header if name != "__metadata__"]
        name = names[int(place * len(names))]
        if how == "renamed":
            header[f"{name}.other"] = header.pop(name)
        elif how == "shape":
            header[name]["shape"] = [*header[name]["shape"][::-1], 1]
        elif how == "dtype":
            header[name]["dtype"] = "I32"
        elif how == "not finite":
            start = header[name]["data_offsets"][0]
            data = data[:start] + b"\xff" * 4 + data[start + 4 :]
        elif how == "cut":
            data = data[: int(place * len(data))]
        else:
            end = max(header[each]["data_offsets"][1] for each in names)
            (name,) = (each for each in names if header[each]["data_offsets"][1] == end)
            data = data[: header.pop(name)["data_offsets"][0]]
        _write_header(path, json.dumps(header), data)

    door = "adapter" if how == "not finite" else draw.choice(_ADAPTER_DOORS)
    return Case(ADAPTER_KINDS[1], door, how, spoil, (MODEL,))


def _adapter_file(draw: random.Random) -> Case:
    file, how = draw.choice([CONFIG, MODEL]), draw.choice(["pipe", "folder", "loop", "empty", "gone", "device"])

    def spoil(folder: Path, _: Path) -> None:
        path = folder / file
        path.unlink()
        if how == "pipe":
            os.mkfifo(path)
        elif how == "folder":
            path.mkdir()
        elif how == "loop":
            path.symlink_to(path)
        elif how == "device":
            path.symlink_to("/dev/zero")
        elif how == "empty":
            path.touch()

    return Case(ADAPTER_KINDS[2], draw.choice(_ADAPTER_DOORS), f"{file}: {how}", spoil, (file,))


def _raw_header(draw: random.Random) -> Case:
    """Headers that no writer makes."""
    file, how = draw.choice(SHARDS), draw.choice(["overlap", "hole", "beyond", "negative", "dtype", "deep", "list"])
    how = draw.choice([how, "metadata", "twice", "text for offsets", "not UTF-8"])

    def spoil(folder: Path, _: Path) -> None:
        header, data = _read_header(folder / file)
        first, second = [name for name in header if name != "__metadata__"][:2]
        if how == "overlap":
            header[second]["data_offsets"] = header[first]["data_offsets"]
        elif how == "hole":
            data += bytes(64)
        elif how == "beyond":
            header[first]["data_offsets"] = [2**62, 2**62 + 4]
        elif how == "negative":
            header[first]["data_offsets"] = [-4, 0]
        elif how == "dtype":
            header[first]["dtype"] = "F7"
        elif how == "metadata":
            header["__metadata__"] = {"format": ["pt"]}
        elif how == "text for offsets":
            header[first]["data_offsets"] = "0-4"
        text = json.dumps(header)
        if how == "deep":
            text = '{"a":' * 10_000 + "1" + "}" * 10_000
        elif how == "list":
            text = f"[{text}]"
        elif how == "twice":
            text = f'{text[:-1]}, "{first}": {json.dumps(header[second])}}}'
        _write_header(folder / file, text, data)
        if how == "not UTF-8":
            content = (folder / file).read_bytes()
            replace(folder / file, content[:10] + b"\xff\xfe" + content[12:])

    return Case("raw safetensors header", draw.choice(FOLDER_DOORS), f"{how} in {file}", spoil, (file,))


_TOKENIZER: dict[tuple[str, ...], tuple[Any, ...]] = {
    ("model", "type"): ("Nope", 7, None),
    ("model", "merges"): (7, "x", [7], [["a"]], ["a b c"]),
    ("pre_tokenizer",): (7, "x", {"type": "No"}, []),
    ("normalizer",): (7, {"type": "No"}, []),
    ("decoder",): (7, {"type": "No"}),
    ("post_processor",): (7, {"type": "No"}),
    ("version",): (7, "9.9"),
    ("added_tokens",): ([{"id": 1, "content": ""}], [{"id": 1, "content": "x", "special": "no"}]),
}


def _tokenizer(draw: random.Random) -> Case:
    """What only the tokenizers library knows."""
    keys = draw.choice(list(_TOKENIZER))
    value = draw.choice(_TOKENIZER[keys])

    def spoil(folder: Path, _: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        place = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        replace(folder / "tokenizer.json", json.dumps(content))

    what = f"{'.'.join(keys)} = {str(value)[:30]}"
    return Case("tokenizer's structure", draw.choice(("processor", "generate")), what, spoil, ("input",), harmless=True)


_COMPANIONS: dict[str, tuple[Any, ...]] = {
    "special_tokens_map.json": ({"eos_token": 7}, {"eos_token": []}, {"pad_token": {"content": 7}}, {"x": {}}),
    "added_tokens.json": ({"<x>": "7"}, {"<x>": -1}, {"<x>": None}, {"": 7}),
    "chat_template.json": ({"chat_template": 7}, {"chat_template": []}, {}),
    "video_preprocessor_config.json": ({"patch_size": "x"}, {"size": 7}, {"image_mean": "x"}),
    "chat_template_kwargs.json": ([], 7, {"a": {"b": [1]}}),
}


def _companion(draw: random.Random) -> Case:
    """Files that transformers reads beside those that a folder needs."""
    file = draw.choice(list(_COMPANIONS))
    content = draw.choice(_COMPANIONS[file])

    def spoil(folder: Path, _: Path) -> None:
        replace(folder / file, json.dumps(content))

    what = f"{file} = {content}"
    return Case("companion", draw.choice(("processor", "generate")), what, spoil, ("input",), harmless=True)


def _place(draw: random.Random) -> Case:
    """Something else where a folder is named."""
    ways: dict[str, Callable[[Path], None]] = {
        "a file": lambda path: path.write_text("{}"),
        "a pipe": lambda path: os.mkfifo(path),
        "a loop": lambda path: path.symlink_to(path),
        "a link to nowhere": lambda path: path.symlink_to("nowhere"),
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "an empty folder": lambda path: path.mkdir(),
    }
    how = draw.choice(list(ways))
    # A processor that isn't a folder may be a name of the hub; an empty folder of checkpoints is a new run's.
    doors = ("--hf-config", *FOLDER_DOORS, "--hf-processor-path")
    door = draw.choice(doors if how == "an empty folder" else (*doors, "--load"))

    def spoil(folder: Path, _: Path) -> None:
        shutil.rmtree(folder)
        ways[how](folder)

    return Case("no folder", door, how, spoil, ("input",))


KINDS: tuple[Callable[[random.Random], Case], ...] = (
    *(_adapter_config, _adapter_weights, _adapter_file, _raw_header, _tokenizer, _companion, _place),
)

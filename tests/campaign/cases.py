"""A seeded generator of bad inputs: one thing wrong in an otherwise sound folder or checkpoint, by kind.

A case says how the input is spoilt, by which door it is brought in, and which words the refusal has to name.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FOLDER_DOORS = ("--load-hf", "import", "generate")
CONFIG_DOORS = ("--hf-config", *FOLDER_DOORS, "export")
CHECKPOINT_DOORS = ("--load", "--pretrained-checkpoint", "export", "read")
PROCESSOR_DOORS = ("--hf-processor-path", "processor", *FOLDER_DOORS)


@dataclass(frozen=True)
class Case:
    """One bad input.

    kind: for the totals. door: how it is brought in (`tests.campaign.doors`).
    spoil: is given a copy to damage, which is the case's own, and a place that code would leave a mark at.
    names: the refusal has to hold each; an entry with "|" any of its parts.
    harmless: reading what was written, bit for bit, is right as well.
    """

    kind: str
    door: str
    what: str
    spoil: Callable[[Path, Path], None]
    names: tuple[str, ...] = ()
    harmless: bool = False

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}, through {self.door}"


def replace(path: Path, content: bytes | str) -> None:
    """Write over a file that may be a hard link to the sound one."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


# HuggingFace folders

_ABSURD: tuple[Any, ...] = (
    *(None, True, "8", "many", -1, 0, 0.5, 1.5, 10**8, 10**30, [], {}, [1], {"a": 1}, "", 2**63, -(2**31)),
)
_COUNTS = {
    "text_config": (
        *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "vocab_size"),
        *("linear_value_head_dim", "linear_conv_kernel_dim"),
    ),
    "vision_config": (
        *("depth", "hidden_size", "num_heads", "intermediate_size", "patch_size", "temporal_patch_size"),
        *("spatial_merge_size", "num_position_embeddings", "in_channels"),
    ),
}
_OTHERS: dict[tuple[str, ...], tuple[Any, ...]] = {
    ("text_config", "rms_norm_eps"): (0, -1e-6, "1e-6", None, 2, True),
    ("text_config", "max_position_embeddings"): (0, -1, "x", None, 1.5, 2**40),
    ("text_config", "initializer_range"): (-1, "0.02", None, [], 1e9),
    ("text_config", "layer_types"): ({}, "linear_attention", [1, 2, 3, 4], ["full_attention"] * 4, [], [None] * 4),
    ("text_config", "rope_parameters"): ([], "default", 7),
    ("text_config", "rope_parameters", "rope_theta"): (0, -1, "1e7", None, [], 1e300, 10000.5, True),
    ("text_config", "rope_parameters", "partial_rotary_factor"): (0, 2, "0.25", None, -1, []),
    ("text_config", "rope_parameters", "mrope_section"): (None, [], [1], [2, 1], "211", [2, 1, "1"], [9, 9, 9], 4),
    ("image_token_id",): (None, -1, "7", 1.5, 10**9, 5000, True),
    ("vision_start_token_id",): (None, -1, "7", 1.5, 10**9, 5000, []),
    ("tie_word_embeddings",): ("yes", 1, None, [], {}),
    ("text_config",): (None, [], "x", 7),
    ("vision_config",): (None, [], "x", 7),
    ("model_type",): (None, [], {}, 7, "llama"),
}


def _config_value(draw: random.Random) -> Case:
    if draw.random() < 0.6:
        section = draw.choice(list(_COUNTS))
        keys, value = (section, draw.choice(_COUNTS[section])), draw.choice(_ABSURD)
    else:
        keys = draw.choice(list(_OTHERS))
        value = draw.choice(_OTHERS[keys])

    def spoil(folder: Path, _: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        place = config
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        replace(folder / "config.json", json.dumps(config))

    what = f"{'.'.join(keys)} = {str(value)[:30]}"
    return Case("config value", draw.choice(CONFIG_DOORS), what, spoil, ("config.json", keys[-1]))


def _config_relation(draw: random.Random) -> Case:
    changes, named = draw.choice(
        [
            ({"text_config": {"num_key_value_heads": 3}}, "num_attention_heads"),
            ({"text_config": {"linear_num_key_heads": 3}}, "linear_num_value_heads"),
            ({"text_config": {"num_hidden_layers": 5}}, "layer_types"),
            ({"text_config": {"head_dim": 64}}, "mrope_section"),
            ({"vision_config": {"num_heads": 3}}, "num_heads"),
            ({"vision_config": {"num_heads": 64}}, "num_heads"),
            ({"vision_config": {"num_position_embeddings": 63}}, "num_position_embeddings"),
            ({"vision_config": {"out_hidden_size": 256}}, "out_hidden_size"),
            ({"text_config": {"vocab_size": 1000}}, "vocab_size"),
        ]
    )

    def spoil(folder: Path, _: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for section, values in changes.items():
            config[section] |= values
        replace(folder / "config.json", json.dumps(config))

    return Case("config contradiction", draw.choice(CONFIG_DOORS), str(changes), spoil, ("config.json", named))


_JSON_FILES = ("config.json", INDEX, "tokenizer.json", "tokenizer_config.json", "processor_config.json")


def _doors_of(file: str) -> tuple[str, ...]:
    if file == "config.json":
        return CONFIG_DOORS
    return FOLDER_DOORS if file == INDEX or file.endswith(".safetensors") else PROCESSOR_DOORS


def _json_file(draw: random.Random) -> Case:
    file = draw.choice(_JSON_FILES)
    spoilt: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda content: b"",
        "cut short": lambda content: content[: len(content) * 2 // 3],
        "not JSON": lambda content: b"oops" + content,
        "a list": lambda content: b"[" + content + b"]",
        "nested": lambda content: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "digits": lambda content: content.rstrip()[:-1] + b', "x": ' + b"9" * 5000 + b"}",
        "infinite": lambda content: content.rstrip()[:-1] + b', "x": 1e999}',
        "NaN": lambda content: content.rstrip()[:-1] + b', "x": NaN}',
        "a key twice": lambda content: content.rstrip()[:-1] + b', "x": 1, "x": 2}',
        "not UTF-8": lambda content: content.rstrip()[:-1] + b', "x": "\xff\xfe"}',
        "a number": lambda content: b"7",
        "null": lambda content: b"null",
    }
    how = draw.choice(list(spoilt))

    def spoil(folder: Path, _: Path) -> None:
        replace(folder / file, spoilt[how]((folder / file).read_bytes()))

    return Case("JSON file", draw.choice(_doors_of(file)), f"{file} is {how}", spoil, (file,))


def _file_kind(draw: random.Random) -> Case:
    file = draw.choice([*_JSON_FILES, *SHARDS, "chat_template.jinja"])
    kind = draw.choice(["pipe", "folder", "device", "loop"])

    def spoil(folder: Path, _: Path) -> None:
        path = folder / file
        path.unlink()
        {
            "pipe": lambda: os.mkfifo(path),
            "folder": path.mkdir,
            "device": lambda: path.symlink_to("/dev/zero"),
            "loop": lambda: path.symlink_to(path),
        }[kind]()

    return Case("no regular file", draw.choice(_doors_of(file)), f"{file} is a {kind}", spoil, (file,))


def _index(draw: random.Random) -> Case:
    changes: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
        "no weight_map": (lambda index: index.pop("weight_map"), "weight_map"),
        "weight_map is a list": (lambda index: index.update(weight_map=[1]), "weight_map"),
        "weight_map is null": (lambda index: index.update(weight_map=None), "weight_map"),
        "a number for a file": (lambda index: index["weight_map"].update({"mtp.norm.weight": 7}), "mtp.norm.weight"),
        "a list for a file": (lambda index: index["weight_map"].update({"mtp.norm.weight": []}), "mtp.norm.weight"),
        "a file outside": (lambda index: index["weight_map"].update({"mtp.norm.weight": "../x.safetensors"}), "../x"),
        "an absolute file": (lambda index: index["weight_map"].update({"mtp.norm.weight": "/dev/zero"}), "/dev/zero"),
        "a missing file": (lambda index: index["weight_map"].update({"mtp.norm.weight": "z.safetensors"}), "z.safe"),
        "a tensor too many": (lambda index: index["weight_map"].update({"other": SHARDS[0]}), "other"),
        "a tensor too few": (lambda index: index["weight_map"].pop("mtp.norm.weight"), "mtp.norm.weight"),
        "metadata is a list": (lambda index: index.update(metadata=[]), "metadata"),
    }
    how = draw.choice(list(changes))
    change, named = changes[how]

    def spoil(folder: Path, _: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        replace(folder / INDEX, json.dumps(index))

    return Case("index", draw.choice(FOLDER_DOORS), how, spoil, (INDEX, named))


def _header(draw: random.Random) -> Case:
    """The front of a safetensors file, or its length."""
    file, place, how = draw.choice(SHARDS), draw.random(), draw.choice(["cut", "longer", "header", "length", "shape"])

    def spoil(folder: Path, _: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        size = int.from_bytes(content[:8], "little")
        if how == "cut":
            content = content[: int(place * (len(content) - 1))]
        elif how == "longer":
            content += b"more"
        elif how == "header":
            content[8 + int(place * 20)] = 0
        elif how == "length":
            content[:8] = (2 ** int(20 + place * 43)).to_bytes(8, "little")
        else:
            header = json.loads(bytes(content[8 : 8 + size]))
            name = next(name for name in header if name != "__metadata__")
            header[name]["shape"] = [2**62, 2**62] if place < 0.5 else [-1]
            encoded = json.dumps(header).encode()
            content = bytearray(len(encoded).to_bytes(8, "little") + encoded + content[8 + size :])
        replace(folder / file, bytes(content))

    return Case("safetensors header", draw.choice(FOLDER_DOORS), f"{how} of {file}", spoil, (file,))


def _tensor_bits(draw: random.Random) -> Case:
    """A bit of a tensor; the folder has checksums. `import` reads everything, and so does `generate`."""
    file, place, bit = draw.choice(SHARDS), draw.random(), draw.randrange(8)

    def spoil(folder: Path, _: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        content[start + int(place * (len(content) - start))] ^= 1 << bit
        replace(folder / file, bytes(content))

    return Case(
        "bit of a tensor", draw.choice(("import", "generate")), f"{file} at {place:.3f}", spoil, (file, "damaged")
    )


_SMALL: dict[str, dict[tuple[str, ...], tuple[Any, ...]]] = {
    "tokenizer.json": {
        ("model",): (None, [], 7),
        ("model", "vocab"): (None, 7, "x", {"a": -1}, {"a": "7"}, {"a": 1.5}, {"a": 10**9}, {"a": None}),
        ("added_tokens",): ({}, "x", [7], [{"id": "1", "content": "x"}], [{"content": "x"}], [{"id": 1}]),
    },
    "tokenizer_config.json": {
        ("pad_token",): (7, [], True),
        ("eos_token",): (7, [1], False),
        ("model_max_length",): ("x", -1, 0, [], True),
        ("chat_template",): (7, {}, []),
        ("extra_special_tokens",): (7, "x", [7]),
    },
    "processor_config.json": {
        ("image_processor",): ([], 7, "x"),
        ("image_processor", "patch_size"): (0, -1, "16", None, 1.5, [16], 10**9),
        ("image_processor", "merge_size"): (0, -1, "2", None, 10**6),
        ("image_processor", "temporal_patch_size"): (0, "2", None, -3),
        ("image_processor", "image_mean"): (7, "x", ["a"] * 3, [None] * 3),
        ("image_processor", "image_std"): ([0, 0, 0], [-1, 1, 1], "x", ["1"] * 3),
        ("image_processor", "rescale_factor"): (0, -1, "x", []),
        ("image_processor", "size"): (7, "x", []),
        ("image_processor", "size", "shortest_edge"): (0, -1, "x", None, 1.5),
        ("image_processor", "size", "longest_edge"): (0, -1, "x", [], 1),
        ("image_processor", "do_resize"): ("yes", 1, []),
    },
    "generation_config.json": {
        ("eos_token_id",): ("x", -1, 1.5, {}, ["x"]),
        ("temperature",): ("hot", -1, []),
        ("top_p",): (2, "x", -1),
        ("top_k",): (-1, 1.5, "x"),
    },
}


def _small_file(draw: random.Random) -> Case:
    file = draw.choice(list(_SMALL))
    keys = draw.choice(list(_SMALL[file]))
    value = draw.choice(_SMALL[file][keys])

    def spoil(folder: Path, _: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        place = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        replace(path, json.dumps(content))

    what = f"{file}: {'.'.join(keys)} = {str(value)[:30]}"
    named = "size" if keys[-1] == "longest_edge" else keys[-1]
    return Case("tokenizer or processor", draw.choice(PROCESSOR_DOORS), what, spoil, (file, named))


def _template(draw: random.Random) -> Case:
    templates = {
        "division": "{{ 1 / 0 }}",
        "undefined": "{{ messages[9].a.b }}",
        "syntax": "{% for m in messages %}",
        "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "memory": "{{ 'x' * 10 ** 11 }}",
        "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "attribute": "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
        "filter": "{{ messages | nonsense }}",
        "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "range": "{% for a in range(10 ** 12) %}x{% endfor %}",
        "kind": "{{ messages + 1 }}",
        "include": "{% include '/etc/passwd' %}",
        "format": "{{ '{0.__class__}'.format(messages) }}{{ '%999999999999d' % 1 }}",
    }
    how = draw.choice(list(templates))

    def spoil(folder: Path, mark: Path) -> None:
        replace(folder / "chat_template.jinja", templates[how].replace("MARK", str(mark)))

    return Case("chat template", draw.choice(("processor", "generate")), how, spoil, ("chat template",))


# Checkpoints


class Call:
    """Is pickled as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def _pickle(draw: random.Random) -> Case:
    ways: dict[str, Callable[[Path], Any]] = {
        "os.mkdir": lambda mark: Call(os.mkdir, str(mark)),
        "os.system": lambda mark: Call(os.system, f"mkdir '{mark}'"),
        "eval": lambda mark: Call(eval, f"__import__('os').mkdir({str(mark)!r})"),
        "exec": lambda mark: Call(exec, f"import os; os.mkdir({str(mark)!r})"),
        "Path.mkdir": lambda mark: Call(Path.mkdir, mark),
        "shutil": lambda mark: Call(shutil.copytree, str(mark.parent), str(mark)),
        "getattr": lambda mark: Call(getattr, str, "join"),
        "in a list": lambda mark: [1, {"a": (Call(os.mkdir, str(mark)),)}],
    }
    how, door = draw.choice(list(ways)), draw.choice(CHECKPOINT_DOORS)

    def spoil(folder: Path, mark: Path) -> None:
        replace(folder / "iter_0000004/.metadata", pickle.dumps(ways[how](mark)))

    return Case("pickle with code", door, how, spoil, (".metadata", "which no checkpoint does"))


def _metadata_bits(draw: random.Random) -> Case:
    place, bit, how = draw.random(), draw.randrange(8), draw.choice(["bit", "bit", "bit", "cut", "noise"])
    noise = draw.randbytes(200)

    def spoil(folder: Path, _: Path) -> None:
        path = folder / "iter_0000004/.metadata"
        content = bytearray(path.read_bytes())
        at = int(place * len(content))
        if how == "bit":
            content[at] ^= 1 << bit
        elif how == "cut":
            content = content[:at]
        else:
            content[at : at + 200] = noise
        replace(path, bytes(content))

    # Past the index's own checks it is the reader that refuses, and names the shard or the tensor.
    names = ("iter_0000004",)
    return Case("bytes of an index", "read", f"{how} at {place:.3f}", spoil, names, harmless=True)


def _record_bits(draw: random.Random) -> Case:
    place, bit = draw.random(), draw.randrange(8)

    def spoil(folder: Path, _: Path) -> None:
        path = next((folder / "iter_0000004").glob("*.distcp"))
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= 1 << bit
        replace(path, bytes(content))

    return Case("bit of a shard", "read", f"at {place:.4f}", spoil, (".distcp",), harmless=True)


def _checkpoint_files(draw: random.Random) -> Case:
    def remove(path: Path) -> None:
        path.unlink()

    def pipe(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    def cut(path: Path) -> None:
        replace(path, path.read_bytes()[:100])

    def longer(path: Path) -> None:
        replace(path, path.read_bytes() + b"more")

    how, file = draw.choice([remove, pipe, cut, longer]), draw.choice([".metadata", "__0_0.distcp"])
    if (how, file) in ((longer, ".metadata"), (remove, ".metadata")):  # harmless to a pickle; not complete then
        how = cut

    def spoil(folder: Path, _: Path) -> None:
        how(folder / "iter_0000004" / file)

    door = draw.choice(("--load", "--pretrained-checkpoint", "export"))
    return Case("files of a checkpoint", door, f"{how.__name__} {file}", spoil, (file,))


KINDS: tuple[Callable[[random.Random], Case], ...] = (
    *(_config_value, _json_file, _file_kind, _index, _header, _tensor_bits, _small_file),
    *(_pickle, _metadata_bits, _record_bits, _checkpoint_files, _config_relation, _template),
)


def cases(seed: int, count: int, kinds: tuple[Callable[[random.Random], Case], ...]) -> Iterator[Case]:
    """`count` cases, the kinds in turn."""
    draw = random.Random(seed)
    for number in range(count):
        yield kinds[number % len(kinds)](draw)

"""LoRA adapters in peft's format: `adapter_config.json` and `adapter_model.safetensors`.

peft keeps the pairs of stacked experts as matrices, A [E * r, in] by experts and B [out, r * E] by ranks, beside the
module that holds the tensors, and wraps the second tensor of a module around the first. Headers are read without torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.adapters import A, AdapterMap, B, LoraOptions, peft_targets, stacked_tensors
from models.json_files import JsonError, read_object
from models.json_schema import Check, Integer, ListOf, Number, Text, boolean, either, null, problems
from weights.folder import ITEM_SIZES, FolderError, new_folder, read_header

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_INNER, _OUTER = "gate_up_proj", "down_proj"  # which of an experts module's tensors peft wraps first
_NAMES = ListOf(Text(), 0, 1_000_000)
# The fields that are read here.
_SCHEMA: Mapping[str, Check] = {
    "peft_type": Text(),
    "r": Integer(1, 2**16),
    "lora_alpha": Number(0, 2**20, inclusive=False),
    "lora_dropout": Number(0, 1),
    "use_rslora": boolean,
    "target_modules": either(Text(1_000_000), _NAMES, null),
    "target_parameters": either(_NAMES, null),
    "base_model_name_or_path": either(Text(), null),
}
# What peft's LoRA can do and this harness can't: field -> the values that ask for nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "use_qalora": (False,),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "alora_invocation_tokens": (None,),
}


@dataclass(frozen=True)
class AdapterFolder:
    """A peft adapter's headers.

    config: its adapter_config.json.
    shapes: of every tensor, by peft's names.
    """

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def open(cls, path: Path | str) -> AdapterFolder:
        """Read both files.

        Raises:
            FolderError: no adapter, a damaged one, or one that asks for what isn't built here; lists everything.
        """
        path = Path(path).expanduser()
        if not path.is_dir():
            raise FolderError(path, ["no such folder"])
        if not os.path.lexists(path / CONFIG):
            raise FolderError(path, [f"it has no {CONFIG}; give a peft adapter's folder"])
        try:
            config = read_object(path / CONFIG)
        except JsonError as error:
            raise FolderError(path, [f"{CONFIG}: {error.reason}"]) from error
        if not os.path.lexists(path / MODEL):
            raise FolderError(path, [f"it has no {MODEL}; pickled adapters aren't read"])
        wrong = problems(config, _SCHEMA, f"{CONFIG}: ", required=("peft_type", "r", "lora_alpha"))
        if config.get("peft_type") not in (None, "LORA"):
            wrong.append(f"{CONFIG}: peft_type {config['peft_type']!r} isn't built here; LORA is")
        wrong += [
            f"{CONFIG}: {field} {config[field]!r} isn't built here"
            for field, plain in _PLAIN.items()
            if field in config and config[field] not in plain
        ]
        if wrong:
            raise FolderError(path, wrong)
        header = read_header(path / MODEL)
        strange = [f"{MODEL}: {name} is {dtype}" for name, (_, dtype) in header.items() if dtype not in ITEM_SIZES]
        if strange:
            raise FolderError(path, [f"{each}; it has to be one of {', '.join(ITEM_SIZES)}" for each in strange[:20]])
        return cls(path, config, {name: shape for name, (shape, _) in header.items()})

    @property
    def options(self) -> LoraOptions:
        config = self.config
        return LoraOptions(
            config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), config.get("use_rslora", False)
        )

    @property
    def experts(self) -> bool:
        return bool(self.config.get("target_parameters"))

    @property
    def modules(self) -> list[str]:
        """Full names of the adapted linear modules."""
        names = (name.removeprefix(PREFIX).removesuffix(A) for name in self.shapes if name.endswith(A))
        return [name for name in names if not re.search(r"\.experts(\.base_layer)?$", name)]

    def stacked(self, tensors: Iterable[str]) -> list[str]:
        """The tensors of stacked experts that `target_parameters` names, among the model's."""
        ends = [f".{parameter}" for parameter in self.config.get("target_parameters") or ()]
        return [name for name in tensors if name.endswith(tuple(ends)) and not name.startswith("mtp.")] if ends else []

    def check(self, mapping: AdapterMap) -> None:
        """The tensors are exactly those of the table, in its shapes.

        Raises:
            FolderError: listing what isn't so.
        """
        expected = peft_shapes(mapping)
        problems = [f"{MODEL} lacks {name}" for name in expected if name not in self.shapes]
        for name, shape in self.shapes.items():
            if name not in expected:
                problems.append(f"{MODEL} has {name}, which belongs to no module of this model")
            elif shape != expected[name]:
                problems.append(f"{MODEL}: {name} has shape {shape}, expected {expected[name]}")
        if problems:
            raise FolderError(self.path, problems[:20])

    def read(self, mapping: AdapterMap) -> dict[str, Tensor]:
        """All tensors by the table's names; those of MTP, which peft's format hasn't, are left out.

        Raises:
            FolderError: not the table's tensors, or values that aren't finite.
        """
        from safetensors.torch import load_file

        self.check(mapping)
        tensors = load_file(self.path / MODEL)
        if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise FolderError(self.path, [f"{MODEL}: {name} has NaN or infinity in it" for name in bad[:20]])
        return from_peft(tensors, mapping)


def peft_shapes(mapping: AdapterMap) -> dict[str, tuple[int, ...]]:
    """peft's names and shapes for a table; without MTP, which peft's models don't have."""
    shapes = {}
    experts = dict(stacked_tensors(mapping))
    for name, shape in mapping.weights.tensors.items():
        if name.startswith("mtp."):
            continue
        if len(shape) == 3:
            shape = (shape[0] * shape[1], shape[2]) if name.endswith(A) else (shape[1], shape[2] * shape[0])
        shapes[_peft_name(name, experts)] = shape
    return shapes


def _peft_name(name: str, experts: Mapping[str, int]) -> str:
    module, end = (name.removesuffix(A), A) if name.endswith(A) else (name.removesuffix(B), B)
    if module in experts:
        holder, _, tensor = module.rpartition(".")
        nested = tensor == _INNER and f"{holder}.{_OUTER}" in experts
        module = f"{holder}.base_layer" if nested else holder
    return f"{PREFIX}{module}{end}"


def to_peft(state: Mapping[str, Tensor], mapping: AdapterMap) -> dict[str, Tensor]:
    """The table's tensors as peft stores them."""
    experts = dict(stacked_tensors(mapping))
    converted = {}
    for name, tensor in state.items():
        if name.startswith("mtp."):
            continue
        if tensor.dim() == 3:
            tensor = tensor.flatten(0, 1) if name.endswith(A) else tensor.permute(1, 2, 0).flatten(1)
        converted[_peft_name(name, experts)] = tensor.contiguous()
    return converted


def from_peft(state: Mapping[str, Tensor], mapping: AdapterMap) -> dict[str, Tensor]:
    """What peft stores as the table's tensors; the inverse of `to_peft`."""
    experts = dict(stacked_tensors(mapping))
    converted = {}
    for name, shape in mapping.weights.tensors.items():
        if name.startswith("mtp."):
            continue
        tensor = state[_peft_name(name, experts)]
        if len(shape) == 3 and name.endswith(A):
            tensor = tensor.view(shape)
        elif len(shape) == 3:
            tensor = tensor.view(shape[1], shape[2], shape[0]).permute(2, 0, 1)
        converted[name] = tensor
    return converted


def adapter_config(mapping: AdapterMap, tensors: Iterable[str], base: str | None) -> dict[str, Any]:
    """`adapter_config.json`: the fields that say something; peft has the rest as defaults.

    Args:
        tensors: all of the base model's, by their HuggingFace names.
        base: folder or hub name of the base.
    """
    options = mapping.options
    parameters = sorted({".".join(module.split(".")[-3:]) for module, _ in stacked_tensors(mapping)})
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "peft_type": "LORA",
        "r": options.rank,
        "target_modules": peft_targets(mapping, tensors),
        "target_parameters": parameters or None,
        "task_type": None,
        "use_dora": False,
        "use_rslora": options.rslora,
    }


def write_adapter(
    target: Path, state: Mapping[str, Tensor], mapping: AdapterMap, tensors: Iterable[str], base: str | None
) -> None:
    """Write a folder that peft loads; it appears complete or not at all.

    Args:
        state: by the table's names.
        tensors, base: see `adapter_config`.

    Raises:
        FolderError: the folder is there already.
    """
    from safetensors.torch import save_file

    with new_folder(target) as folder:
        save_file(to_peft(state, mapping), folder / MODEL, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(adapter_config(mapping, tensors, base), indent=2) + "\n")

"""The HuggingFace folder that training came from, and the `hf/` folder that every checkpoint carries."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.json_files import JsonError, read_json, read_object
from runtime.files import write_text
from weights.folder import ITEM_SIZES, RECORD, FolderError, HfFolder, read_config, sidecar_files

if TYPE_CHECKING:
    from transformers import ProcessorMixin


@dataclass(frozen=True)
class HfOrigin:
    """The HuggingFace folder that training came from, now or in the run whose checkpoint it starts from.

    folder: with its config.json and sidecar_files; None if there was none.
    record: dtype of every tensor of it, as safetensors spells it: export gives each the same again, and stores
        experts as it did.
    has_processor: the run's processor is the folder's, whose files are kept as they are.
    """

    folder: Path | None = None
    record: dict[str, str] = field(default_factory=dict)
    has_processor: bool = False

    @classmethod
    def of(cls, args: Namespace) -> HfOrigin:
        """`--load-hf`'s folder, or what `--load`'s checkpoint knows of it."""
        if args.load_hf is not None:
            folder = HfFolder.open(args.load_hf)
            processor = args.hf_processor_path
            is_folder_s = processor is not None and Path(processor).expanduser().resolve() == folder.path.resolve()
            return cls(folder.path, folder.dtypes, is_folder_s)
        checkpoint = Path(args.load) / "hf" if args.load is not None else None
        return cls() if checkpoint is None or not checkpoint.is_dir() else cls.of_checkpoint(checkpoint)

    @classmethod
    def of_checkpoint(cls, folder: Path) -> HfOrigin:
        """From a checkpoint's `hf/` folder.

        Raises:
            FolderError: its record of dtypes can't be read.
        """
        if not (folder / RECORD).exists():
            return cls(folder)
        try:
            record = read_object(folder / RECORD)
        except JsonError as error:
            raise FolderError(folder, [f"{RECORD}: {error.reason}"]) from error
        strange = [name for name, dtype in record.items() if not isinstance(dtype, str) or dtype not in ITEM_SIZES]
        if strange:
            raise FolderError(
                folder, [f"{RECORD}: {name} has no dtype of {', '.join(ITEM_SIZES)}" for name in strange[:3]]
            )
        return cls(folder, record)


def write_hf_folder(
    folder: Path, config: Mapping[str, Any], processor: ProcessorMixin | None, origin: HfOrigin, *, with_record: bool
) -> None:
    """Write `config.json`, tokenizer and processor, which export and transformers need beside the weights.

    Args:
        config: this run's; what only the origin's has (a comment, a generation setting) is kept.
        processor: this run's, if it has one.
        with_record: also keep the dtypes of the origin's tensors, for export.

    Raises:
        ValueError: the folder is there with another architecture: two models in one checkpoint folder.
    """
    if origin.folder is not None:
        config = _merged(read_config(origin.folder), config)
    path = folder / "config.json"
    if path.exists() and read_json(path) != config:
        raise ValueError(
            f"{path} describes another model than this run's arguments; give --save a folder of its own, "
            "or the arguments that the checkpoint was made with"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if origin.folder is not None and origin.folder.resolve() != folder.resolve():
        for file in sidecar_files(origin.folder):
            shutil.copyfile(file, folder / file.name)
    if processor is not None and not origin.has_processor:
        processor.save_pretrained(folder)
    if with_record and origin.record:
        write_text(folder / RECORD, json.dumps(origin.record, indent=1) + "\n")
    write_text(path, json.dumps(config, indent=2) + "\n")


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`new`, and what only `old` has, section by section."""
    merged = {**old, **new}
    for name, value in new.items():
        if isinstance(value, Mapping) and isinstance(old.get(name), Mapping):
            merged[name] = _merged(old[name], value)
    return merged

"""The HuggingFace folder that training came from, and the `hf/` folder that every checkpoint carries."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.json_files import JsonError, read_json, read_object
from runtime.files import write_text
from weights.check import HfSource, is_text_only, model_of
from weights.folder import (
    IMAGE_FILES,
    ITEM_SIZES,
    PROCESSOR_FILES,
    RECORD,
    TEMPLATE_ARGUMENTS,
    TEXT_AND_IMAGE_FILES,
    FolderError,
    read_config,
    sidecar_files,
)

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class HfOrigin:
    """The HuggingFace folder that training came from, now or in the run whose checkpoint it starts from.

    folder: with its config.json and sidecar_files; None if there was none.
    record: dtype of every tensor of it, as safetensors spells it, by the names of exports: these give each the same
        again, and store experts as it did.
    processor_folder: the folder of the run's processor, whose files are kept as they are; None where the processor is
        built here or comes from the hub.
    """

    folder: Path | None = None
    record: dict[str, str] = field(default_factory=dict)
    processor_folder: Path | None = None

    @classmethod
    def of(cls, args: Namespace, source: HfSource | None) -> HfOrigin:
        """`--load-hf`'s folder, or what `--load`'s checkpoint knows of it."""
        named = None if args.hf_processor_path is None else Path(args.hf_processor_path).expanduser()
        processor_folder = named if named is not None and named.is_dir() else None
        if source is not None:
            return cls(source.folder.path, dict(source.record), processor_folder)
        checkpoint = Path(args.load) / "hf" if args.load is not None else None
        if checkpoint is None or not checkpoint.is_dir():
            return cls(processor_folder=processor_folder)
        return replace(cls.of_checkpoint(checkpoint), processor_folder=processor_folder)

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


@dataclass(frozen=True)
class RunProcessor:
    """A run's processor, and what generation_config.json has to say for its answers to end."""

    processor: ProcessorMixin
    generation: Mapping[str, Any]


@dataclass(frozen=True)
class RunInputs:
    """What a run gives its model that a folder's files don't say; it is written into them.

    min_pixels, max_pixels: of images; None is the processor's own limit.
    template_arguments: for the chat template, a JSON object.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    template_arguments: str = "{}"

    @classmethod
    def of(cls, args: Namespace) -> RunInputs:
        return cls(args.min_pixels, args.max_pixels, args.chat_template_kwargs)

    def write(self, folder: Path) -> None:
        """Change a folder's image processor to these limits, so that the model is served as it was trained."""
        limits = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
        limits = {name: value for name, value in limits.items() if value is not None}
        for name in PROCESSOR_FILES:
            path = folder / name
            if not limits or not path.is_file():
                continue
            content = read_object(path)
            section = content if name == PROCESSOR_FILES[0] else content.get("image_processor", {})
            if isinstance(section.get("size"), dict):
                section["size"] |= limits
            for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
                if section.get(old) is not None and new in limits:
                    section[old] = limits[new]
            write_text(path, json.dumps(content, indent=2) + "\n")
        if json.loads(self.template_arguments):
            write_text(folder / TEMPLATE_ARGUMENTS, self.template_arguments + "\n")


def write_hf_folder(
    folder: Path,
    config: Mapping[str, Any],
    processor: RunProcessor | None,
    origin: HfOrigin,
    *,
    with_record: bool,
    inputs: RunInputs | None = None,
) -> None:
    """Write `config.json`, tokenizer and processor, which export and transformers need beside the weights.

    Tokenizer and processor files are all of one source: the run's processor, else the origin. A model of text alone
    gets no files of images, and its config.json is the origin's text_config.

    Args:
        config: this run's. Of the origin's only what means something else is changed, and its file is copied if
            nothing does: names, order and unread keys stay as they were.
        processor: this run's, if it has one.
        with_record: also keep the dtypes of the origin's tensors, for export.
        inputs: a run's, which override what the processor's files say; None keeps them.

    Raises:
        ValueError: the folder is there with another architecture: two models in one checkpoint folder.
    """
    stored = None if origin.folder is None else read_config(origin.folder)
    text_only = is_text_only(config)
    if stored is not None and origin.folder is not None:
        old = _text_class_s(stored, config) if text_only and not is_text_only(stored) else stored
        config = _changed(old, config, _canonical(old, origin.folder))
    if not with_record:
        config = {**config, **_dtype(config, origin.record)}
    path = folder / "config.json"
    if path.exists() and read_json(path) != config:
        raise ValueError(
            f"{path} describes another model than this run's arguments; give --save a folder of its own, "
            "or the arguments that the checkpoint was made with"
        )
    folder.mkdir(parents=True, exist_ok=True)
    own_processor = processor is not None or origin.processor_folder is not None
    if origin.folder is not None:
        files = sidecar_files(origin.folder)
        _copy((file for file in files if not (own_processor and _is_processor_s(file))), folder)
    if own_processor:
        _write_processor(folder, processor, origin.processor_folder)
    if processor is not None:
        _write_generation(folder / "generation_config.json", processor.generation)
    if text_only:
        _leave_tokenizer(folder)
    if inputs is not None:
        inputs.write(folder)
    if with_record and origin.record:
        write_text(folder / RECORD, json.dumps(origin.record, indent=1) + "\n")
    if origin.folder is None or config != stored:
        write_text(path, json.dumps(config, indent=2) + "\n")
    elif not path.exists():
        _copy([origin.folder / path.name], folder)


def _is_processor_s(file: Path) -> bool:
    return file.name in TEXT_AND_IMAGE_FILES


def _copy(files: Iterable[Path], folder: Path) -> None:
    for file in files:
        if file.parent.resolve() != folder.resolve():
            shutil.copyfile(file, folder / file.name)


def _write_processor(folder: Path, processor: RunProcessor | None, source: Path | None) -> None:
    """Tokenizer and processor files of `source`, or of the processor itself, and no others."""
    if source is not None and source.resolve() == folder.resolve():
        return
    for file in list(filter(_is_processor_s, folder.iterdir())):
        file.unlink()  # of another run's processor, or of another version of transformers
    if source is not None:
        _copy(filter(_is_processor_s, sidecar_files(source)), folder)
    elif processor is not None:
        processor.processor.save_pretrained(folder)
        # transformers 5 writes processor_config.json alone; servers and transformers 4 read these two.
        for part in ("image_processor", "video_processor"):
            if part in processor.processor.get_attributes():
                getattr(processor.processor, part).save_pretrained(folder)


def _leave_tokenizer(folder: Path) -> None:
    """Take a processor's files away but for the tokenizer's, and keep the template where tokenizers look for it."""
    for name in IMAGE_FILES:
        (folder / name).unlink(missing_ok=True)
    old = folder / "chat_template.json"  # read by transformers 4's processors alone
    if not old.is_file():
        return
    has_own = "chat_template" in read_object(folder / "tokenizer_config.json")
    if not has_own and not (folder / "chat_template.jinja").exists():
        write_text(folder / "chat_template.jinja", read_object(old)["chat_template"])
    old.unlink()


def _write_generation(path: Path, settings: Mapping[str, Any]) -> None:
    """generation_config.json as it is where it ends answers as the run was trained to; else completed."""
    old = {name: value for name, value in read_object(path).items() if value is not None} if path.exists() else {}
    stops = old.get("eos_token_id")
    stops = [stops] if isinstance(stops, int) else list(stops or ())
    missing = [token for token in settings["eos_token_id"][:1] if token not in stops]
    if not missing and "pad_token_id" in old:
        return
    new = {**settings, **old, "eos_token_id": [*missing, *stops] if stops else settings["eos_token_id"]}
    write_text(path, json.dumps(new, indent=2) + "\n")


def _canonical(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """What the harness reads of a config.json; all of it where the architecture has no table of weights."""
    try:
        return model_of(config, folder)[2].to_hf()
    except FolderError:
        return config


def _text_class_s(stored: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A vision-language model's config.json as its text class has it, which is `config`'s: its text_config."""
    own = {name: config[name] for name in ("architectures", "model_type", "tie_word_embeddings")}
    top = {name: stored[name] for name in ("dtype", "torch_dtype", "transformers_version") if name in stored}
    return {**top, **stored["text_config"], **own}


def _dtype(config: Mapping[str, Any], record: Mapping[str, str]) -> dict[str, str]:
    """The key by which servers choose their precision, where config.json hasn't it: that of most tensors."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, Mapping) else {}):
        if section.get("dtype") or section.get("torch_dtype"):
            return {}
    most = Counter(record.values()).most_common(1)
    return {"dtype": _DTYPES[most[0][0] if most else "BF16"]}


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    """`old`, with the values of `new` where they aren't those that `old` was read as, section by section."""
    changed = dict(old)
    for name, value in new.items():
        if name in read and value == read[name]:
            continue
        inner = old.get(name), read.get(name)
        if isinstance(value, Mapping) and isinstance(inner[0], Mapping) and isinstance(inner[1], Mapping):
            changed[name] = _changed(inner[0], value, inner[1])
        else:
            changed[name] = value
    return changed

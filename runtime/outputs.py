"""What a run leaves beside its checkpoints: the resolved arguments, the `hf/` folder, `loss.png`."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.hf_folder import RECORD, HfFolder, companions, read_config

if TYPE_CHECKING:
    from transformers import ProcessorMixin

PACKAGES = ("torch", "megatron-core", "transformers", "qwen-vl-utils", "datasets", "pillow")
LOSS = "lm loss"
VALIDATION_LOSS = "lm loss validation"


def write_arguments(args: Namespace, path: Path) -> None:
    """Write every resolved argument and the versions that run it, as JSON; values that JSON lacks as text."""
    record = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "arguments": dict(sorted(vars(args).items())),
    }
    _write_text(path, json.dumps(record, indent=2, default=str) + "\n")


@dataclass(frozen=True)
class HfOrigin:
    """The HuggingFace folder that training came from, now or in the run whose checkpoint it starts from.

    folder: with its config.json and companions; None if there was none.
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
        """From a checkpoint's `hf/` folder."""
        record = folder / RECORD
        return cls(folder, json.loads(record.read_text()) if record.is_file() else {})


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
    if path.exists() and json.loads(path.read_text()) != config:
        raise ValueError(
            f"{path} describes another model than this run's arguments; give --save a folder of its own, "
            "or the arguments that the checkpoint was made with"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if origin.folder is not None and origin.folder.resolve() != folder.resolve():
        for file in companions(origin.folder):
            shutil.copyfile(file, folder / file.name)
    if processor is not None and not origin.has_processor:
        processor.save_pretrained(folder)
    if with_record and origin.record:
        _write_text(folder / RECORD, json.dumps(origin.record, indent=1) + "\n")
    _write_text(path, json.dumps(config, indent=2) + "\n")


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`new`, and what only `old` has, section by section."""
    merged = {**old, **new}
    for name, value in new.items():
        if isinstance(value, Mapping) and isinstance(old.get(name), Mapping):
            merged[name] = _merged(old[name], value)
    return merged


def draw_losses(tensorboard_dir: Path, path: Path) -> dict[str, list[tuple[int, float]]]:
    """Draw training and validation loss from a run's TensorBoard events, resumed parts included.

    Returns:
        The two curves as (iteration, loss) points, by TensorBoard tag.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display on a cluster
    from matplotlib import pyplot
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tensorboard_dir), size_guidance={"scalars": 0}).Reload()
    recorded = set(events.Tags()["scalars"])
    curves = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in (LOSS, VALIDATION_LOSS)
        if tag in recorded
    }
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for tag, marker in ((LOSS, None), (VALIDATION_LOSS, "o")):
        if tag in curves:
            axes.plot(*zip(*curves[tag], strict=True), marker=marker, label=tag)
    axes.set(xlabel="iteration", ylabel="loss per trained token (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return curves


def _write_text(path: Path, text: str) -> None:
    """Under another name, then renamed: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)

"""What a run leaves beside its checkpoints: the resolved arguments, the `hf/` folder, `loss.png`."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def write_hf_folder(folder: Path, config: dict[str, Any], processor: ProcessorMixin | None) -> None:
    """Write `config.json` and the processor's files, which export and transformers need beside the weights.

    Raises:
        ValueError: the folder is there with another architecture: two models in one checkpoint folder.
    """
    path = folder / "config.json"
    if path.exists() and json.loads(path.read_text()) != config:
        raise ValueError(
            f"{path} describes another model than this run's arguments; give --save a folder of its own, "
            "or the arguments that the checkpoint was made with"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if processor is not None:
        processor.save_pretrained(folder)
    _write_text(path, json.dumps(config, indent=2) + "\n")


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

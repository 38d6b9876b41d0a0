"""What a run leaves beside its checkpoints: the resolved arguments and `loss.png`."""

from __future__ import annotations

import json
import platform
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

from runtime.files import write_text

PACKAGES = ("torch", "megatron-core", "transformers", "qwen-vl-utils", "datasets", "pillow")
LOSS = "lm loss"
VALIDATION_LOSS = "lm loss validation"


def write_arguments(args: Namespace, prepared: list[str], path: Path) -> None:
    """Write every resolved argument, the versions that run it and what was changed in them, as JSON.

    Args:
        args: values that JSON lacks are written as text.
        prepared: what `runtime.prepare` gave.
    """
    record = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "prepared": prepared,
        "arguments": dict(sorted(vars(args).items())),
    }
    write_text(path, json.dumps(record, indent=2, default=str) + "\n")


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

"""Which samples a training step consists of, for the message about one that goes wrong.

Megatron stops where it finds NaN in a gradient, after the step's last backward: by then the batch is gone. So the
names of the samples stay on the host until the next step, and with `--dump-bad-batch` the batches stay on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch


@dataclass
class MicroBatch:
    """samples: names, in the order of the batch. batch: None unless it is kept. loss: of it, on the last stage."""

    samples: list[str]
    batch: Batch | None
    loss: Tensor | None = None


@dataclass
class StepRecord:
    """The micro-batches of the step under way.

    folder: `--dump-bad-batch`'s; None: batches aren't kept.
    """

    folder: Path | None = None
    iteration: int = 0
    micro_batches: list[MicroBatch] = field(default_factory=list)

    def add(self, iteration: int, batch: Batch) -> MicroBatch:
        """Take note of a micro-batch; those of the step before are forgotten.

        Args:
            iteration: the step's, counted from 1.
        """
        if iteration != self.iteration:
            self.iteration, self.micro_batches = iteration, []
        entry = MicroBatch(batch.stats.samples, batch if self.folder is not None else None)
        self.micro_batches.append(entry)
        return entry

    def explain(self, rank: int) -> str:
        """Which samples the step has, those with a loss that isn't finite if there are any; saves their batches.

        Reads losses from the device.
        """
        numbered = list(enumerate(self.micro_batches, start=1))
        bad = [(n, entry) for n, entry in numbered if entry.loss is not None and not entry.loss.isfinite().all()]
        lines = [
            f"iteration {self.iteration}, micro-batch {number} of {len(numbered)} on rank {rank}"
            + (f", whose loss is {float(entry.loss):g}" if entry.loss is not None else "")
            + f": samples {', '.join(entry.samples)}"
            for number, entry in bad or numbered
        ]
        if self.folder is None:
            lines.append("--dump-bad-batch DIR saves the batch")
        else:
            lines.append(f"saved {_save(self.folder, self.iteration, bad or numbered, rank)}")
        return "\n".join(lines)


def _save(folder: Path, iteration: int, entries: list[tuple[int, MicroBatch]], rank: int) -> Path:
    """One file, which `torch.load(weights_only=True)` reads: names, and tensors by the batch's own field names."""
    path = folder / f"iter_{iteration:07d}_rank_{rank:04d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    micro_batches = [
        {"number": number, "samples": entry.samples, "loss": entry.loss, "batch": _plain(entry.batch)}
        for number, entry in entries
        if entry.batch is not None
    ]
    torch.save({"iteration": iteration, "rank": rank, "micro_batches": micro_batches}, path)
    return path


def _plain(batch: Batch) -> dict[str, Any]:
    """A batch's tensors on the host; what isn't a tensor as it is."""
    values = {entry.name: getattr(batch, entry.name) for entry in fields(batch) if entry.name != "stats"}
    vision = values.pop("vision") or ()
    values["vision"] = [{name: _on_host(value) for name, value in of_rank.items()} for of_rank in vision]
    return {name: _on_host(value) for name, value in values.items()}


def _on_host(value: Any) -> Any:
    # A copy: views of the batch's one buffer would each be saved with all of it.
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value

"""Synthetic receipts as a dataset: drawn once, written as parquet in CORD-v2's schema, read back with `datasets`.

    values.py (what it says)  drawing.py (how it looks)  ->  <folder>/data/train-00000-of-00001.parquet

Columns are CORD-v2's: `image`, and `ground_truth`, a JSON string with gt_parse, meta, valid_line, roi,
repeating_symbol and dontcare. So `cord_v2` reads these folders too.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import multiprocessing
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import datasets
import PIL
from filelock import FileLock

from data.conversation import Conversation, Split
from data.dataset import ConversationDataset, one_path
from data.receipts import drawing as receipt_drawing
from data.receipts import values as receipt_values
from data.receipts.drawing import draw
from data.receipts.values import ask, draw_receipt
from data.sample import SampleOptions
from runtime import lifetime

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from models.spec import ModelInputs

SEED = 0  # of the dataset: the same receipts whatever a run's --seed
SPLIT_SIZES: Mapping[str, int] = {"train": 3000, "validation": 256, "test": 256}
QUESTIONS_PER_RECEIPT: Mapping[str, int] = {"train": 4, "validation": 1, "test": 1}
DEFAULT_ROOT = Path(__file__).resolve().parents[2] / "outputs" / "receipts"


def build(args: Namespace, split: Split, processor: ProcessorMixin, model_inputs: ModelInputs) -> ConversationDataset:
    """The split as a dataset of samples, drawn into `--dataset-path` when it isn't there; see `data.BuildDataset`."""
    folder = ensure_receipts(Path(one_path(args) or DEFAULT_ROOT))
    conversations = Receipts(folder, split, questions=QUESTIONS_PER_RECEIPT[split])
    return ConversationDataset(
        conversations,
        processor,
        SampleOptions.of(args),
        name=f"receipts/{split}",
        source=conversations.fingerprint,
        cache_dir=folder,
    )


class Receipts:
    """`data.conversation.Conversations` over a split: each receipt `questions` times, each time asked differently.

    Args:
        folder: what `ensure_receipts` returned.
        split: "train", "validation" or "test".
        questions: conversations per receipt.
    """

    def __init__(self, folder: Path, split: str, *, questions: int = 1) -> None:
        file = folder / "data" / f"{split}-00000-of-00001.parquet"
        cache = str(folder / "cache") if os.access(folder, os.W_OK) else None
        rows = datasets.Dataset.from_parquet(str(file), cache_dir=cache)
        self._rows = rows.cast_column("image", datasets.Image(decode=False))
        self._split, self._questions = split, questions
        self.fingerprint = f"{folder.name}/{split}/{questions}"

    def __len__(self) -> int:
        return len(self._rows) * self._questions

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"receipts/{self._split} has {len(self)} conversations, not {index}")
        variant, number = divmod(index, len(self._rows))
        row = self._rows[number]
        name = f"receipts/{self._split}/{index}"
        parse = json.loads(row["ground_truth"])["gt_parse"]
        asked = ask(parse, Random(f"question/{self._split}/{number}/{variant}"))
        content = [
            {"type": "image", "image": row["image"]},
            {"type": "text", "text": asked.question},
        ]
        return Conversation(
            messages=[{"role": "user", "content": content}, {"role": "assistant", "content": asked.answer}],
            id=name,
            value_spans=asked.value_spans,
        )


def ensure_receipts(root: Path, *, sizes: Mapping[str, int] = SPLIT_SIZES, seed: int = SEED) -> Path:
    """The folder of the drawn receipts, drawing them first if need be.

    Safe with any number of processes: one draws into a hidden folder and renames it, the others wait for the lock;
    without locks (some network file systems) each draws, and the first to finish is kept.

    Args:
        root: holds one folder per generator version, seed and sizes.
        sizes: receipts per split.
        seed: of all draws; splits differ whatever it is.
    """
    counts = "-".join(f"{split}{count}" for split, count in sizes.items())
    folder = root / f"receipts-{generator_version()}-seed{seed}-{counts}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{folder.name}.lock"):
        if folder.is_dir():
            return folder
        hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
        try:
            for split, count in sizes.items():
                _write_split(hidden / "data" / f"{split}-00000-of-00001.parquet", split, count, seed)
            hidden.chmod(0o755)  # mkdtemp's is private
            os.rename(hidden, folder)
        except OSError:
            if not folder.is_dir():  # else another process, unseen by the lock, was first
                raise
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    return folder


def generator_version() -> str:
    """Changes with the code that draws receipts and with Pillow, whose fonts they are printed in."""
    digest = hashlib.sha256(PIL.__version__.encode())
    for module in (receipt_values, receipt_drawing):
        digest.update(Path(inspect.getfile(module)).read_bytes())
    return digest.hexdigest()[:8]


def make_row(split: str, index: int, seed: int) -> dict[str, Any]:
    """One row: values from one stream of random numbers, looks from another."""
    receipt = draw_receipt(Random(f"values/{seed}/{split}/{index}"))
    drawing = draw(receipt, Random(f"looks/{seed}/{split}/{index}"))
    png = io.BytesIO()
    drawing.image.save(png, "PNG", compress_level=1)
    width, height = drawing.image.size
    ground_truth = {
        "gt_parse": receipt.ground_truth(),
        "meta": {
            "version": "2.0.0",
            "split": split,
            "image_id": index,
            "image_size": {"width": width, "height": height},
        },
        "valid_line": drawing.valid_line,
        "roi": {},
        "repeating_symbol": [],
        "dontcare": [],
    }
    return {"image": {"bytes": png.getvalue(), "path": None}, "ground_truth": json.dumps(ground_truth)}


def _write_split(file: Path, split: str, count: int, seed: int) -> None:
    workers = min(4, os.cpu_count() or 1)
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, fork, lifetime.end_with_parent, (os.getpid(),)) as pool:
        rows = list(pool.map(partial(make_row, split, seed=seed), range(count), chunksize=32))
    features = datasets.Features({"image": datasets.Image(), "ground_truth": datasets.Value("string")})
    table = datasets.Dataset.from_list(rows, features=features)
    file.parent.mkdir(exist_ok=True)
    table.to_parquet(str(file))

"""How fast samples are made and how well packs are filled: tables of ratios to what others do on the same files.

python scripts/benchmark_data.py [--images N] [--seconds S]

samples/s: one worker, against the bare HuggingFace processor on the same files and texts. batches: micro-batches of
documents against the HuggingFace processor, its padding and labels. waiting: for a loader with two workers, beside
steps in which the host is idle. padding: rows of one sample, packs of one micro-batch, ours and first-fit-decreasing.
start-up: measuring and planning. Each process has one thread; both sides of a ratio take turns, so that what disturbs
the machine disturbs both.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data import DATASET_PROVIDERS
from data.bad_log import BadSampleLog, BadSamplePolicy
from data.batch import Batch, CollatePacks, collate
from data.dataset import ConversationDataset
from data.lengths import NAMES, lengths_of
from data.pack import IndexedPacks, Pack
from data.plan import PackPlan
from data.reader import BatchReader, Ranks
from data.receipts.processor import processor_for
from data.sizes import Sizes, measure
from models.qwen35_vl.configuration import VARIANTS
from models.qwen35_vl.inputs import Qwen35VLInputs
from runtime import quiet_libraries

STEPS = (0, 100, 300, 1000)  # milliseconds of a step in the table of waiting
ROUNDS = 5  # turns of each measurement
MAX_PIXELS = 200_000  # of an image
CHATS = (12, 60)  # words of a question and of an answer
# Documents of a batch, its tokens, and the pixels of an image and the words of a text that fill them.
BATCHES = ((32, 16_384, 400_000, CHATS), (64, 8_192, 60_000, (4, 12)))
BUDGET = 4096  # tokens of a pack in the table of padding
WORDS = (
    *("the", "receipt", "shows", "a", "total", "of", "seventeen", "and", "a", "shop", "named", "oak", "with"),
    *("two", "lines", "of", "tea"),
)


def write_chats(folder: Path, count: int, words: tuple[int, int] = CHATS) -> Path:
    """JPEG photographs of noise and chats about them."""
    folder.mkdir()
    numbers = random.Random(0)
    rows = []
    for index in range(count):
        size = (numbers.randrange(200, 900), numbers.randrange(200, 900))
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{index}.jpeg", quality=85)
        question, answer = (" ".join(numbers.choices(WORDS, k=length)) for length in words)
        rows.append({"prompt": f"<image>{question}", "completion": answer, "images": [f"{index}.jpeg"]})
    path = folder / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def rates(works: Sequence[Callable[[int], Any]], count: int, seconds: float) -> list[float]:
    """Calls per second of this process' time, over the same indices again and again: the median of ROUNDS turns.

    Args:
        count: indices there are.
        seconds: of all turns of one of the works.
    """
    found: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, speeds in zip(works, found, strict=True):
            done, start, used = 0, time.perf_counter(), time.process_time()
            while time.perf_counter() - start < seconds / ROUNDS or done < 1:
                work(done % count)
                done += 1
            speeds.append(done / (time.process_time() - used))
    return [float(np.median(speeds)) for speeds in found]


def chats(path: Path, processor: Any, seq_length: int, max_pixels: int = MAX_PIXELS) -> ConversationDataset:
    args = Namespace(
        dataset_path=[str(path)],
        data_cache_path=str(path.parent / "cache"),
        media_root=None,
        split=None,
        num_workers=0,
        seq_length=seq_length,
        min_pixels=None,
        max_pixels=max_pixels,
        params_dtype=torch.float32,
        strict_special_mask=False,
        train_on="all",
        chat_template_kwargs="{}",
    )
    inputs = Qwen35VLInputs(VARIANTS["tiny"])
    dataset = DATASET_PROVIDERS["chat"].build(args, "train", processor, inputs)
    assert isinstance(dataset, ConversationDataset)
    return dataset


def hf_inputs(rows: list[dict[str, Any]], folder: Path, processor: Any, max_pixels: int = MAX_PIXELS) -> Any:
    """The bare processor's, which pads a batch by itself, and labels as HuggingFace's collators make them."""
    texts, images = [], []
    for row in rows:
        question = [{"type": "image"}, {"type": "text", "text": row["prompt"].removeprefix("<image>")}]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["completion"]}]
        texts.append(processor.apply_chat_template(turns, tokenize=False))
        images.append(Image.open(folder / row["images"][0]).convert("RGB"))
    sizes = {"min_pixels": processor.image_processor.size["shortest_edge"], "max_pixels": max_pixels}
    made = processor(text=texts, images=images, padding=True, return_tensors="pt", **sizes)
    made["labels"] = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
    return made


def samples_table(path: Path, count: int, seconds: float) -> list[str]:
    processor = processor_for(VARIANTS["tiny"].to_hf())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    dataset = chats(path, processor, 4096)

    def bare(index: int) -> Any:
        return hf_inputs([rows[index]], path.parent, processor)

    lines = ["| per second of one process | ours | HuggingFace | ratio |", "| --- | --- | --- | --- |"]
    ours, theirs = rates((lambda index: dataset[index], bare), count, seconds)
    lines.append(f"| samples | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} |")
    for number, (documents, seq_length, pixels, words) in enumerate(BATCHES):
        path = write_chats(path.parent.parent / f"batches-{number}", count, words)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        ours, theirs = rates(
            (
                partial(packed_batch, chats(path, processor, seq_length, pixels), documents, seq_length),
                partial(padded_batch, rows, path.parent, processor, documents, pixels),
            ),
            count,
            seconds,
        )
        name = f"batches of {documents} documents in {seq_length:,} tokens"
        lines.append(f"| {name} | {ours:.3f} | {theirs:.3f} | {ours / theirs:.2f} |")
    return lines


def padded_batch(
    rows: list[dict[str, Any]], folder: Path, processor: Any, documents: int, max_pixels: int, index: int
) -> Any:
    chosen = [rows[(index * documents + place) % len(rows)] for place in range(documents)]
    return hf_inputs(chosen, folder, processor, max_pixels)


def packed_batch(dataset: ConversationDataset, documents: int, seq_length: int, index: int) -> Batch:
    pack: Pack = [dataset[(index * documents + place) % len(dataset)] for place in range(documents)]
    assert sum(len(sample.input_ids) for sample in pack) <= seq_length
    return collate_of(seq_length, dataset.processor)([pack])


def collate_of(seq_length: int, processor: Any) -> CollatePacks:
    return partial(
        collate,
        model_inputs=Qwen35VLInputs(VARIANTS["tiny"]),
        alignment=1,
        packed=True,
        seq_len=seq_length,
        dtype=torch.float32,
        pad_token_id=processor.tokenizer.pad_token_id,
    )


class _Alone:
    """A process group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def waiting_table(path: Path, batches: int) -> list[str]:
    """How long a training waits for packs of 4,096 tokens; the first batch, which starts the workers, isn't counted."""
    processor = processor_for(VARIANTS["tiny"].to_hf())
    dataset = chats(path, processor, BUDGET)
    group: Any = _Alone()
    lines = ["| milliseconds of a step | waiting, median | 90% of the steps below |", "| --- | --- | --- |"]
    for step in STEPS:
        source = IndexedPacks(dataset, PackPlan(measure(dataset), seed=0, token_budget=BUDGET, packed=True), order="")
        reader = BatchReader(
            source,
            collate_of(BUDGET, processor),
            Ranks(0, 1, group, group),
            micro_batch_size=1,
            global_batch_size=1,
            workers=2,
            device=torch.device("cpu"),
            log=BadSampleLog(dataset.name, BadSamplePolicy(), None),
        )
        next(reader)
        waits = []
        for _ in range(batches):
            time.sleep(step / 1000)
            start = time.perf_counter()
            next(reader)
            waits.append(1000 * (time.perf_counter() - start))
        lines.append(f"| {step} | {np.median(waits):.1f} | {np.percentile(waits, 90):.1f} |")
    return lines


def first_fit_decreasing(lengths: np.ndarray, budget: int) -> int:
    """Packs of all samples at once, the longest first: the baseline that no stream can have."""
    room: list[int] = []
    lowest = 0  # packs before it are full
    for length in sorted(lengths.tolist(), reverse=True):
        for index in range(lowest, len(room)):
            if room[index] >= length:
                room[index] -= length
                break
        else:
            room.append(budget - length)
        while lowest < len(room) and room[lowest] == 0:
            lowest += 1
    return len(room)


def padding_table(count: int) -> list[str]:
    lines = [
        "| lengths | a row each | eight samples packed | ours | first-fit-decreasing | ours above the least |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in NAMES:
        lengths = lengths_of(name, count, BUDGET)
        sizes = Sizes(lengths.astype(np.int32), np.zeros(count, np.int32), lengths.astype(np.int32), {}, {})
        packs = PackPlan(sizes, seed=0, token_budget=BUDGET, packed=True).epoch_packs()
        in_eights = sum(first_fit_decreasing(part, BUDGET) for part in np.array_split(lengths, count // 8))
        least = max(-(-int(lengths.sum()) // BUDGET), int((lengths > BUDGET // 2).sum()))
        shares = [
            1 - lengths.sum() / (number * BUDGET)
            for number in (count, in_eights, packs, first_fit_decreasing(lengths, BUDGET))
        ]
        lines.append(f"| {name} | {' | '.join(f'{share:.2%}' for share in shares)} | {packs / least - 1:.2%} |")
    return lines


def startup_table(folder: Path, many: int) -> list[str]:
    """1,000 and `many` chats without images: opened, and planned; the 1,000 also measured, once and from the cache."""
    processor = processor_for(VARIANTS["tiny"].to_hf())
    lines = [
        "| chats | file opened | sizes measured | sizes from the cache | packs planned |",
        "| --- | --- | --- | --- | --- |",
    ]
    for count in (1_000, many):
        path = folder / f"text-{count}.jsonl"
        with path.open("w") as file:
            for index in range(count):
                row = {"prompt": f"{index} {' '.join(WORDS[:8])}", "completion": " ".join(WORDS[: 1 + index % 15])}
                file.write(json.dumps(row) + "\n")
        clock = _Clock()
        dataset = chats(path, processor, BUDGET)
        opened = clock.lap()
        measured = again = "-"
        if count != many:
            measure(dataset)
            measured = clock.lap()
            measure(chats(path, processor, BUDGET))
            again = clock.lap()
        tokens = lengths_of("chat-like", count, BUDGET).astype(np.int32)
        patches = np.where(np.arange(count) % 2, np.minimum(tokens * 4, 16_000), 0).astype(np.int32)
        sizes = Sizes(tokens, patches, tokens, {}, {})
        clock.lap()
        PackPlan(sizes, seed=0, token_budget=BUDGET, patch_budget=16_384, packed=True).epoch_packs()
        lines.append(f"| {count:,} | {opened} | {measured} | {again} | {clock.lap()} |")
    return lines


class _Clock:
    """Seconds since the last lap, and in brackets those of the processor."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def lap(self) -> str:
        now = time.perf_counter(), time.process_time()
        wall, used = (end - start for end, start in zip(now, self._start, strict=True))
        self._start = now
        return f"{wall:.2f} s ({used:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="Chats with a photograph each")
    parser.add_argument("--seconds", type=float, default=20.0, help="Of each measurement")
    parser.add_argument("--lengths", type=int, default=10_000, help="Samples in the table of padding")
    parser.add_argument("--batches", type=int, default=20, help="Batches that are waited for")
    parser.add_argument("--chats", type=int, default=1_000_000, help="Of the larger start-up")
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_chats(folder / "chats", options.images)
        for table in (
            lambda: padding_table(options.lengths),
            lambda: samples_table(path, options.images, options.seconds),
            lambda: waiting_table(path, options.batches),
            lambda: startup_table(folder, options.chats),
        ):
            print("\n".join(table()), end="\n\n", flush=True)


if __name__ == "__main__":
    main()

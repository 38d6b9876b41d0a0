"""How fast samples are made and how well packs are filled: tables of ratios to what others do on the same files.

python scripts/benchmark_data.py [--images N] [--seconds S]

samples/s: one worker, against the bare HuggingFace processor on the same files and texts. batches: micro-batches of
documents against the HuggingFace processor and padding. padding: rows of one sample, packs of one micro-batch, ours and
first-fit-decreasing. start-up: measuring and planning. Single-threaded, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data import DATASET_PROVIDERS
from data.batch import collate
from data.dataset import ConversationDataset
from data.lengths import NAMES, lengths_of
from data.pack import Pack
from data.plan import PackPlan
from data.receipts.processor import processor_for
from data.sizes import Sizes, measure
from models.qwen35_vl.configuration import VARIANTS
from models.qwen35_vl.inputs import Qwen35VLInputs
from runtime import quiet_libraries

BUDGET = 4096  # tokens of a pack in the table of padding
WORDS = (
    *("the", "receipt", "shows", "a", "total", "of", "seventeen", "and", "a", "shop", "named", "oak", "with"),
    *("two", "lines", "of", "tea"),
)


def write_chats(folder: Path, count: int, seed: int = 0) -> Path:
    """JPEG photographs of noise and chats about them."""
    numbers = random.Random(seed)
    rows = []
    for index in range(count):
        size = (numbers.randrange(200, 900), numbers.randrange(200, 900))
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{index}.jpeg", quality=85)
        question, answer = (" ".join(numbers.choices(WORDS, k=length)) for length in (12, 60))
        rows.append({"prompt": f"<image>{question}", "completion": answer, "images": [f"{index}.jpeg"]})
    path = folder / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def rate(work: Callable[[int], Any], count: int, seconds: float) -> float:
    """Calls per second, over the same indices again and again; the best of three."""
    best = 0.0
    for _ in range(3):
        done, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds / 3:
            work(done % count)
            done += 1
        best = max(best, done / spent)
    return best


def chats(path: Path, processor: Any, seq_length: int) -> ConversationDataset:
    args = Namespace(
        dataset_path=[str(path)],
        data_cache_path=str(path.parent / "cache"),
        media_root=None,
        split=None,
        num_workers=0,
        seq_length=seq_length,
        min_pixels=None,
        max_pixels=200_000,
        params_dtype=torch.float32,
        strict_special_mask=False,
        train_on="all",
        chat_template_kwargs="{}",
    )
    inputs = Qwen35VLInputs(VARIANTS["tiny"])
    dataset = DATASET_PROVIDERS["chat"].build(args, "train", processor, inputs)
    assert isinstance(dataset, ConversationDataset)
    return dataset


def hf_inputs(rows: list[dict[str, Any]], folder: Path, processor: Any) -> Any:
    """The bare processor's, which pads a batch by itself."""
    texts, images = [], []
    for row in rows:
        question = [{"type": "image"}, {"type": "text", "text": row["prompt"].removeprefix("<image>")}]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["completion"]}]
        texts.append(processor.apply_chat_template(turns, tokenize=False))
        images.append(Image.open(folder / row["images"][0]).convert("RGB"))
    sizes = {"min_pixels": processor.image_processor.size["shortest_edge"], "max_pixels": 200_000}
    return processor(text=texts, images=images, padding=True, return_tensors="pt", **sizes)


def samples_table(folder: Path, count: int, seconds: float) -> list[str]:
    config = VARIANTS["tiny"].to_hf()
    processor = processor_for(config)
    path = write_chats(folder, count)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    dataset = chats(path, processor, 4096)
    ours = rate(lambda index: dataset[index], count, seconds)
    bare = rate(lambda index: hf_inputs([rows[index]], folder, processor), count, seconds)
    lines = ["| what | ours | HuggingFace | ratio |", "| --- | --- | --- | --- |"]
    lines.append(f"| samples/s of one worker | {ours:.1f} | {bare:.1f} | {ours / bare:.2f} |")
    for documents, seq_length in ((32, 16_384), (64, 8_192)):
        shrunk = chats(path, processor, seq_length)
        make = partial(
            collate,
            model_inputs=_model_inputs(),
            alignment=1,
            packed=True,
            seq_len=seq_length,
            dtype=torch.float32,
            pad_token_id=processor.tokenizer.pad_token_id,
        )

        def batch(index: int, dataset: ConversationDataset = shrunk, number: int = documents, make: Any = make) -> Any:
            pack: Pack = [dataset[(index * number + place) % count] for place in range(number)]
            return make([pack])

        def theirs(index: int, number: int = documents) -> Any:
            return hf_inputs([rows[(index * number + place) % count] for place in range(number)], folder, processor)

        mine, bare = rate(batch, count, seconds), rate(theirs, count, seconds)
        lines.append(f"| micro-batches/s of {documents} documents | {mine:.2f} | {bare:.2f} | {mine / bare:.2f} |")
    return lines


def _model_inputs() -> Any:
    import arguments

    words = ["--model-variant", "tiny", "--seq-length", "4096", "--micro-batch-size", "1"]
    command_line = arguments.preflight_or_exit(words)
    return command_line.spec.model_inputs(command_line.config)


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


def startup_table(folder: Path) -> list[str]:
    """Measuring 1,000 chats, and planning 1,000 and a million of known sizes."""
    processor = processor_for(VARIANTS["tiny"].to_hf())
    path = folder / "text.jsonl"
    rows = [{"prompt": " ".join(WORDS), "completion": " ".join(WORDS[: 1 + index % 15])} for index in range(1000)]
    path.write_text("\n".join(map(json.dumps, rows)))
    start = time.perf_counter()
    measure(chats(path, processor, BUDGET))
    lines = ["| start-up | seconds |", "| --- | --- |", f"| 1,000 chats measured | {time.perf_counter() - start:.2f} |"]
    for count in (1_000, 1_000_000):
        tokens = lengths_of("chat-like", count, BUDGET).astype(np.int32)
        patches = np.where(np.arange(count) % 2, np.minimum(tokens * 4, 16_000), 0).astype(np.int32)
        wall, start = time.perf_counter(), time.process_time()
        PackPlan(
            Sizes(tokens, patches, tokens, {}, {}), seed=0, token_budget=BUDGET, patch_budget=16_384, packed=True
        ).epoch_packs()
        cpu, wall = time.process_time() - start, time.perf_counter() - wall
        lines.append(f"| {count:,} chats planned, with a patch budget | {wall:.2f} ({cpu:.2f} of the CPU) |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="Chats with a photograph each")
    parser.add_argument("--seconds", type=float, default=12.0, help="Of each measurement")
    parser.add_argument("--lengths", type=int, default=10_000, help="Samples in the table of padding")
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for table in (
            padding_table(options.lengths),
            startup_table(Path(folder)),
            samples_table(Path(folder), options.images, options.seconds),
        ):
            print("\n".join(table), end="\n\n", flush=True)


if __name__ == "__main__":
    main()

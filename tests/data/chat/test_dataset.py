"""The provider `chat`: every form as samples, and files that were damaged in two hundred ways."""

from __future__ import annotations

import io
import json
import random
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Qwen3VLProcessor

from data import DATASET_PROVIDERS
from data.bad_log import BadSampleLog, BadSamplePolicy
from data.bad_sample import BadSample
from data.batch import collate
from data.dataset import ConversationDataset
from data.pack import IndexedPacks
from data.plan import PackPlan
from data.reader import BatchReader, Ranks
from data.receipts.processor import build_processor
from data.sizes import measure
from models.qwen35_vl.configuration import VARIANTS
from models.qwen35_vl.inputs import Qwen35VLInputs

PICTURE = Image.effect_noise((64, 64), 60).convert("RGB")
ANSWER = {"role": "assistant", "content": "A."}
KINDS = ("png", "jpeg", "webp", "gif", "tiff", "bmp")


@pytest.fixture(scope="module")
def processor() -> Qwen3VLProcessor:
    config = VARIANTS["tiny"].to_hf()
    return build_processor("tiny", {name: id for name, id in config.items() if name.endswith("_token_id")})


def dataset_of(tmp_path: Path, rows: list[Any], processor: Qwen3VLProcessor, **changes: Any) -> ConversationDataset:
    content = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (tmp_path / "chats.jsonl").write_bytes(b"\n".join(content))
    args = Namespace(
        **{
            "dataset_path": [str(tmp_path / "chats.jsonl")],
            "data_cache_path": str(tmp_path / "cache"),
            "media_root": None,
            "split": None,
            "num_workers": 0,
            "seq_length": 512,
            "min_pixels": None,
            "max_pixels": None,
            "params_dtype": torch.float32,
            "strict_special_mask": False,
            "language_model_only": False,
            "train_on": "all",
            "chat_template_kwargs": "{}",
        }
        | changes
    )
    return DATASET_PROVIDERS["chat"].build(args, "train", processor, None)


def saved(tmp_path: Path, name: str, content: bytes | None = None) -> str:
    """An image file beside the rows, relative to them."""
    if content is None:
        file = io.BytesIO()
        PICTURE.save(file, Path(name).suffix[1:])
        content = file.getvalue()
    (tmp_path / name).write_bytes(content)
    return name


def rows_of_all_forms(image: str) -> list[dict[str, Any]]:
    """The same question and answer."""
    part = {"type": "image", "image": image}
    question = {"role": "user", "content": [part, {"type": "text", "text": "Q?"}]}
    return [
        {"messages": [question, ANSWER]},
        {
            "messages": [{"role": "user", "content": "<image>Q?"}, {"role": "assistant", "content": "A."}],
            "images": [image],
        },
        {"conversations": [{"from": "human", "value": "<image>Q?"}, {"from": "gpt", "value": "A."}], "images": [image]},
        {"conversations": [{"from": "human", "value": "<image>Q?"}, {"from": "gpt", "value": "A."}], "image": image},
        {"prompt": "<image>Q?", "completion": "A.", "images": [image]},
        {"prompt": [question], "completion": [{"role": "assistant", "content": "A."}]},
    ]


def test_all_forms_give_the_same_sample(tmp_path: Path, processor: Qwen3VLProcessor) -> None:
    rows = rows_of_all_forms(saved(tmp_path, "image.png"))
    dataset = dataset_of(tmp_path, [*rows, {"text": "A.<image>", "images": ["image.png"]}], processor)
    first, *others = (dataset[index] for index in range(len(rows)))
    decoded = processor.tokenizer.decode(first.input_ids[first.trained])
    assert (decoded, first.grid_thw.tolist(), first.id) == ("A.<|im_end|>", [[1, 4, 4]], f"{tmp_path}/chats.jsonl:0")
    for other in others:
        assert torch.equal(first.input_ids, other.input_ids) and torch.equal(first.trained, other.trained)
        assert torch.equal(first.pixel_values, other.pixel_values)
    text = dataset[len(rows)]
    assert processor.tokenizer.decode(text.input_ids[text.trained]) == "A.<|endoftext|>"


def test_the_fingerprint_is_of_what_is_trained(tmp_path: Path, processor: Qwen3VLProcessor) -> None:
    rows = [{"prompt": "Q", "completion": "A"}]
    prints = [
        dataset_of(tmp_path, rows, processor).fingerprint,
        dataset_of(tmp_path, rows, processor, train_on="last").fingerprint,
        dataset_of(tmp_path, rows, processor, chat_template_kwargs='{"a": 1}').fingerprint,
        dataset_of(tmp_path, rows, processor, media_root="/media").fingerprint,
        dataset_of(tmp_path, [{"prompt": "Q", "completion": "B"}], processor).fingerprint,
    ]
    assert len(set(prints)) == 5
    assert dataset_of(tmp_path, rows, processor).fingerprint == prints[0]


def damaged(content: bytes, numbers: random.Random) -> bytes:
    """Cut, overwritten, with a piece removed, or with bits turned."""
    place = numbers.randrange(len(content))
    kind = numbers.randrange(4)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + numbers.randbytes(64) + content[place + 64 :]
    if kind == 2:
        return content[:place] + content[place + numbers.randrange(1, 200) :]
    changed = bytearray(content)
    for _ in range(20):
        changed[numbers.randrange(len(changed))] ^= 1 << numbers.randrange(8)
    return bytes(changed)


def test_two_hundred_damaged_files_lose_nothing_but_themselves(tmp_path: Path, processor: Qwen3VLProcessor) -> None:
    """Images and rows, damaged at random, in every form, each between two sound ones."""
    numbers = random.Random(0)
    sound = saved(tmp_path, "sound.png")
    rows: list[Any] = []
    for number in range(200):
        kind = KINDS[number % len(KINDS)]
        name = saved(tmp_path, f"{number}.{kind}")
        row = rows_of_all_forms(name)[number % 6]
        if number % 4 == 3:
            line = damaged(json.dumps(row).encode(), numbers).replace(b"\n", b" ")
            rows.append(line if line.strip() else b"{")
        else:
            (tmp_path / name).write_bytes(damaged((tmp_path / name).read_bytes(), numbers))
            rows.append(row)
        rows.append(rows_of_all_forms(sound)[number % 6])
    dataset = dataset_of(tmp_path, rows, processor)
    sizes = measure(dataset)
    expected = dataset[1]
    reasons = Counter[str](sizes.broken)
    for index in range(len(rows)):
        if sizes.tokens[index] == 0:
            assert index % 2 == 0
            continue
        try:
            sample = dataset[index]
        except BadSample as error:
            assert index % 2 == 0 and f"chats.jsonl:{index}" in str(error) and len(str(error)) < 1000
            reasons[str(error.reason)] += 1
            continue
        assert int(sizes.tokens[index]) == len(sample.input_ids)
        if index % 2:
            assert torch.equal(sample.input_ids, expected.input_ids)
            assert torch.equal(sample.pixel_values, expected.pixel_values)
    assert 100 < reasons.total() <= 200
    print(dict(reasons), "dropped:", dict(sizes.dropped))


class Alone:
    """A process group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def test_resuming_in_mid_epoch_with_other_workers(tmp_path: Path, processor: Qwen3VLProcessor) -> None:
    """The same packs, of which one image only shows at decoding that it is broken."""
    image = saved(tmp_path, "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-900])
    rows = [
        {"prompt": f"<image>{'q ' * (number % 7)}", "completion": f"a {number}", "images": [image]}
        for number in range(40)
    ]
    rows[9]["images"] = ["cut.png"]
    dataset = dataset_of(tmp_path, rows, processor, seq_length=128)
    sizes = measure(dataset)

    def packs(workers: int, position: int, count: int) -> list[list[str]]:
        source = IndexedPacks(dataset, PackPlan(sizes, seed=1, token_budget=128, packed=True), order="")
        source.position = position
        reader = BatchReader(
            source,
            partial(
                collate,
                model_inputs=Qwen35VLInputs(VARIANTS["tiny"]),
                alignment=1,
                packed=True,
                seq_len=128,
                dtype=torch.float32,
                pad_token_id=0,
            ),
            Ranks(0, 1, Alone(), Alone()),
            micro_batch_size=1,
            global_batch_size=2,
            workers=workers,
            device=torch.device("cpu"),
            log=BadSampleLog("chats", BadSamplePolicy(max_fraction=1), None),
        )
        return [next(reader).stats.samples for _ in range(count)]

    expected = packs(0, 0, 24)  # over the end of an epoch
    names = [name for pack in expected for name in pack]
    assert len(names) > 30 and not any(name.endswith(":9") for name in names)
    for workers, position in ((2, 6), (3, 16)):
        assert packs(workers, position, 24 - position) == expected[position:]

"""CORD-v2: photographed receipts with their parse, `naver-clova-ix/cord-v2` or a local copy.

One question per image, "Describe this image.", answered by the parse as a token sequence
(`<s_total><s_total_price>...`): the questions and answers of Megatron-LM's examples/multimodal_dev.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import datasets

from data.bad_sample import BadSample, Reason, shown
from data.cache import cache_folder
from data.conversation import Conversation, Split
from data.dataset import ConversationDataset, one_path
from data.sample import SampleOptions

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from models.spec import ModelInputs

HUB_NAME = "naver-clova-ix/cord-v2"
QUESTION = "Describe this image."
_TAG = re.compile(r"</?s_[^<>]+>|<sep/>")  # of the answers' notation: a value must not hold it


def build(args: Namespace, split: Split, processor: ProcessorMixin, model_inputs: ModelInputs) -> ConversationDataset:
    """The split as a dataset of samples; see `data.BuildDataset`."""
    conversations = CordV2(one_path(args) or HUB_NAME, split)
    return ConversationDataset(
        conversations,
        processor,
        SampleOptions.of(args),
        name=f"cord_v2/{split}",
        source=conversations.fingerprint,
        cache_dir=cache_folder(args),
    )


class CordV2:
    """`data.conversation.Conversations` over rows of (image, ground_truth).

    Args:
        path: hub name; or a folder of parquet files, a clone of the hub's repository or what
            `Dataset.save_to_disk` wrote.
        split: "train", "validation" or "test".

    Raises:
        ValueError: the dataset can't be read or lacks a column.
    """

    def __init__(self, path: str, split: str) -> None:
        self.path, self.split = path, split
        rows = _read(path, split)
        for column in ("image", "ground_truth"):
            if column not in rows.column_names:
                raise ValueError(f"{path}, split {split}: no column {column!r} among {rows.column_names}")
        # Undecoded, so that measuring a sample reads an image's header only. A column of anything else stays as it is,
        # and each row is refused.
        if isinstance(rows.features["image"], datasets.Image):
            rows = rows.cast_column("image", datasets.Image(decode=False))
        self._rows = rows
        self.fingerprint = rows._fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Conversation:
        """
        Raises:
            BadSample: the row is malformed; names the dataset, the split, the row and the key.
        """
        row = self._rows[index]
        where = f"{self.path}, split {self.split}, row {index}"
        parse = _parse(row["ground_truth"], Random(f"{self.split}/{index}"), where)
        image = row["image"]
        if not isinstance(image, dict) or (image.get("bytes") is None and image.get("path") is None):
            raise BadSample(Reason.MISSING, f"{where}, key 'image': {shown(image)}; expected one image")
        try:
            answer = json_to_tokens(parse)
        except BadSample as error:
            raise error.named(f"{where}, key 'ground_truth'") from error
        content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
        return Conversation(
            messages=[
                {"role": "user", "content": content},
                {"role": "assistant", "content": answer},
            ],
            id=f"cord_v2/{self.split}/{index}",
        )


def json_to_tokens(content: Any, place: str = "gt_parse") -> str:
    """A parse as Donut's token sequence: `<s_key>value</s_key>`, `<sep/>` between list entries.

    Keys in descending order, as the common preparations of CORD-v2 for training write them.

    Args:
        place: of the content in the record, for messages.

    Raises:
        BadSample: a value that is neither text nor a number, or a value or a key that reads like the notation's tags.
    """
    if isinstance(content, dict):
        if content.keys() == {"text_sequence"} and isinstance(content["text_sequence"], str):
            return content["text_sequence"]
        for key in content:
            if not key or re.search("[<>]", key):
                raise BadSample(
                    Reason.MALFORMED, f"{place}: key {shown(key)!r} can't stand in the answer's tags; rename it"
                )
        keys = sorted(content, reverse=True)
        return "".join(f"<s_{key}>{json_to_tokens(content[key], f'{place}.{key}')}</s_{key}>" for key in keys)
    if isinstance(content, list):
        return "<sep/>".join(json_to_tokens(entry, f"{place}[{index}]") for index, entry in enumerate(content))
    if isinstance(content, bool) or not isinstance(content, str | int | float) or content != content:
        raise BadSample(
            Reason.MALFORMED, f"{place}: {shown(json.dumps(content, default=repr))}; expected text or a number"
        )
    if _TAG.search(str(content)):
        raise BadSample(Reason.MALFORMED, f"{place}: {shown(content)} reads like the answer's own tags; escape them")
    return str(content)


def _read(path: str, split: str) -> datasets.Dataset:
    folder = Path(path).expanduser()
    try:
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(str(folder))
            if not isinstance(saved, datasets.DatasetDict):
                raise ValueError(
                    "it has no splits, so train, validation and test would be the same rows; save a DatasetDict"
                )
            return saved[split]
        return datasets.load_dataset(str(folder) if folder.is_dir() else path, split=split)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"cannot read {path}, split {split}: {type(error).__name__}: {error}; give --dataset-path a hub name that "
            "can be reached or a folder with CORD-v2's parquet files"
        ) from error


def _parse(ground_truth: Any, rng: Random, where: str) -> dict[str, Any]:
    """The parse to be learnt; any one where a record has several."""
    try:
        record = json.loads(ground_truth)
    except (TypeError, ValueError) as error:
        raise BadSample(Reason.MALFORMED, f"{where}, key 'ground_truth': not JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadSample(Reason.MALFORMED, f"{where}, key 'ground_truth': a JSON {type(record).__name__}, not an object")
    key = "gt_parses" if record.get("gt_parses") else "gt_parse"
    parses = record.get(key) if key == "gt_parses" else [record.get(key)]
    if not isinstance(parses, list) or not all(isinstance(parse, dict) for parse in parses):
        raise BadSample(Reason.MALFORMED, f"{where}, key 'ground_truth.{key}': missing, or not an object")
    return rng.choice(parses)

"""Where training data comes from: `DATASET_PROVIDERS`, the names that `--dataset-provider` takes.

    conversations (conversation.py, receipts.py, cord_v2.py) -> Sample (sample.py) -> Pack (pack.py)
        -> Batch (batch.py), by the loader's workers (loader.py)

A dataset of yours is conversations by index and a function that wraps them, in a module on PYTHONPATH;
`--dataset-provider captions:build_captions` imports it in every process:

    class Captions:                                     # data.conversation.Conversations
        def __len__(self) -> int: ...
        def __getitem__(self, index: int) -> Conversation: ...

    def build_captions(args, split, processor, model_inputs):
        return ConversationDataset(
            Captions(args.dataset_path[0], split), processor, SampleOptions.of(args), name=f"captions/{split}",
            source="captions v1", cache_dir=None,       # source: changes with the data
        )

Order, packing, sharding over ranks, resuming and batches are the harness's. Data that isn't conversations implements
`data.sizes.SampleDataset` instead, as mock.py does.

Torch-free to import: the launcher's preflight lists the names, and the functions import what they need.
"""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from data.conversation import Split

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from data.sizes import SampleDataset
    from models.spec import ModelInputs


# What `--train-on` takes: see `data.sample.SampleOptions`.
TRAIN_ON = ("all", "last", "exact")


class BuildDataset(Protocol):
    def __call__(
        self, args: Namespace, split: Split, processor: ProcessorMixin | None, model_inputs: ModelInputs
    ) -> SampleDataset: ...


@dataclass(frozen=True)
class DatasetProvider:
    """One source of training data.

    name: what `--dataset-provider` calls it.
    needs_processor: its samples are made of text and images with a HuggingFace processor.
    always_images: every sample of it has an image, so that a model of text alone can't train on it.
    build: makes one split, an empty one where the data has none. Called in every process at the same time: what it
        writes to disk is for `data.cache.locked` to guard.
    field_name: the field that evaluation counts an answer's value for, by its keys ("total", "menu.nm"): where the
        same value has several names.
    """

    name: str
    needs_processor: bool
    build: BuildDataset
    always_images: bool = False
    field_name: Callable[[str], str] = str

    def open(
        self, args: Namespace, split: Split, processor: ProcessorMixin | None, model_inputs: ModelInputs
    ) -> SampleDataset:
        """One split, as `build` makes it.

        Raises:
            ValueError: `build` leaves the program, which could end with exit code 0, or makes something else.
        """
        where = f"--dataset-provider {self.name}: for the {split} split"
        try:
            dataset = self.build(args, split, processor, model_inputs)
        except SystemExit as error:
            raise ValueError(f"{where}, it left the program ({error!r})") from error
        needed = ("__len__", "__getitem__", "size", "name", "fingerprint", "cache_dir", "without_pixels")
        if lacking := [name for name in needed if not hasattr(dataset, name)]:
            raise ValueError(
                f"{where}, it gave a {type(dataset).__name__}, which has no {', '.join(lacking)}; "
                "expected a data.sizes.SampleDataset, such as ConversationDataset"
            )
        return dataset

    def processor(self, args: Namespace, config: Mapping[str, Any]) -> ProcessorMixin | None:
        """The processor that the samples are made with: `--hf-processor-path`'s, or the one built in the repo.

        Args:
            config: the model's `config.json` (`ModelConfig.to_hf`).
        """
        if not self.needs_processor:
            return None
        from data.processor import load_processor

        return load_processor(args, config)


def _mock(args: Namespace, split: Split, processor: ProcessorMixin | None, model_inputs: ModelInputs) -> SampleDataset:
    from data.mock import build

    return build(args, split, model_inputs)


def _ragged(
    args: Namespace, split: Split, processor: ProcessorMixin | None, model_inputs: ModelInputs
) -> SampleDataset:
    from data.ragged import RaggedDataset

    return RaggedDataset(
        split,
        model_inputs,
        seed=args.seed,
        longest=args.seq_length,
        dtype=args.params_dtype,
        images=not args.language_model_only,
    )


def _receipts(
    args: Namespace, split: Split, processor: ProcessorMixin | None, model_inputs: ModelInputs
) -> SampleDataset:
    from data.receipts.dataset import build

    return build(args, split, _given(processor), model_inputs)


def _receipts_field(keys: str) -> str:
    from data.receipts.values import schema_field

    return schema_field(keys)


def _chat(args: Namespace, split: Split, processor: ProcessorMixin | None, model_inputs: ModelInputs) -> SampleDataset:
    from data.chat.dataset import build

    return build(args, split, _given(processor), model_inputs)


def _cord_v2(
    args: Namespace, split: Split, processor: ProcessorMixin | None, model_inputs: ModelInputs
) -> SampleDataset:
    from data.cord_v2 import build

    return build(args, split, _given(processor), model_inputs)


def _given(processor: ProcessorMixin | None) -> ProcessorMixin:
    if processor is None:
        raise ValueError("samples of text and images need a processor: hand over what DatasetProvider.processor gave")
    return processor


def is_own_provider(name: str) -> bool:
    """Whether a provider's name is "package.module:function"."""
    return ":" in name


def find_provider(name: str) -> DatasetProvider:
    """What `--dataset-provider` names: one of DATASET_PROVIDERS, or "package.module:name" of a function like
    `DatasetProvider.build`, whose samples are made with a processor, or of a DatasetProvider.

    Raises:
        ValueError: there is none, or its module can't be imported.
    """
    if name in DATASET_PROVIDERS:
        return DATASET_PROVIDERS[name]
    module, _, attribute = name.partition(":")
    if not is_own_provider(name):
        raise ValueError(
            f"--dataset-provider {name}: expected {', '.join(DATASET_PROVIDERS)} or package.module:function"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--dataset-provider {name}: {error}; is its folder on PYTHONPATH?") from error
    except (Exception, SystemExit) as error:  # a module may raise anything, and leave with exit code 0
        raise ValueError(f"--dataset-provider {name}: importing {module} failed: {error!r}") from error
    if isinstance(found, DatasetProvider):
        return found
    if not callable(found):
        raise ValueError(
            f"--dataset-provider {name}: a {type(found).__name__}; expected a function or a DatasetProvider"
        )
    return DatasetProvider(name, needs_processor=True, build=found)


DATASET_PROVIDERS: dict[str, DatasetProvider] = {
    provider.name: provider
    for provider in (
        DatasetProvider("mock", needs_processor=False, build=_mock),
        DatasetProvider("ragged", needs_processor=False, build=_ragged),
        DatasetProvider(
            "receipts", needs_processor=True, build=_receipts, always_images=True, field_name=_receipts_field
        ),
        DatasetProvider("cord_v2", needs_processor=True, build=_cord_v2, always_images=True),
        DatasetProvider("chat", needs_processor=True, build=_chat),
    )
}

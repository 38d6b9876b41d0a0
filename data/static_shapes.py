"""Batches of one shape, whatever is in them, as CUDA graphs need them.

Every tensor is padded to a size that the flags give: tokens by a document of padding at the end of the row, documents
by empty ones, chunks by entries behind a document's end, patches by frames that no token looks at. A batch that
doesn't fit (documents padded to an alignment may exceed the budget) keeps its own shapes.

T packed tokens, N documents, P patches, F frames, R trained rows, G chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import Batch
from models.backends.documents import chunk_indices
from models.common.gdn_kernels import FLA_CHUNK
from models.spec import ModelInputs

# Lengths that the trained rows are padded to are this fraction of the tokens: as many shapes at most.
ROW_STEPS = 8


@dataclass(frozen=True)
class StaticShapes:
    """What a micro-batch is padded to.

    tokens: T. documents: N, the document of padding among them. patches: P. frames: F.
    """

    tokens: int
    documents: int
    patches: int
    frames: int


def pad_batch(batch: Batch, shapes: StaticShapes, model_inputs: ModelInputs, pad_token_id: int) -> Batch:
    """The batch in static shapes; as it is where it doesn't fit.

    Args:
        batch: of one THD row, on one context-parallel rank.
        pad_token_id: input id and label of padding.
    """
    assert batch.cu_seqlens is not None  # the preflight asks for packed rows
    lengths = batch.cu_seqlens.diff().tolist()
    missing = shapes.tokens - sum(lengths)
    if missing:
        lengths.append(missing)
    if missing < 0 or len(lengths) > shapes.documents:
        return batch
    vision = None
    if batch.vision is not None:
        padded = model_inputs.pad_vision(batch.vision[0], shapes.patches, shapes.frames)
        if padded is None:
            return batch
        vision = (padded,)
    lengths += [0] * (shapes.documents - len(lengths))

    def grow(tensor: Tensor, fill: int) -> Tensor:
        return F.pad(tensor, (0, missing), value=fill)

    step = -(-shapes.tokens // ROW_STEPS)
    rows = batch.trained_rows
    return replace(
        batch,
        input_ids=grow(batch.input_ids, pad_token_id),
        labels=grow(batch.labels, pad_token_id),
        loss_mask=grow(batch.loss_mask, 0),
        trained_rows=F.pad(rows, (0, -(-rows.size(-1) // step) * step - rows.size(-1)), value=-1),
        padding_mask=grow(batch.padding_mask, True),
        position_ids=grow(batch.position_ids, 0),
        vision_index=grow(batch.vision_index, -1),
        cu_seqlens=F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32),
        chunk_indices=_padded_chunks(lengths),
        max_seqlen=shapes.tokens,
        vision=vision,
        stats=replace(batch.stats, padding_tokens=batch.stats.padding_tokens + missing),
    )


def _padded_chunks(lengths: list[int]) -> Tensor:
    """[T / chunk + N, 2] int32: as many chunks as any documents of these numbers can have."""
    chunks = chunk_indices(lengths, FLA_CHUNK)
    behind = torch.tensor([len(lengths) - 1, -(-lengths[-1] // FLA_CHUNK)], dtype=torch.int32)
    most = sum(lengths) // FLA_CHUNK + len(lengths)
    return torch.cat([chunks, behind.expand(most - len(chunks), -1)])

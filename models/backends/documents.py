"""Packed documents as tensors: which token is in which document, and rows of one document each.

Only tensor operations and sizes that the host knows: nothing here waits for the device. T packed tokens,
N documents, M tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def document_index(cu_seqlens: Tensor, length: int) -> Tensor:
    """[T] int64: the document that each token is in.

    Args:
        cu_seqlens: [N + 1] document borders.
        length: T. Tokens behind the last border are a document of their own.
    """
    places = torch.arange(length, device=cu_seqlens.device)
    return torch.bucketize(places, cu_seqlens[1:], right=True)


def chunk_indices(lengths: Sequence[int], size: int) -> Tensor:
    """[G, 2] int32: which chunk of which document each of the packed row's chunks is, both counted from 0.

    Documents of 100, 0 and 64 tokens in chunks of 64: (0, 0), (0, 1), (2, 0). Made where lengths are numbers of the
    host, in the loader's workers; kernels that made it themselves would wait for the device.

    Args:
        lengths: tokens of each document.
        size: tokens of a chunk; a document's last one may have fewer.
    """
    chunks = torch.tensor([-(-length // size) for length in lengths])
    document = torch.repeat_interleave(torch.arange(len(lengths)), chunks)
    first = chunks.cumsum(0) - chunks
    return torch.stack([document, torch.arange(len(document)) - first[document]], dim=1).to(torch.int32)


@dataclass(frozen=True)
class DocumentRows:
    """Packed tokens laid out as one row per document, and back.

    token: [N, M] int64, the token at each place of a row. Places behind a document's end hold some other token:
        mask them as keys, drop them as queries.
    place: [T] int64, where each token is in the flattened rows.
    lengths: [N] tokens per document.
    """

    token: Tensor
    place: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, length: int, longest: int) -> DocumentRows:
        borders = cu_seqlens.long()
        token = borders[:-1, None] + torch.arange(longest, device=borders.device)
        document = document_index(borders, length)
        place = torch.arange(length, device=borders.device) - borders[document] + document * longest
        return cls(token.clamp(max=length - 1), place, borders.diff())

    def to_rows(self, tokens: Tensor) -> Tensor:
        """[T, ...] -> [N, M, ...]."""
        return tokens.index_select(0, self.token.flatten()).unflatten(0, self.token.shape)

    def to_tokens(self, rows: Tensor) -> Tensor:
        """[N, M, ...] -> [T, ...]."""
        return rows.flatten(0, 1).index_select(0, self.place)

"""Packed documents as megatron-core's layers are told of them, with what ours need besides."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class PackedDocuments(PackedSeqParams):
    """megatron-core's description of THD documents.

    chunk_indices: [G, 2] int32 of all the row's chunks of `models.common.gdn_kernels.FLA_CHUNK` tokens; see
        `models.backends.documents.chunk_indices`. May be longer: entries behind a document's end are computed for
        nothing. None: the kernels make it.
    """

    chunk_indices: Tensor | None = None

"""What a backend offers to the files that assemble layers."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.torch_norm import LayerNormBuilder


class Backend(BackendSpecProvider, Protocol):
    """megatron-core's provider, and the norms that its configuration can't express."""

    @abstractmethod
    def plain_rms_norm(self) -> LayerNormBuilder:
        """RMSNorm whose weight multiplies as it is, whether or not the configuration says zero-centred gamma."""
        ...

"""What layers are made of: `torch` (CPU, and the reference) or `te` (Transformer Engine, GPU).

A backend is a megatron-core `BackendSpecProvider` with what Qwen3.5 needs besides. `specs.py` of an architecture
assembles the same layers from either.
"""

from __future__ import annotations

from models.backends.backend import Backend


def get_backend(transformer_impl: str, *, adapters: bool = False) -> Backend:
    """The backend that `--transformer-impl` names.

    Args:
        adapters: its linears are to take LoRA's.

    Raises:
        ValueError: another name.
        ImportError: Transformer Engine asked for and not installed.
    """
    if transformer_impl == "local":
        from models.backends.torch import TorchBackend

        return TorchBackend()
    if transformer_impl == "transformer_engine":
        from models.backends.te import TEBackend

        return TEBackend(adapters=adapters)
    raise ValueError(f"--transformer-impl {transformer_impl}: choose local or transformer_engine")

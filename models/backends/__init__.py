"""What layers are made of: `torch` (CPU, and the reference) or `te` (Transformer Engine, GPU).

A backend is a megatron-core `BackendSpecProvider` with what Qwen3.5 needs besides. `specs.py` of an architecture
assembles the same layers from either.
"""

from __future__ import annotations

from models.backends.backend import Backend


def get_backend(transformer_impl: str, *, adapters: bool = False, stack_experts: bool = True) -> Backend:
    """The backend that `--transformer-impl` names.

    Args:
        adapters: its linears are to take LoRA's.
        stack_experts: see `Backend`.

    Raises:
        ValueError: another name.
        ImportError: Transformer Engine asked for and not installed.
    """
    if transformer_impl == "local":
        from models.backends.torch import TorchBackend

        return TorchBackend(stack_experts=stack_experts)
    if transformer_impl == "transformer_engine":
        from models.backends.te import TEBackend

        return TEBackend(adapters=adapters, stack_experts=stack_experts)
    raise ValueError(f"--transformer-impl {transformer_impl}: choose local or transformer_engine")

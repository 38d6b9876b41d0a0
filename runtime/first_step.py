"""What a start on a GPU waits for, said before it does. On a CPU nothing takes long."""

from __future__ import annotations

import functools

import torch


@functools.cache
def announce() -> None:
    """The first step is about to begin."""
    _say(
        "first step: Triton and torch.compile make the kernels that this machine's caches (TRITON_CACHE_DIR, "
        "TORCHINDUCTOR_CACHE_DIR) don't have yet. The first start on a machine takes minutes, later ones seconds"
    )


@functools.cache
def announce_check(transformer_impl: str) -> None:
    """The kernels are about to be compared with torch; see `models.spec.ModelSpec.check_kernels`."""
    kernels = "the loss's"
    if transformer_impl != "local":
        kernels += ", flash-linear-attention's and Transformer Engine's attention"
    _say(
        f"comparing kernels with torch: {kernels}. They are compiled for this model's sizes the first time on a "
        "machine, in about two minutes, and loaded within seconds from then on"
    )


def _say(text: str) -> None:
    if torch.cuda.is_available() and torch.distributed.get_rank() == 0:
        print(f"> {text}", flush=True)

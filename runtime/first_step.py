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
def announce_check(layers: bool) -> None:
    """The kernels are about to be compared with torch; see `models.spec.ModelSpec.check_kernels`.

    Args:
        layers: those of the layers too, flash-linear-attention's and Transformer Engine's.
    """
    if not layers:
        _say("comparing the loss's kernels with torch, a few seconds where they have to be compiled")
        return
    _say(
        "comparing kernels with torch: the loss's, flash-linear-attention's, Transformer Engine's attention. They are "
        "compiled for this model's sizes the first time on a machine, in about two minutes, and loaded within seconds "
        "from then on"
    )


def _say(text: str) -> None:
    if torch.cuda.is_available() and torch.distributed.get_rank() == 0:
        print(f"> {text}", flush=True)

"""Megatron as this harness runs it: without CUDA where there is none, with its known defects patched."""

from __future__ import annotations

import os


def prepare() -> list[str]:
    """Make this process ready for Megatron: the first thing that every program does which imports it.

    Redirects the CUDA API to the CPU where no CUDA device exists (`runtime.cpu`), patches the defects of the pinned
    megatron-core (`runtime.patches`), puts this harness's saving and loading of checkpoints around Megatron's
    (`runtime.saving`, `runtime.loading`), counts losses that aren't finite (`runtime.not_finite`), and skips steps
    without a trained token (`runtime.empty_steps`). Calling it again changes nothing.

    Returns:
        What was changed, for the record: names of patches, and "cpu" where the CUDA API is redirected.

    Raises:
        runtime.patches.UnknownMegatronVersion: another megatron-core is installed.
    """
    from runtime import cpu

    redirected = cpu.enable()  # before megatron is imported, which the others do
    from runtime import empty_steps, loading, not_finite, patches, saving

    patches.apply()
    saving.install()
    loading.install()
    not_finite.install()
    empty_steps.install()
    return [*(["cpu"] if redirected else []), *(patch.__name__ for patch in patches.PATCHES)]


def quiet_libraries() -> None:
    """Settings of libraries that a main program makes before it imports them; a user's own environment wins.

    Samples are tokenised in forked loader workers, where the tokenizer's own threads would only warn, and every rank
    would draw the progress bars of `datasets`.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

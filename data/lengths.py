"""Named distributions of samples' lengths, for measuring how well packs are filled."""

from __future__ import annotations

import numpy as np

NAMES = ("lognormal", "uniform", "chat-like", "bimodal")


def lengths_of(name: str, count: int, longest: int, seed: int = 0) -> np.ndarray:
    """[count] int64 lengths from 1 to `longest`.

    lognormal: median a tenth of the longest, sigma 1. uniform: all lengths alike. chat-like: a text of some 250 tokens
    and none to two images of 64 to 1,023. bimodal: half of them short, half three fifths to nine tenths of the longest.

    Raises:
        ValueError: no such name.
    """
    numbers = np.random.default_rng(seed)
    lengths: np.ndarray
    if name == "lognormal":
        lengths = numbers.lognormal(np.log(longest / 10), 1.0, count)
    elif name == "uniform":
        lengths = numbers.integers(1, longest + 1, count)
    elif name == "chat-like":
        images = numbers.choice([0, 0, 1, 2], count) * numbers.integers(64, 1024, count)
        lengths = numbers.lognormal(5.5, 0.8, count) + images
    elif name == "bimodal":
        short = numbers.integers(longest // 40, longest // 20, count)
        lengths = np.where(
            numbers.random(count) < 0.5, short, numbers.integers(longest * 3 // 5, longest * 9 // 10, count)
        )
    else:
        raise ValueError(f"{name}: no such distribution; there is {', '.join(NAMES)}")
    return np.clip(lengths, 1, longest).astype(np.int64)

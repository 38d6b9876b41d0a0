"""How far a result is from what was expected."""

from __future__ import annotations

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`; the plain norm of `actual` where that is zero."""
    expected_norm = expected.double().norm().item()
    difference = (actual.double() - expected.double()).norm().item()
    return difference / expected_norm if expected_norm else difference

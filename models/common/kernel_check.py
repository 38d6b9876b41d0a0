"""Comparing accelerated kernels with a reference before the first step: what the checks of each kernel share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def relative_errors(actual: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """|actual - exact| / |exact|, in norms over all elements, by name; NaN where something is NaN.

    Args:
        actual, exact: tensors of equal shapes under the same names, in any floating dtype. The host waits for them.
    """
    return {name: ((actual[name].double() - x).norm() / x.double().norm()).item() for name, x in exact.items()}


def what_is_wrong(errors: Mapping[str, float], tolerance: float) -> str | None:
    """The tensors whose error isn't below the tolerance, for a message; None: all are, and none is NaN."""
    wrong = [f"{name} is off by {error:.1e}" for name, error in errors.items() if not error < tolerance]
    return ", ".join(wrong) or None

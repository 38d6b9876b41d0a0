"""What a device can compute at most, which MFU (model FLOPs utilisation) is relative to."""

from __future__ import annotations

import re

# Dense bf16 (and fp16) TFLOP/s by the vendors' datasheets; the figure for 2:4 sparsity is twice as much. By the words
# that the device's name has.
PEAK_TFLOPS: dict[frozenset[str], float] = {
    frozenset({"A100"}): 312.0,
    frozenset({"H100"}): 989.0,
    frozenset({"H100", "PCIE"}): 756.0,
    frozenset({"H100", "NVL"}): 835.0,
    frozenset({"H200"}): 989.0,
    frozenset({"H200", "NVL"}): 835.0,
    frozenset({"GH200"}): 989.0,
    frozenset({"B200"}): 2250.0,
    frozenset({"GB200"}): 2500.0,
}


def peak_tflops(device: str) -> float | None:
    """Dense bf16 TFLOP/s of a device.

    Args:
        device: its name as `torch.cuda.get_device_name` gives it.

    Returns:
        None where the peak isn't known, and for a slice of a device (MIG), which has a part of it.
    """
    words = set(re.findall(r"[A-Z0-9]+", device.upper()))
    known = [names for names in PEAK_TFLOPS if names <= words]
    if not known or "MIG" in words:
        return None
    return PEAK_TFLOPS[max(known, key=len)]

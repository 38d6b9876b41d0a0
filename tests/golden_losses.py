"""Record or compare golden losses: 20 steps of `tiny` and `tiny_moe` on receipts, on one rank with one thread.

    python tests/golden_losses.py             run, and print how far each figure is from tests/golden/VARIANT.json
    python tests/golden_losses.py --rewrite   write the files anew: for a change of order, initialisation or summation,
                                              with a float64 proof beside it

Losses are compared to the bit, as `float.hex`. Another processor, another thread count or another version of torch
changes last bits, so each file says what it was recorded with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "golden"
VARIANTS = ("tiny", "tiny_moe")
STEPS = 20
FLAGS = [
    *("--dataset-provider", "receipts", "--use-packed-sequence", "--seq-length", "512"),
    *("--micro-batch-size", "1", "--global-batch-size", "2", "--train-iters", str(STEPS)),
    *("--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-style", "cosine", "--lr-warmup-iters", "2"),
    *("--weight-decay", "0.1", "--clip-grad", "1.0", "--use-distributed-optimizer"),
    *("--num-workers", "0", "--eval-iters", "0", "--eval-interval", "100", "--log-interval", "1"),
]


def processor() -> str:
    """Vendor, family and model: matrix products add in an order that is chosen by these."""
    described = dict(
        (part.strip() for part in line.split(":", 1)) for line in _lines(Path("/proc/cpuinfo")) if ":" in line
    )
    return " ".join(described.get(key, "?") for key in ("vendor_id", "cpu family", "model"))


def _lines(file: Path) -> list[str]:
    return file.read_text().split("\n\n")[0].splitlines() if file.exists() else []


def machine() -> dict[str, str]:
    """What the last bits of a loss depend on, besides this repository."""
    import torch

    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
        "torch": version("torch"),
        "megatron-core": version("megatron-core"),
        "transformers": version("transformers"),
        "pillow": version("pillow"),
    }


def run(variant: str, folder: Path, root: Path = ROOT) -> dict[str, list[float]]:
    """Train `variant` in a process of its own.

    Args:
        folder: for the TensorBoard events.
        root: the checkout whose code trains.

    Returns:
        TensorBoard tag -> the value of each step; values are float32.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = [sys.executable, str(root / "pretrain_multimodal.py"), "--model-variant", variant, *FLAGS]
    command += ["--tensorboard-dir", str(folder)]
    # Threads split sums, and the sums' last bits depend on the split.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    wanted = [tag for tag in events.Tags()["scalars"] if tag == "grad-norm" or tag.endswith("loss")]
    return {tag: [event.value for event in events.Scalars(tag)] for tag in sorted(wanted)}


def record(variant: str, figures: dict[str, list[float]]) -> dict[str, Any]:
    """The content of a golden file."""
    steps = {tag: [value.hex() for value in values] for tag, values in figures.items()}
    return {"variant": variant, "machine": machine(), "steps": steps}


def largest_difference(golden: dict[str, Any], figures: dict[str, list[float]]) -> float:
    """The largest relative difference of any figure: 0 when all are equal to the bit, infinite when one is missing."""
    expected = {tag: [float.fromhex(value) for value in values] for tag, values in golden["steps"].items()}
    if {tag: len(values) for tag, values in expected.items()} != {tag: len(values) for tag, values in figures.items()}:
        return float("inf")
    pairs = [pair for tag in expected for pair in zip(expected[tag], figures[tag], strict=True)]
    return max(abs(new - old) / abs(old) if old else abs(new) for old, new in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewrite", action="store_true", help="write tests/golden/*.json anew")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose code trains")
    options = parser.parse_args()
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            figures = run(variant, Path(folder), options.root.resolve())
        file = FOLDER / f"{variant}.json"
        if options.rewrite:
            FOLDER.mkdir(exist_ok=True)
            file.write_text(json.dumps(record(variant, figures), indent=1) + "\n")
            print(f"wrote {file.relative_to(ROOT)}")
        else:
            difference = largest_difference(json.loads(file.read_text()), figures)
            print(
                f"{variant}: largest relative difference {difference:.1e}{'' if difference else ' (equal to the bit)'}"
            )


if __name__ == "__main__":
    main()

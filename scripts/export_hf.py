"""Write a checkpoint's weights as a HuggingFace folder that transformers loads. Needs no GPU and no torchrun.

python scripts/export_hf.py --load CHECKPOINT --output DIR
"""

from __future__ import annotations

import signal
import sys
import warnings
from argparse import ArgumentParser
from pathlib import Path


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--load", required=True, type=Path, help="What --save named, or one of its iter_ folders")
    parser.add_argument("--output", required=True, type=Path, help="The new folder")
    parser.add_argument("--iteration", type=int, default=None, help="Which; default: the latest")
    parser.add_argument("--max-shard-size", default="5GB", help="Size of a safetensors file at most, 5GB or 300MB")
    parser.add_argument("--no-check", action="store_true", help="Leave out scripts/check_export.py's check at the end")
    args = parser.parse_args()

    from weights.checkpoint import export_checkpoint
    from weights.folder import parse_size

    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # no ranks are meant to be here
    # As Ctrl-C: the unfinished folder is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        size = parse_size(args.max_shard_size)
        export_checkpoint(args.load, args.output, iteration=args.iteration, max_shard_size=size)
    except ValueError as error:
        sys.exit(f"Refused: {error}")
    print(f"wrote {args.output}", flush=True)
    if args.no_check:
        return
    from runtime import quiet_libraries

    quiet_libraries()
    from evaluation.export_check import report

    if not report(args.output):
        sys.exit(f"{args.output} has the checkpoint's weights; a server would trip over the problems above")


if __name__ == "__main__":
    main()

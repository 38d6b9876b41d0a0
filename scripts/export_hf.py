"""Write a checkpoint's weights as a HuggingFace folder that transformers loads. Needs no GPU and no torchrun.

python scripts/export_hf.py --load CHECKPOINT --output DIR                        # of a LoRA run: peft's adapter
python scripts/export_hf.py --load CHECKPOINT --merge --output DIR                # the adapter in its base
python scripts/export_hf.py --load HF_DIR --adapter PEFT_DIR --merge --output DIR
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
    parser.add_argument("--merge", action="store_true", help="Add a LoRA adapter to its base")
    parser.add_argument("--adapter", type=Path, default=None, help="A peft adapter, to be merged into --load's folder")
    args = parser.parse_args()
    if args.adapter is not None and not args.merge:
        parser.error("--adapter: needs --merge, since the adapter is in peft's format already")

    from weights.adapter_export import export
    from weights.folder import parse_size

    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # no ranks are meant to be here
    # As Ctrl-C: the unfinished folder is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        size = parse_size(args.max_shard_size)
        export(
            args.load,
            args.output,
            merge=args.merge,
            adapter=args.adapter,
            iteration=args.iteration,
            max_shard_size=size,
        )
    except ValueError as error:
        sys.exit(f"Refused: {error}")
    print(f"wrote {args.output}", flush=True)
    if args.no_check or not (args.output / "config.json").is_file():  # an adapter is no model
        return
    from runtime import quiet_libraries

    quiet_libraries()
    from evaluation.export_check import report

    if not report(args.output):
        sys.exit(f"{args.output} has the checkpoint's weights; a server would trip over the problems above")


if __name__ == "__main__":
    main()

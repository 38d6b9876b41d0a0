"""Write a HuggingFace folder as a Megatron checkpoint that any layout loads. Needs no GPU and no torchrun.

python scripts/import_hf.py --hf DIR --output CHECKPOINT
"""

from __future__ import annotations

import signal
import sys
import warnings
from argparse import ArgumentParser
from pathlib import Path


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hf", required=True, help="A folder with config.json and safetensors, or a hub name")
    parser.add_argument("--output", required=True, type=Path, help="The new checkpoint, for --load")
    parser.add_argument(
        "--ckpt-format",
        choices=["torch_dist", "fsdp_dtensor"],
        default="torch_dist",
        help="fsdp_dtensor for Megatron-FSDP, without tensor parallelism",
    )
    parser.add_argument(
        "--allow-nonfinite-weights", action="store_true", help="Accept NaN and infinity in the folder's weights"
    )
    parser.add_argument(
        "--language-model-only", action="store_true", help="Leave out the vision encoder: a model of text alone"
    )
    args = parser.parse_args()

    from weights.check import local_folder
    from weights.checkpoint import import_folder

    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # no ranks are meant to be here
    # As Ctrl-C: the unfinished checkpoint is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        import_folder(
            local_folder(args.hf),
            args.output,
            ckpt_format=args.ckpt_format,
            language_model_only=args.language_model_only,
            allow_nonfinite=args.allow_nonfinite_weights,
        )
    except ValueError as error:
        sys.exit(f"Refused: {error}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

"""Ask a trained model about images. Its weights run in transformers; a checkpoint is exported to a temporary folder.

python scripts/generate.py --load CKPT|HF_DIR --image FILE --prompt TEXT
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", required=True, type=Path, help="Checkpoint (what --save named) or HuggingFace folder")
    parser.add_argument("--adapter", type=Path, default=None, help="A LoRA adapter for --load's model; needs peft")
    parser.add_argument("--image", type=Path, action="append", default=[], help="Image file; give several if you like")
    parser.add_argument("--prompt", required=True, help="The question; the images stand before it")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="Length of the answer at most")
    parser.add_argument("--min-pixels", type=int, default=None, help="Images are enlarged to at least this many pixels")
    parser.add_argument("--max-pixels", type=int, default=None, help="Images are shrunk to at most this many pixels")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time")
    parser.add_argument("--seed", type=int, default=0, help="Of the draws at a temperature above 0")
    args = parser.parse_args()
    if args.max_new_tokens < 1 or args.temperature < 0:
        parser.error("--max-new-tokens must be at least 1, --temperature at least 0")

    from runtime import quiet_libraries

    quiet_libraries()
    import torch

    from evaluation.model import HfModel, weights_folder

    torch.manual_seed(args.seed)
    try:
        with weights_folder(args.load) as folder:
            model = HfModel.load(folder, args.adapter)
        question = model.question(
            args.prompt,
            args.image,
            max_new_tokens=args.max_new_tokens,
            min_pixels=args.min_pixels,
            max_pixels=args.max_pixels,
        )
    except ValueError as error:
        sys.exit(f"Refused: {error}")
    (answer,) = model.generate(model.prompts([question]), args.max_new_tokens, args.temperature)
    print(answer.text)
    if not answer.finished:
        print(f"(cut off after --max-new-tokens {args.max_new_tokens})", file=sys.stderr)


if __name__ == "__main__":
    main()

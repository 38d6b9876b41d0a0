"""Check that a HuggingFace folder can be served: weights, config.json, processor files, an answer that ends.

python scripts/check_export.py DIR
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="The folder, as --save-hf or export_hf.py wrote it")
    parser.add_argument("--no-generate", action="store_true", help="Don't load the model to let it answer")
    args = parser.parse_args()

    from runtime import quiet_libraries

    quiet_libraries()
    from evaluation.export_check import report

    try:
        fine = report(args.folder, generate=False if args.no_generate else None)
    except ValueError as error:
        sys.exit(f"Refused: {error}")
    if not fine:
        sys.exit(1)


if __name__ == "__main__":
    main()

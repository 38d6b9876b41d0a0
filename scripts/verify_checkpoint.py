"""Compare every byte of checkpoints or of a HuggingFace folder with the checksums written beside them.

python scripts/verify_checkpoint.py CHECKPOINTS|HF_DIR [--iteration N]

Training compares what each rank reads; this compares everything, before a long run or after a copy. It exits with code
1 and names each damaged file. Needs no GPU and no torch.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="What --save or --save-hf named")
    parser.add_argument("--iteration", type=int, default=None, help="One checkpoint; default: all of them")
    args = parser.parse_args()
    folder = args.folder.expanduser()
    if not folder.is_dir():
        sys.exit(f"Refused: {folder}: no such folder")
    is_hf = (folder / "config.json").exists()
    try:
        found = list(_folder_damage(folder) if is_hf else _checkpoint_damage(folder, args.iteration))
    except ValueError as error:
        sys.exit(f"Refused: {error}")
    for problem in found:
        print(problem)
    sys.exit(1 if found else 0)


def _folder_damage(folder: Path) -> Iterator[str]:
    from weights.checksums import CHECKSUMS
    from weights.folder import HfFolder
    from weights.schema import description_problems

    opened = HfFolder.open(folder)
    yield from (f"{folder}: {problem}" for problem in description_problems(folder))
    if not opened.checksums:
        raise ValueError(f"{folder}: it has no {CHECKSUMS}, which --save-hf and export_hf.py write")
    count = 0
    for problem in opened.damage():
        count += 1
        yield f"{folder}: {problem}"
    print(f"{folder}: {len(opened.checksums)} tensors, {opened.bytes:,} bytes, {count} damaged", file=sys.stderr)


def _checkpoint_damage(folder: Path, iteration: int | None) -> Iterator[str]:
    from runtime import checkpoints

    found = checkpoints.all_checkpoints(folder)
    if iteration is not None:
        found = [path for path in found if path.name == checkpoints.folder_name(iteration)]
    if not found:
        raise ValueError(f"{folder}: {'no such checkpoint' if iteration is not None else 'no checkpoint'} in it")
    for path in found:
        problems = list(checkpoints.deep_damage(path))
        print(f"{path}: {'damaged' if problems else 'sound'}", file=sys.stderr)
        yield from problems


if __name__ == "__main__":
    main()

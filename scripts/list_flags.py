"""Compare the repository's list of Megatron's flags with the installed megatron-core.

python scripts/list_flags.py [--rewrite]
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rewrite", action="store_true", help="Write the list and docs/flags.md anew")
    args = parser.parse_args()

    from runtime import prepare

    prepare()
    from megatron.training.arguments import add_megatron_arguments

    from runtime.flag_table import DOCUMENT, markdown
    from runtime.megatron_flags import FILE, describe, megatron_flags, write

    installed = describe(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    if args.rewrite:
        write(installed, FILE)
        DOCUMENT.write_text(markdown())
        print(f"wrote {len(installed)} flags to {FILE}")
    elif tuple(installed) != megatron_flags():
        sys.exit(f"{FILE} isn't the installed megatron-core's list: --rewrite writes it anew")


if __name__ == "__main__":
    main()

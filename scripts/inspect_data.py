"""Look at what would be trained: a summary of the data, and samples with their trained tokens marked.

python scripts/inspect_data.py --dataset-path FILE [--html FILE] [--json FILE] [flags of the training]

Takes the training's own flags, needs no GPU and starts no training.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import arguments

# What training has from the launcher, or must be told.
DEFAULTS = [
    *("--seq-length", "4096", "--micro-batch-size", "1", "--global-batch-size", "1"),
    *("--train-iters", "1", "--lr", "1e-5"),
]


def read_arguments() -> tuple[Namespace, arguments.CommandLine]:
    """What to show, and the training's flags."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--of", default="train", choices=("train", "validation", "test"), help="Which split")
    parser.add_argument("--samples", type=int, default=3, help="Rows to show in the terminal and in --html")
    parser.add_argument("--first", type=int, default=0, help="The first of them")
    parser.add_argument("--html", type=Path, metavar="FILE", help="Write a page with images and trained spans")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write a list of all rows' samples")
    parser.add_argument("--dataset-provider", default="chat", help="As in training")
    parser.add_argument("--dataset-path", nargs="+", default=[], help="As in training")
    options, rest = parser.parse_known_args()
    for name in ("html", "json"):
        file = vars(options)[name]
        if file is not None and not file.absolute().parent.is_dir():
            parser.error(f"--{name} {file}: no such folder")
    path = ["--dataset-path", *options.dataset_path] if options.dataset_path else []
    words = [*DEFAULTS, "--dataset-provider", options.dataset_provider, *path, *rest]
    return options, arguments.preflight_or_exit(words)


def main() -> None:
    options, command_line = read_arguments()
    args, spec, config = command_line.args, command_line.spec, command_line.config
    from runtime import quiet_libraries

    quiet_libraries()
    import torch

    from data import find_provider
    from data.inspection import as_html, as_terminal, show, summary
    from data.plan import PackPlan
    from data.sizes import measure

    args.params_dtype = torch.float32
    try:
        provider = find_provider(args.dataset_provider)
        processor = provider.processor(args, config.to_hf())
        model_inputs = spec.model_inputs(config)
        dataset = provider.open(args, options.of, processor, model_inputs)
        sizes = measure(dataset, workers=args.num_workers)
    except ValueError as error:
        sys.exit(f"Refused: {error}")
    try:
        plan = PackPlan(
            sizes,
            seed=args.seed,
            token_budget=args.seq_length,
            patch_budget=args.max_patches_per_pack,
            packed=args.use_packed_sequence,
        )
    except ValueError:  # nothing is left, and the summary says why
        plan = None
    facts = summary(dataset, sizes, plan)
    for name, value in facts:
        print(f"{name:24} {value}")
    for example in sizes.examples:
        print(f"  {example}")
    if sizes.bad_file is not None:
        print(f"all broken samples: {sizes.bad_file}")
    tokenizer = processor.tokenizer if processor is not None else None
    rows = range(options.first, min(options.first + options.samples, len(dataset)))
    samples = list(show(dataset, rows, tokenizer, model_inputs.image_token_id))
    for sample in samples:
        print(f"\n{as_terminal(sample, color=sys.stdout.isatty())}")
    if options.html is not None:
        options.html.write_text(as_html(facts, samples), encoding="utf-8")
    if options.json is not None:
        everything = show(dataset, range(len(dataset)), tokenizer, model_inputs.image_token_id)
        options.json.write_text(
            json.dumps([sample.as_json() for sample in everything], ensure_ascii=False, indent=1) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()

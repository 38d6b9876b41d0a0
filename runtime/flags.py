"""Command-line flags of checkpoints, of the log and of faults."""

from __future__ import annotations

from argparse import ArgumentParser


def add_flags(parser: ArgumentParser) -> None:
    """Add the flags of checkpoints, of the log and of faults."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--keep-last",
        type=int,
        default=None,
        metavar="N",
        help="Keep the last N checkpoints in --save; older ones are deleted when a newer one is complete",
    )
    group.add_argument(
        "--overwrite-checkpoints",
        action="store_true",
        help="Delete an older run's checkpoints in --save when this run starts; without it, they are a refusal",
    )
    parser.add_argument_group("log").add_argument(
        "--log-time-split",
        type=int,
        default=100,
        metavar="N",
        help="Every N iterations, say where the step's time went; 0: never",
    )
    parser.add_argument_group("faults").add_argument(
        "--dump-bad-batch",
        default=None,
        metavar="DIR",
        help="Save the batch whose gradients have NaN or infinity in DIR; keeps a step's batches on the device",
    )

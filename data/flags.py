"""Command-line flags of the data."""

from __future__ import annotations

from argparse import ArgumentParser, _ArgumentGroup

from data import TRAIN_ON

DEFAULT_PROVIDER = "mock"


def add_flags(parser: ArgumentParser) -> None:
    """Add the flags that say where samples come from, what of them is trained, and how they become batches."""
    _add_source_flags(parser.add_argument_group("data"))
    _add_sample_flags(parser.add_argument_group("samples"))
    _add_batch_flags(parser.add_argument_group("batches"))


def _add_source_flags(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--dataset-provider",
        default=DEFAULT_PROVIDER,
        help="Where samples come from: mock, receipts, cord_v2, chat, or package.module:function of your own",
    )
    group.add_argument(
        "--dataset-path",
        nargs="+",
        default=None,
        metavar="PATH",
        help="Files, folders, glob patterns or hub names of the data (chat takes several); default: the provider's",
    )
    group.add_argument(
        "--media-root",
        default=None,
        metavar="DIR",
        help="What the paths of chat's images are relative to; default: the folder of the file that names them",
    )
    group.add_argument(
        "--hf-processor-path",
        default=None,
        help="Folder or hub name of a HF processor; default: one built in the repo for the variant's vocabulary",
    )
    group.add_argument(
        "--on-bad-sample",
        choices=("skip", "fail"),
        default="skip",
        help="A sample that can't be read: skip and count it, or end the run",
    )
    group.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="Broken samples that --on-bad-sample skip bears, of all that were measured or loaded",
    )
    group.add_argument(
        "--sample-timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="A sample that takes longer to load is skipped as broken; 0: no limit",
    )
    group.add_argument(
        "--loader-timeout-minutes",
        type=float,
        default=10.0,
        help="End the run when the loader's workers give no batch for so long",
    )


def _add_sample_flags(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--train-on",
        choices=TRAIN_ON,
        default="all",
        help="Answers of a conversation that are trained: all, the last, or exact: each after the very tokens that "
        "inference would give the model, in samples of its own where need be",
    )
    group.add_argument(
        "--chat-template-kwargs",
        default="{}",
        metavar="JSON",
        help='Arguments of the chat template, such as {"enable_thinking": false}; checkpoints keep them',
    )
    group.add_argument(
        "--strict-special-mask",
        action="store_true",
        help="Train on no special token, as the in-tree example; default: <|im_end|> after an answer is trained",
    )
    group.add_argument("--min-pixels", type=int, default=None, help="Images are enlarged to at least this many pixels")
    group.add_argument("--max-pixels", type=int, default=None, help="Images are shrunk to at most this many pixels")
    group.add_argument("--image-size", type=int, default=224, help="Height and width of mock's images in pixels")
    group.add_argument(
        "--image-seq-length",
        type=int,
        default=256,
        help="Image tokens in a mock sample at most, in whole images; 0: text only",
    )


def _add_batch_flags(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--use-packed-sequence",
        action="store_true",
        help="Pack documents into THD rows; without it, one sample per row, padded to --seq-length",
    )
    group.add_argument(
        "--max-patches-per-pack",
        type=int,
        default=None,
        help="Image patches in a pack at most, besides its budget of --seq-length tokens; default: tokens alone",
    )
    group.add_argument("--use-vanilla-collate-fn", action="store_true", help="No effect; a notice says why")
    group.add_argument("--total-seq-length", type=int, default=None, help="No effect; a notice says what does it now")

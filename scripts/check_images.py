"""Does the model look at the images? Trains `tiny` on receipts and swaps the images of held-out ones.

    python scripts/check_images.py [--seeds 3] [--train-iters N] [--output-dir DIR]

For each seed, all of them side by side: train through scripts/run_qwen35_vl.sh, then measure the loss on the tokens of
the answers' values (not the JSON keys) of the held-out receipts, once with the right images and once with the images
moved among the receipts. Exits with 1 when, for any seed, the wrong images don't raise the loss by at least 10%.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from data.dataset import ConversationDataset
    from data.sample import Sample
    from models.spec import ModelInputs

ROOT = Path(__file__).resolve().parents[1]
LEAST_RISE = 0.10
SAMPLES_PER_BATCH = 16
SEQ_LEN = 1024
LEARNING_RATE = "1e-3"


def measure(seed: int, iterations: int, folder: Path) -> dict[str, float]:
    """Train one seed into `folder` and evaluate it: what `evaluate` prints, and the minutes that both took."""
    environment = {**os.environ, "MODEL_VARIANT": "tiny", "DATASET_PROVIDER": "receipts", "OUTPUT_DIR": str(folder)}
    environment |= {"TRAIN_ITERS": str(iterations), "SEQ_LEN": str(SEQ_LEN), "SAVE_INTERVAL": str(iterations)}
    # Small steps, one thread for each seed: a core that nobody else uses is better than two that wait for each other.
    environment |= {"MBS": "1", "GBS": "1", "OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    launcher = ["bash", str(ROOT / "scripts/run_qwen35_vl.sh"), "--seed", str(seed), "--eval-iters", "0"]
    for command in (
        [*launcher, "--lr", LEARNING_RATE, "--lr-decay-style", "constant"],
        [sys.executable, __file__, "--evaluate", str(folder / "checkpoints")],
    ):
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{run.stdout}{run.stderr}\nseed {seed} failed: {' '.join(command)}")
    return {**json.loads(run.stdout.splitlines()[-1]), "minutes": (time.monotonic() - begin) / 60}


def evaluate(checkpoint: Path) -> None:
    """Print {"receipts", "right", "wrong"}: mean losses on value tokens of the held-out receipts, as JSON."""
    import torch

    import arguments
    from data import DATASET_PROVIDERS
    from data.dataset import ConversationDataset
    from runtime import prepare

    flags = ["--model-variant", "tiny", "--dataset-provider", "receipts", "--load", str(checkpoint), "--finetune"]
    flags += ["--no-load-optim", "--no-load-rng", "--exit-on-missing-checkpoint", "--use-packed-sequence"]
    flags += ["--micro-batch-size", "1", "--seq-length", str(SEQ_LEN), "--train-iters", "1", "--lr", "0"]
    prepare()
    command_line = arguments.preflight_or_exit(flags)
    args = arguments.parse(command_line)
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import get_model

    from pretrain_multimodal import model_provider

    store = torch.distributed.HashStore()
    initialize_megatron(allow_no_cuda=True, store=store)
    spec, config = command_line.spec, command_line.config
    model = get_model(partial(model_provider, spec, config, args), wrap_with_ddp=False)
    load_checkpoint(model, None, None)
    model = model[0].eval()
    test = DATASET_PROVIDERS["receipts"]
    inputs = spec.model_inputs(config)
    dataset = test.open(args, "test", test.processor(args, config.to_hf()), inputs)
    assert isinstance(dataset, ConversationDataset)
    pad_token_id = dataset.processor.tokenizer.pad_token_id
    losses = {
        name: value_loss(model, held_out(dataset, moved), inputs, pad_token_id, args.params_dtype)
        for name, moved in (("right", False), ("wrong", True))
    }
    print(json.dumps({"receipts": len(dataset), **losses}))


def held_out(dataset: ConversationDataset, moved: bool) -> Iterator[Sample]:
    """The dataset's samples with only their values trained; `moved` gives each the image of another receipt."""
    from data.conversation import Conversation
    from data.sample import Outcome, build_sample, value_mask

    count = len(dataset)
    order = Random(0).sample(range(count), count)
    donor = {index: order[(place + 1) % count] for place, index in enumerate(order)}
    for index in range(count):
        conversation = dataset.conversations[index]
        assert isinstance(conversation, Conversation)  # receipts are
        if moved:
            question, answer = conversation.messages
            text = question["content"][1:]
            other = dataset.conversations[donor[index]]
            assert isinstance(other, Conversation)
            image = other.messages[0]["content"][:1]
            conversation = replace(conversation, messages=[{**question, "content": image + text}, answer])
        sample, outcome = build_sample(conversation, dataset.processor, dataset.options)
        if sample is None or outcome is not Outcome.WHOLE:
            raise ValueError(f"{conversation.id}: {outcome}; raise SEQ_LEN")
        yield replace(sample, trained=value_mask(sample, conversation, dataset.processor))


def value_loss(
    model: nn.Module, samples: Iterator[Sample], inputs: ModelInputs, pad_token_id: int, dtype: torch.dtype
) -> float:
    """Mean loss over all trained tokens."""
    import itertools

    import torch

    from data.batch import collate
    from forward_step import model_inputs

    total, count = 0.0, 0.0
    for packed in itertools.batched(samples, SAMPLES_PER_BATCH):
        batch = collate(
            [list(packed)],
            inputs,
            alignment=1,
            packed=True,
            seq_len=SEQ_LEN,
            dtype=dtype,
            pad_token_id=pad_token_id,
        )
        with torch.no_grad():
            losses = model(**model_inputs(batch))
        total += (losses.double() * batch.loss_mask).sum().item()
        count += batch.loss_mask.sum().item()
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-iters", type=int, default=500)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "outputs/check_images")
    parser.add_argument("--evaluate", type=Path, metavar="CHECKPOINT", help="only measure a checkpoint of tiny's")
    options = parser.parse_args()
    if options.evaluate:
        return evaluate(options.evaluate)

    print(f"{'seed':>4}  {'receipts':>8}  {'right images':>12}  {'wrong images':>12}  {'rise':>6}  {'minutes':>7}")
    rises = []
    with ThreadPoolExecutor(options.seeds) as pool:
        seeds = range(1, options.seeds + 1)
        runs = [pool.submit(measure, seed, options.train_iters, options.output_dir / f"seed{seed}") for seed in seeds]
    for seed, run in zip(seeds, runs, strict=True):
        found = run.result()
        rises.append(found["wrong"] / found["right"] - 1)
        print(
            f"{seed:4}  {found['receipts']:8}  {found['right']:12.3f}  {found['wrong']:12.3f}  {rises[-1]:6.1%}  "
            f"{found['minutes']:7.1f}"
        )
    if min(rises) < LEAST_RISE:
        sys.exit(f"the loss rises by {min(rises):.1%} with the wrong images; {LEAST_RISE:.0%} is expected")


if __name__ == "__main__":
    main()

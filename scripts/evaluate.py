"""Measure a trained model on held-out data: loss per trained token, and exact match of the answers' fields.

python scripts/evaluate.py --load CKPT|HF_DIR [--dataset-provider receipts|cord_v2] [--samples N]

The weights run in transformers (a checkpoint is exported to a temporary folder). The loss is over exactly the tokens
that training trains. A field's values are matched exactly, beside what the best guess without the image gets: the
field's most frequent value in the training split (the higher of its shares there and here). An answer that can't be
read is wrong in every field. Texts are compared in the tokenizer's normal form (Qwen's: NFC), since the model writes
no other.
"""

from __future__ import annotations

import itertools
import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from runtime import quiet_libraries

if TYPE_CHECKING:
    from data.conversation import Conversation, Document, Split
    from data.dataset import ConversationDataset
    from data.sample import Sample
    from evaluation.fields import Fields, FieldScore, Reader, Scores
    from evaluation.model import Answer, HfModel

EXAMPLES = 10  # of samples without a true answer
TIMES = 2.0  # the guess: fields whose interval lies above are named


def read_arguments() -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", required=True, type=Path, help="Checkpoint (what --save named) or HuggingFace folder")
    parser.add_argument("--adapter", type=Path, default=None, help="A LoRA adapter for --load's model; needs peft")
    parser.add_argument("--dataset-provider", default="receipts", help="receipts, cord_v2 or yours")
    parser.add_argument("--dataset-path", nargs="+", default=None, help="As in training; default: the provider's")
    parser.add_argument("--media-root", default=None, help="As in training")
    parser.add_argument("--data-cache-path", default=None, help="As in training")
    parser.add_argument("--train-on", choices=("all", "last"), default="all", help="As in training: for the loss")
    parser.add_argument("--chat-template-kwargs", default=None, help="JSON; default: the training's")
    parser.add_argument("--split", default="test", choices=("validation", "test"), help="Of the dataset")
    parser.add_argument("--cut-rows", default=None, metavar="98,1,1", help="What training had as --split, if it had")
    parser.add_argument("--samples", type=int, default=None, help="The first N of the split; default: all")
    parser.add_argument("--batch-size", type=int, default=32, help="Samples that run together")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="Default: 1.5 times the longest true answer")
    parser.add_argument("--seq-length", type=int, default=4096, help="Longer samples are left out, and counted")
    parser.add_argument("--min-pixels", type=int, default=None, help="As in training; default: the processor's")
    parser.add_argument("--max-pixels", type=int, default=None, help="As in training; default: the processor's")
    parser.add_argument("--strict-special-mask", action="store_true", help="The loss of a model trained with it")
    parser.add_argument(
        "--answers", type=Path, default=None, metavar="FILE", help="Write every answer as it comes, as JSON lines"
    )
    args = parser.parse_args()
    for name in ("samples", "batch_size", "max_new_tokens", "seq_length"):
        value = vars(args)[name]
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main() -> None:
    args = read_arguments()
    quiet_libraries()
    from data import find_provider
    from evaluation.fields import Reader, majorities, score
    from evaluation.model import HfModel, weights_folder

    try:
        with weights_folder(args.load) as folder:
            model = HfModel.load(folder, args.adapter)
        held_out = open_dataset(args, args.split, model)
        reader = Reader(find_provider(args.dataset_provider).field_name, model.normal_form)
        samples, truths = encode(held_out, args.samples)
        expected = read_truths(samples, truths, reader)
        guesses = majorities(training_answers(open_dataset(args, "train", model), reader), reader)
        file = None if args.answers is None else args.answers.open("w", encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"Refused: {error}")
    with file or nullcontext():

        def write(index: int, answer: Answer) -> None:
            """As they come: a run that is killed keeps what it has."""
            if file is not None:
                row = {"id": samples[index].id, "answer": answer.text, "truth": truths[index]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()

        loss, tokens, answers = measure(model, samples, args.batch_size, args.max_new_tokens, write)
    scores = score(expected, [reader.read(answer.text) for answer in answers], guesses, reader)
    cut = sum(not answer.finished for answer in answers)
    print(f"{held_out.name}: {len(answers)} answers, {scores.unreadable} not readable, {cut} cut off")
    print(f"loss per trained token: {loss:.4f} ({tokens} tokens)\n")
    print(table(scores))


def open_dataset(args: Namespace, split: Split, model: HfModel) -> ConversationDataset:
    """A split with the model's own processor.

    Raises:
        ValueError: an unknown provider, or one whose samples aren't conversations.
    """
    from data import DATASET_PROVIDERS, find_provider
    from data.dataset import ConversationDataset

    provider = find_provider(args.dataset_provider)
    if not provider.needs_processor:
        known = ", ".join(name for name, found in DATASET_PROVIDERS.items() if found.needs_processor)
        raise ValueError(f"--dataset-provider {args.dataset_provider}: has no answers to match; expected {known}")
    if model.text_only and provider.always_images:
        raise ValueError(
            f"--dataset-provider {args.dataset_provider}: all of its samples have images, which --load's "
            "model of text alone can't see"
        )
    options = Namespace(**vars(args), params_dtype=model.model.dtype, num_workers=0)
    options.chat_template_kwargs = args.chat_template_kwargs or model.template_arguments
    options.language_model_only = model.text_only
    options.split = args.cut_rows  # which is what training calls --split
    dataset = provider.open(options, split, model.processor, model.inputs)
    if not isinstance(dataset, ConversationDataset):
        raise ValueError(f"--dataset-provider {args.dataset_provider}: its samples aren't conversations")
    return dataset


def encode(dataset: ConversationDataset, count: int | None) -> tuple[list[Sample], list[str]]:
    """The first samples of a split and their last answers; those too long are left out, with a word on stderr.

    Raises:
        ValueError: none is left, one is broken, or a conversation ends with a question.
    """
    from data.sample import Outcome, build_sample

    samples: list[Sample] = []
    answers: list[str] = []
    left_out: list[str] = []
    for index in range(min(count or len(dataset), len(dataset))):
        conversation = dataset.conversations[index]
        sample, outcome = build_sample(conversation, dataset.processor, dataset.options)
        if sample is None or outcome is not Outcome.WHOLE:
            left_out.append(f"{conversation.id} ({outcome})")
            continue
        answer = last_answer(dataset, conversation)
        if answer is None:
            raise ValueError(f"{conversation.id}: doesn't end with an answer, so there is nothing to match")
        samples.append(sample)
        answers.append(answer)
    if left_out:
        example = f"{len(left_out)} samples, --seq-length {dataset.options.seq_len}: {left_out[0]}, ..."
        if not samples:
            raise ValueError(f"nothing to evaluate; left out: {example}")
        print(f"left out: {example}", file=sys.stderr)
    if not samples:
        raise ValueError(f"{dataset.name}: has no samples; --split names another one, --cut-rows cuts the rows")
    return samples, answers


def last_answer(dataset: ConversationDataset, conversation: Conversation | Document) -> str | None:
    """The text of a conversation's last message; None if that isn't an answer.

    Raises:
        BadSample: a malformed conversation.
    """
    from data.conversation import Conversation, checked_messages, message_text
    from data.template import ChatTemplate

    if not isinstance(conversation, Conversation):
        return None
    names = ChatTemplate.of(dataset.processor, dataset.options.template_arguments).names
    last = checked_messages(conversation, names)[-1]
    return message_text(last) if last["role"] == "assistant" else None


def read_truths(samples: Sequence[Sample], truths: Sequence[str], reader: Reader) -> list[Fields]:
    """The fields of the true answers, before anything is generated.

    Raises:
        ValueError: some have none; names the first samples.
    """
    fields: list[Fields] = []
    problems: list[str] = []
    for sample, truth in zip(samples, truths, strict=True):
        try:
            fields.append(reader.read_truth(truth))
        except ValueError as error:
            problems.append(f"{sample.id}: {error}")
    if problems:
        more = f"\nand {len(problems) - EXAMPLES} more" if len(problems) > EXAMPLES else ""
        raise ValueError("\n".join(problems[:EXAMPLES]) + more)
    return fields


def training_answers(dataset: ConversationDataset, reader: Reader) -> Iterator[Fields]:
    """The fields of the training split's last answers: of the samples that have any, since training skips the rest."""
    from data.bad_sample import BadSample

    for index in range(len(dataset)):
        try:
            answer = last_answer(dataset, dataset.conversations[index])
        except BadSample:
            continue
        if answer is not None and (fields := reader.read(answer)) is not None:
            yield fields


def measure(
    model: HfModel,
    samples: Sequence[Sample],
    batch_size: int,
    max_new_tokens: int | None,
    on_answer: Callable[[int, Answer], None],
) -> tuple[float, int, list[Answer]]:
    """Loss per trained token, the number of these tokens, and an answer for each sample.

    Args:
        on_answer: called with a sample's index and its answer as soon as there is one.
    """
    from tqdm import tqdm

    limit = max_new_tokens or max(int(1.5 * sample.trained.sum()) for sample in samples)
    # Samples of like length run together, so that little is padded.
    order = sorted(range(len(samples)), key=lambda index: len(samples[index].input_ids))
    answers: dict[int, Answer] = {}
    total, tokens = 0.0, 0
    with tqdm(total=len(samples), unit="answer", disable=None) as progress:
        for indices in itertools.batched(order, batch_size):
            batch = [samples[index] for index in indices]
            loss, count = model.loss(batch)
            total, tokens = total + loss, tokens + count
            for index, answer in zip(indices, model.generate(model.prompts(batch), limit), strict=True):
                answers[index] = answer
                on_answer(index, answer)
            progress.update(len(batch))
    return total / tokens, tokens, [answers[index] for index in range(len(samples))]


def table(scores: Scores) -> str:
    """As Markdown, and a sentence on what lies clearly above the guess."""
    header = ("field", "values", "exact match", "95% interval", "best guess without the image", "ratio")
    lines = [header, ("---",) * len(header), *(_row(found) for found in (*scores.fields, scores.whole))]
    rows = [f"| {' | '.join(line)} |" for line in lines]
    ahead = [found.field for found in scores.fields if found.beats_guess(TIMES)]
    said = ", ".join(ahead) if ahead else "none"
    return "\n".join([*rows, "", f"whole interval above {TIMES:g} times the guess: {said}"])


def _row(found: FieldScore) -> tuple[str, ...]:
    low, high = found.interval
    return (
        found.field,
        str(found.count),
        f"{found.match:.1%}",
        f"{low:.1%} to {high:.1%}",
        f"{found.guess:.1%}",
        f"{found.ratio:.1f}",
    )


if __name__ == "__main__":
    main()

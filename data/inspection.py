"""Samples as people can look at them: what a model would be trained on, in the terminal, as HTML and as JSON."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from data.bad_sample import BadSample
from data.dataset import ConversationDataset
from data.images import normalise
from data.plan import PackPlan
from data.sample import KEPT, Encoded
from data.sizes import SampleDataset, Sizes

_GREEN, _GREY, _PLAIN = "\x1b[1;32m", "\x1b[90m", "\x1b[0m"
_LARGEST = 512  # pixels of an image's longer side in HTML
_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
section { border-top: 1px solid #999; padding: 1em 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
.trained { background: #bdf0c4 }
.image { color: #777 }
img { max-height: 16em; margin-right: .5em; border: 1px solid #ccc }
table { border-collapse: collapse } td { padding: .1em 1em .1em 0 }
"""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens. kind: "trained", "context" or "image"."""

    kind: str
    text: str
    tokens: int


@dataclass(frozen=True)
class Shown:
    """A sample to look at.

    outcome: why it is dropped or what it lost; "" for a whole one.
    grids: patches of each image in time, height and width.
    """

    id: str
    outcome: str
    spans: list[Span] = field(default_factory=list)
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """id, tokens, trained_tokens, images, grids, outcome, trained_text (a text for each run of trained tokens)."""
        return {
            "id": self.id,
            "tokens": sum(span.tokens for span in self.spans),
            "trained_tokens": sum(span.tokens for span in self.spans if span.kind == "trained"),
            "images": len(self.grids),
            "grids": [list(grid) for grid in self.grids],
            "outcome": self.outcome,
            "trained_text": [span.text for span in self.spans if span.kind == "trained"],
        }


def show(dataset: SampleDataset, indices: Sequence[int], tokenizer: Any, image_token_id: int) -> Iterator[Shown]:
    """The samples of some rows; a broken one says what is wrong with it.

    Args:
        tokenizer: None for samples whose ids have no text.
    """
    for index in indices:
        try:
            if isinstance(dataset, ConversationDataset):
                for encoded in dataset.encode(index):
                    yield _of_encoded(encoded, tokenizer, image_token_id)
            else:
                sample = dataset[index]
                spans = _spans(sample.input_ids.tolist(), sample.trained.tolist(), tokenizer, image_token_id)
                yield Shown(sample.id, "", spans, [tuple(grid) for grid in sample.grid_thw.tolist()])
        except BadSample as error:
            yield Shown(f"{dataset.name}, row {index}", f"broken: {error.reason}: {error}")


def summary(dataset: SampleDataset, sizes: Sizes, plan: PackPlan | None) -> list[tuple[str, str]]:
    """Lengths, images, trained share, drops by reason, packs and padding, as names and values.

    Args:
        plan: None when no sample is left.
    """
    kept = sizes.tokens > 0
    tokens, patches, trained = sizes.tokens[kept], sizes.patches[kept], sizes.trained[kept]
    found = [("data", dataset.name), ("rows", f"{len(dataset):,}"), ("samples", f"{len(tokens):,}")]
    if len(tokens):
        low, middle, high = np.percentile(tokens, [5, 50, 95])
        found += [
            ("tokens", f"{int(tokens.sum()):,}"),
            (
                "tokens of a sample",
                f"{tokens.min()} to {tokens.max()}; median {middle:.0f}, 90% in {low:.0f}..{high:.0f}",
            ),
            ("samples with images", f"{(patches > 0).mean():.1%}"),
            ("patches", f"{int(patches.sum()):,}; at most {patches.max():,} in a sample"),
            ("trained", f"{trained.sum() / tokens.sum():.1%} of the tokens"),
        ]
    if plan is not None:
        found += [("packs", f"{plan.epoch_packs():,} an epoch"), ("padding", f"{1 - plan.fill:.2%} of their budgets")]
    dropped = plan.dropped if plan is not None else dict(sizes.dropped)
    found += [(reason, f"{count:,}") for reason, count in (dropped | dict(sizes.changed)).items()]
    return found


def as_terminal(shown: Shown, *, color: bool) -> str:
    """A sample as lines, trained tokens in green and images as their tokens' number."""
    green, grey, plain = (_GREEN, _GREY, _PLAIN) if color else ("", "", "")
    facts = shown.as_json()
    head = f"{shown.id}: {facts['tokens']} tokens, {facts['trained_tokens']} trained, {facts['images']} images"
    marks = {"trained": (green, plain), "image": (grey, plain), "context": ("", "")}
    text = "".join(f"{marks[span.kind][0]}{_visible(_words(span))}{marks[span.kind][1]}" for span in shown.spans)
    return "\n".join(filter(None, [head, shown.outcome, text]))


def _visible(text: str) -> str:
    """Control characters in data as they are written in Python: some command the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def as_html(facts: Sequence[tuple[str, str]], samples: Sequence[Shown]) -> str:
    """A page that needs nothing else: the images are in it."""
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in facts)
    body = "".join(_section(sample) for sample in samples)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(facts[0][1])}</title>'
        f"<style>{_STYLE}</style></head><body><table>{rows}</table>{body}</body></html>\n"
    )


def _section(shown: Shown) -> str:
    images = "".join(f'<img alt="" src="{_data_uri(image)}">' for image in shown.images)
    text = "".join(f'<span class="{span.kind}">{html.escape(_words(span))}</span>' for span in shown.spans)
    outcome = f"<p>{html.escape(shown.outcome)}</p>" if shown.outcome else ""
    return f"<section><h2>{html.escape(shown.id)}</h2>{outcome}{images}<pre>{text}</pre></section>"


def _data_uri(image: Image.Image) -> str:
    small = normalise(image)
    small.thumbnail((_LARGEST, _LARGEST))
    file = io.BytesIO()
    small.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _words(span: Span) -> str:
    return f"[image: {span.tokens} tokens]" if span.kind == "image" else span.text


def _of_encoded(encoded: Encoded, tokenizer: Any, image_token_id: int) -> Shown:
    if encoded.outcome not in KEPT:
        return Shown(encoded.id, str(encoded.outcome))
    spans = _spans(encoded.input_ids, encoded.trained, tokenizer, image_token_id)
    images = [picture.image for picture in encoded.pictures]
    try:
        for image in images:
            normalise(image)
    except Exception as error:  # Pillow's, of a damaged file: it is what we are here to show
        return Shown(encoded.id, f"broken: {error}", spans, encoded.grids)
    return Shown(encoded.id, str(encoded.outcome), spans, encoded.grids, images)


def _spans(ids: Sequence[int], trained: Sequence[bool], tokenizer: Any, image_token_id: int) -> list[Span]:
    def kind(pair: tuple[int, bool]) -> str:
        return "image" if pair[0] == image_token_id else "trained" if pair[1] else "context"

    spans = []
    for name, group in groupby(zip(ids, trained, strict=True), key=kind):
        run = [token for token, _ in group]
        text = " ".join(map(str, run)) if tokenizer is None else tokenizer.decode(run)
        spans.append(Span(name, text, len(run)))
    return spans

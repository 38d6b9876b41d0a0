"""Answers by their fields: reading them, scoring them, and the best guess without the image.

    answer (JSON, or CORD-v2's tokens)  ->  {"menu.nm": "Tea", "menu[1].nm": "Rice", ...}  ->  FieldScore per field

An answer's values are compared place by place and summed up over list entries: `menu[1].nm` counts for `menu.nm`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import NormalDist
from typing import Any

from data.bad_sample import shown

WHOLE_ANSWER = "whole answer"
type Fields = Mapping[str, str]  # values by their place: "menu[1].nm"
_TAG = re.compile(r"<s_(?P<opens>[^<>]+)>|</s_(?P<closes>[^<>]+)>|<sep/>")


@dataclass(frozen=True)
class Reader:
    """Reads answers.

    field_name: the field that a value counts for, by its keys without list indices (`DatasetProvider.field_name`).
    normal_form: of a text, the tokenizer's: what the model writes has it, a file's text may not.
    """

    field_name: Callable[[str], str] = str
    normal_form: Callable[[str], str] = str

    def read(self, answer: str) -> Fields | None:
        """The values of an answer by their place, or None if it can't be read.

        Args:
            answer: a JSON object, or what `data.cord_v2.json_to_tokens` writes.
        """
        try:
            content = json.loads(answer) if answer.lstrip().startswith("{") else _read_tokens(answer)
            values: dict[str, str] = {}
            _flatten(content, "", values)
        except (ValueError, RecursionError):  # whatever a model may write
            return None
        return {self.normal_form(place): self.normal_form(value) for place, value in values.items()}

    def read_truth(self, answer: str) -> Fields:
        """The values of a true answer.

        Raises:
            ValueError: it has none.
        """
        values = self.read(answer)
        if not values:
            raise ValueError(
                f"a true answer without fields, so there is nothing to match: {shown(answer)}; expected a JSON object "
                "or CORD-v2's tokens"
            )
        return values

    def field_of(self, place: str) -> str:
        """The field that a place counts for."""
        return self.field_name(re.sub(r"\[\d+\]", "", place))


def wilson_interval(correct: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; (0, 1) when nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = correct / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Guess:
    """A field's most frequent value in the training answers, and its share there."""

    value: str
    share: float


@dataclass(frozen=True)
class FieldScore:
    """One field over all answers.

    count: values that the true answers hold.
    correct: of these, the model's.
    guess: share that the best guess without the image gets.
    """

    field: str
    count: int
    correct: int
    guess: float

    @property
    def match(self) -> float:
        return self.correct / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """95%. It takes the values as independent; those of one answer's list aren't quite."""
        return wilson_interval(self.correct, self.count)

    @property
    def ratio(self) -> float:
        """Of the model's exact match to the guess's."""
        if self.guess:
            return self.match / self.guess
        return inf if self.correct else 0.0

    def beats_guess(self, times: float) -> bool:
        """The whole interval lies above so many times the guess."""
        return self.interval[0] > times * self.guess


@dataclass(frozen=True)
class Scores:
    """fields: by falling count. whole: answers right in every field, with no other. unreadable: answers."""

    fields: list[FieldScore]
    whole: FieldScore
    unreadable: int


def majorities(answers: Iterable[Fields], reader: Reader) -> dict[str, Guess]:
    """For each field the best guess of who knows the training answers and sees no image."""
    counts: dict[str, Counter[str]] = {}
    for answer in answers:
        for place, value in answer.items():
            counts.setdefault(reader.field_of(place), Counter())[value] += 1
    first = {field: values.most_common(1)[0] for field, values in counts.items()}
    return {field: Guess(value, count / counts[field].total()) for field, (value, count) in first.items()}


def score(
    truths: Sequence[Fields], answers: Sequence[Fields | None], guesses: Mapping[str, Guess], reader: Reader
) -> Scores:
    """Compare answers with the true ones.

    A guess's share is the higher one of those among the held-out and among the training values: a few held-out ones may
    have fewer by chance. The whole answer's is that of answers it guesses in every field.

    Args:
        truths, answers: pairs; None is an answer that can't be read.
        guesses: see `majorities`.
    """
    count: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    guessed: Counter[str] = Counter()
    for expected, found in zip(truths, answers, strict=True):
        guess = {place: guesses[field].value for place in expected if (field := reader.field_of(place)) in guesses}
        for place, value in expected.items():
            field = reader.field_of(place)
            count[field] += 1
            correct[field] += found is not None and found.get(place) == value
            guessed[field] += guess.get(place) == value
        count[WHOLE_ANSWER] += 1
        correct[WHOLE_ANSWER] += found == expected
        guessed[WHOLE_ANSWER] += guess == expected
    scores = {}
    for field in count:
        share = guesses[field].share if field in guesses else 0.0
        scores[field] = FieldScore(field, count[field], correct[field], max(share, guessed[field] / count[field]))
    whole = scores.pop(WHOLE_ANSWER)
    unreadable = sum(found is None for found in answers)
    return Scores(sorted(scores.values(), key=lambda found: -found.count), whole, unreadable)


def _flatten(content: Any, place: str, values: dict[str, str]) -> None:
    """The first entry of a list has the list's own place: a list of one and its entry are written alike in tokens."""
    if isinstance(content, dict):
        for key, value in content.items():
            _flatten(value, f"{place}.{key}" if place else key, values)
    elif isinstance(content, list):
        for index, value in enumerate(content):
            _flatten(value, f"{place}[{index}]" if index else place, values)
    else:
        values[place] = content if isinstance(content, str) else json.dumps(content)


def _read_tokens(text: str) -> dict[str, Any]:
    """`data.cord_v2.json_to_tokens`, backwards.

    Raises:
        ValueError: tags that don't close, or text beside them.
    """
    content, end = _read_content(text, 0, None)
    if end != len(text) or not isinstance(content, dict):
        raise ValueError(f"not an answer in CORD-v2's tokens: {text[:80]!r}")
    return content


def _read_content(text: str, position: int, key: str | None) -> tuple[Any, int]:
    """What stands from `position` to the closing tag of `key` (None: to the text's end), and where that tag ends."""
    entries: list[Any] = []
    entry: dict[str, Any] = {}
    while True:
        tag = _TAG.search(text, position)
        opens, closes = tag.group("opens", "closes") if tag else (None, None)
        words, position = text[position : tag.start() if tag else None], tag.end() if tag else len(text)
        if (entry or opens) and words.strip():
            raise ValueError(f"text beside keys: {words[:80]!r}")
        if opens:
            entry[opens], position = _read_content(text, position, opens)
            continue
        entries.append(entry or words)
        if tag is None or closes:
            if closes != key:
                raise ValueError(f"{key} is closed by {closes}")
            return (entries if len(entries) > 1 else entries[0]), position
        entry = {}

"""What stands on a synthetic receipt, and what is asked about it.

Every value is drawn by itself, uniformly: a total isn't the sum of the prices, and a question says nothing about
its answer. So nothing but the image tells a value, and reading can be measured. Some values are coarse (the shop by
its logo, the currency by a coloured band, the payment by a stamp, the number of items), the others are text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

SHOPS = ("Acorn", "Bridge", "Comet", "Delta", "Ember", "Falcon", "Grove", "Harbor")
CURRENCIES = ("EUR", "GBP", "JPY", "USD")
PAYMENTS = ("card", "cash", "coupon", "points")
DISHES = (
    "Bagel", "Beans", "Bread", "Burger", "Cake", "Cheese", "Cocoa", "Coffee", "Curry", "Donut", "Fish", "Juice",
    "Lemon", "Milk", "Noodles", "Olives", "Pasta", "Pizza", "Rice", "Salad", "Soup", "Taco", "Tea", "Toast",
)  # fmt: skip
MAX_ITEMS = 5

QUESTIONS = ("Read {}.", "What are {}?", "Give {} as JSON.", "Find {} on this receipt.")
PARSE_QUESTION = "Parse this receipt."
PARSE_SHARE = 0.05
# What is asked for, and how often: the coarse ones more often, so that a small model soon learns to look.
FIELDS = {"shop": 3, "currency": 3, "payment": 3, "items": 2, "total": 2, "first item": 1, "last item": 1}
# Where the ground truth has it.
PLACES: dict[str, tuple[str, str | int]] = {
    "shop": ("store_info", "nm"),
    "currency": ("payment_info", "currency"),
    "payment": ("payment_info", "method"),
    "items": ("total", "menutype_cnt"),
    "total": ("total", "total_price"),
    "first item": ("menu", 0),
    "last item": ("menu", -1),
}


@dataclass(frozen=True)
class Item:
    name: str
    count: int  # 1 to 9
    price: int  # 10 to 99


@dataclass(frozen=True)
class Receipt:
    """One receipt's values, independent of each other.

    items: 1 to MAX_ITEMS.
    total: 100 to 999, not the sum of the prices.
    """

    shop: str
    currency: str
    payment: str
    items: tuple[Item, ...]
    total: int

    def ground_truth(self) -> dict[str, Any]:
        """CORD-v2's `gt_parse`, with its keys where it has one."""
        return {
            "store_info": {"nm": self.shop},
            "menu": [{"nm": item.name, "cnt": str(item.count), "price": str(item.price)} for item in self.items],
            "total": {"total_price": str(self.total), "menutype_cnt": str(len(self.items))},
            "payment_info": {"method": self.payment, "currency": self.currency},
        }


@dataclass(frozen=True)
class QuestionAndAnswer:
    """value_spans: character ranges [start, end) of the answer that hold values."""

    question: str
    answer: str
    value_spans: tuple[tuple[int, int], ...]


def draw_receipt(rng: Random) -> Receipt:
    """A receipt of independent, uniformly drawn values."""
    return Receipt(
        shop=rng.choice(SHOPS),
        currency=rng.choice(CURRENCIES),
        payment=rng.choice(PAYMENTS),
        items=tuple(
            Item(rng.choice(DISHES), rng.randint(1, 9), rng.randint(10, 99)) for _ in range(rng.randint(1, MAX_ITEMS))
        ),
        total=rng.randint(100, 999),
    )


def ask(ground_truth: dict[str, Any], rng: Random) -> QuestionAndAnswer:
    """A question about two to four fields in random order, or about everything; the answer is compact JSON."""
    if rng.random() < PARSE_SHARE:
        return _answered(PARSE_QUESTION, ground_truth)
    weights = dict(FIELDS)
    fields = []
    for _ in range(rng.randint(2, 4)):
        fields += rng.choices(list(weights), list(weights.values()))
        del weights[fields[-1]]
    listed = ", ".join(fields[:-1]) + " and " + fields[-1]
    values = {field: ground_truth[section][key] for field, (section, key) in PLACES.items()}
    return _answered(rng.choice(QUESTIONS).format(listed), {field: values[field] for field in fields})


def schema_field(path: str) -> str:
    """The ground truth's name of what an answer calls `path`: `store_info.nm` for "shop", `menu.nm` for
    "first item.nm"; its own names stay as they are."""
    word, _, key = path.partition(".")
    section, place = PLACES.get(word, (word, key))
    if word not in PLACES or bool(key) == isinstance(place, str):  # "total.total_price" isn't the question's "total"
        return path
    return f"{section}.{key or place}"


def corpus(receipts: int = 300) -> Iterator[str]:
    """Text that the built tokenizer's vocabulary is trained on: questions, answers, the same at every call."""
    for index in range(receipts):
        rng = Random(f"corpus/{index}")
        ground_truth = draw_receipt(rng).ground_truth()
        asked = ask(ground_truth, rng)
        yield from ("system", "user", "assistant", asked.question, asked.answer, "\n\n", "Describe this image.")


def _answered(question: str, content: dict[str, Any]) -> QuestionAndAnswer:
    spans: list[tuple[int, int]] = []
    answer = _written(content, 0, spans)
    return QuestionAndAnswer(question, answer, tuple(spans))


def _written(content: Any, offset: int, spans: list[tuple[int, int]]) -> str:
    """Compact JSON of dicts, lists and strings, appending where each string value lies, counted from `offset`."""
    if isinstance(content, str):
        text = json.dumps(content)
        spans.append((offset + 1, offset + len(text) - 1))
        return text
    opening, closing = "{}" if isinstance(content, dict) else "[]"
    text = opening
    for number, entry in enumerate(content):
        text += "," if number else ""
        if isinstance(content, dict):
            text += json.dumps(entry) + ":"
            entry = content[entry]
        text += _written(entry, offset + len(text), spans)
    return text + closing

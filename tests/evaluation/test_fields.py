"""Fields of answers: reading, names, scores by hand, and the interval against published values."""

from __future__ import annotations

import json
import unicodedata
from random import Random

import pytest

from data.cord_v2 import json_to_tokens
from data.receipts.values import PARSE_QUESTION, ask, draw_receipt, schema_field
from evaluation.fields import Guess, Reader, Scores, majorities, score, wilson_interval

RECEIPTS = Reader(schema_field)
read_fields = Reader().read

PARSE = {
    "menu": [{"nm": "Nasi", "sub": {"nm": "Es"}}, {"nm": "Teh <b>", "cnt": "2"}],
    "total": {"total_price": "95,700"},
    "void": [{"nm": "x"}],
}
PLACES = {"menu.nm": "Nasi", "menu.sub.nm": "Es", "menu[1].nm": "Teh <b>", "menu[1].cnt": "2"}
PLACES |= {"total.total_price": "95,700", "void.nm": "x"}


@pytest.mark.parametrize("write", [json.dumps, json_to_tokens])
def test_both_ways_of_writing_an_answer_read_the_same(write) -> None:
    assert read_fields(write(PARSE)) == PLACES


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "no receipt",
        '{"shop":"Acorn"',
        '{"shop":"Acorn"} and more',
        '["Acorn"]',
        '{"a":' * 100_000,
        "<s_total>3",
        "3</s_total>",
        "<s_menu><s_nm>Tea</s_menu></s_nm>",
        "<s_menu>Tea<s_cnt>2</s_cnt></s_menu>",
        "<s_menu><s_cnt>2</s_cnt>Tea</s_menu>",
        "<s_nm>Tea</s_nm><sep/><s_nm>Rice</s_nm>",
    ],
    ids=lambda answer: repr(answer[:40]),
)
def test_malformed_answers_have_no_fields(answer: str) -> None:
    assert read_fields(answer) is None


def test_values_that_are_not_text() -> None:
    assert read_fields('{"total":12,"paid":true,"tip":null}') == {"total": "12", "paid": "true", "tip": "null"}


def test_every_question_about_a_receipt_names_the_ground_truths_fields() -> None:
    """Whatever a question calls it, a value counts for the field that holds it in the parse."""
    seen, whole = set(), 0
    for index in range(400):
        rng = Random(index)
        truth = draw_receipt(rng).ground_truth()
        of_field: dict[str, set[str]] = {}
        for place, value in read_fields(json.dumps(truth)).items():
            of_field.setdefault(RECEIPTS.field_of(place), set()).add(value)
        asked = ask(truth, rng)
        whole += asked.question == PARSE_QUESTION
        for place, value in read_fields(asked.answer).items():
            assert value in of_field[RECEIPTS.field_of(place)], (asked.answer, place)
            seen.add(place)
    assert {"shop", "items", "total", "first item.nm", "last item.price", "total.total_price", "menu[1].cnt"} <= seen
    assert whole > 5
    assert RECEIPTS.field_of("menu[12].sub[1].nm") == "menu.sub.nm"


def test_scores_by_hand() -> None:
    training = ['{"shop":"A","total":"1"}', '{"shop":"A"}', '{"shop":"B","first item":{"nm":"Tea"}}', '{"total":"2"}']
    training += ['{"total":"2"}', '{"last item":{"nm":"Rice"}}', '{"last item":{"nm":"Rice"}}']
    guesses = majorities(map(RECEIPTS.read_truth, training), RECEIPTS)
    assert guesses == {
        "store_info.nm": Guess("A", 2 / 3),
        "total.total_price": Guess("2", 2 / 3),
        "menu.nm": Guess("Rice", 2 / 3),
    }
    truths = ['{"shop":"A","total":"7"}', '{"shop":"B"}', '{"menu":[{"nm":"Tea"},{"nm":"Rice"}]}', '{"shop":"A"}']
    answers = ['{"total":"7","shop":"A"}', '{"shop":"B","total":"1"}', '{"menu":[{"nm":"Rice"},{"nm":"Rice"}]}', "A"]
    scores = scored(truths, answers, guesses)
    found = {one.field: (one.count, one.correct, one.guess) for one in scores.fields}
    # Of the totals the guess gets none, of the menus half; in training it got more.
    assert found == {"store_info.nm": (3, 2, 2 / 3), "total.total_price": (1, 1, 2 / 3), "menu.nm": (2, 1, 2 / 3)}
    assert scores.fields[0].field == "store_info.nm"
    assert (scores.whole.count, scores.whole.correct, scores.whole.guess) == (4, 1, 1 / 4)  # one has a field too many
    assert scores.unreadable == 1
    with pytest.raises(ValueError, match=r"without fields.*nothing"):
        RECEIPTS.read_truth("nothing")


def test_fields_of_ones_own_keep_their_names() -> None:
    """What receipts call total is one field with what the ground truth calls total.total_price; nobody else's is."""
    guesses = majorities([{"total": "1", "total.total_price": "2"}], Reader())
    assert guesses == {"total": Guess("1", 1.0), "total.total_price": Guess("2", 1.0)}
    assert majorities([{"total": "1"}], RECEIPTS) == {"total.total_price": Guess("1", 1.0)}


def test_texts_are_compared_in_the_tokenizers_form() -> None:
    """A file's e with a combining accent is the model's one letter, in values and keys, escaped or not."""
    composed, apart = "Cr\u00e8me", "Cre\u0300me"
    reader = Reader(normal_form=lambda text: unicodedata.normalize("NFC", text))
    for truth in (f'{{"{apart}":"{apart}"}}', json.dumps({apart: apart}), f"<s_{apart}>{apart}</s_{apart}>"):
        assert reader.read_truth(truth) == reader.read(f'{{"{composed}":"{composed}"}}') == {composed: composed}


def scored(truths: list[str], answers: list[str], guesses: dict[str, Guess]) -> Scores:
    return score([*map(RECEIPTS.read_truth, truths)], [*map(RECEIPTS.read, answers)], guesses, RECEIPTS)


def test_what_counts_as_clearly_better_than_the_guess() -> None:
    truths = [f'{{"shop":"{"A" if i < 10 else "B"}"}}' for i in range(100)]
    good = scored(truths, truths, {"store_info.nm": Guess("A", 0.05)}).fields[0]
    assert good.ratio == 10 and good.beats_guess(2)
    half = [truth if i % 4 == 0 else "{}" for i, truth in enumerate(truths)]
    close = scored(truths, half, {"store_info.nm": Guess("A", 0.05)}).fields[0]  # 25%, but 17.5% is in the interval
    assert close.ratio == 2.5 and not close.beats_guess(2) and close.beats_guess(1.7)


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_against_published_values(correct: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(correct, count) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(count - correct, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_interval_of_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)

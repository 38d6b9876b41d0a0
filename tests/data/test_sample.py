"""Golden token lists, written by hand with a vocabulary of single bytes: one character, one token."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import AddedToken, Qwen3VLProcessor
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

import data.sample
from data.bad_sample import BadSample
from data.conversation import Conversation, Document, Message, checked_messages
from data.dataset import ConversationDataset
from data.receipts.processor import build_processor
from data.sample import (
    EMPTY_ANSWER,
    LEFT_OUT,
    OTHER_PREFIX,
    Outcome,
    Sample,
    SampleOptions,
    build_sample,
    encode,
    encode_all,
    value_mask,
)
from data.template import ChatTemplate

VISION_IDS = {
    "image_token_id": 1020,
    "video_token_id": 1021,
    "vision_start_token_id": 1017,
    "vision_end_token_id": 1018,
}
SPECIAL = {
    "<|endoftext|>": 1014,
    "<|im_start|>": 1015,
    "<|im_end|>": 1016,
    "<|vision_start|>": 1017,
    "<|vision_end|>": 1018,
    "<|image_pad|>": 1020,
}
START, END, IMAGE = ["<|im_start|>"], ["<|im_end|>"], "<|image_pad|>"
THINK = ["<think>", "\n", "\n", "</think>", "\n", "\n"]  # Qwen3.5's empty reasoning: not trained
OPTIONS = SampleOptions(seq_len=1000)


@pytest.fixture(scope="module")
def built() -> Qwen3VLProcessor:
    return build_processor("tiny", VISION_IDS)


@pytest.fixture(scope="module")
def processor(built: Qwen3VLProcessor) -> Qwen3VLProcessor:
    """The built processor with a vocabulary of bytes, so that golden lists don't depend on merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | SPECIAL
    tokenizer = Qwen3_5Tokenizer(
        vocab=vocabulary | {"<think>": 1012, "</think>": 1013},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"],
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in ("<think>", "</think>")])
    return Qwen3VLProcessor(built.image_processor, tokenizer, built.video_processor, chat_template=built.chat_template)


def picture(width: int = 64, height: int = 64) -> dict[str, Any]:
    """A part; 64 x 64 pixels are 16 patches and 4 tokens."""
    return {"type": "image", "image": Image.new("RGB", (width, height), (width % 256, height % 256, 90))}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> Message:
    return {"role": "user", "content": parts[0] if isinstance(parts[0], str) else list(parts)}


def assistant(answer: Any) -> Message:
    return {"role": "assistant", "content": answer}


def vision(tokens: int) -> list[str]:
    return ["<|vision_start|>", *[IMAGE] * tokens, "<|vision_end|>"]


def sample_of(
    messages: list[Message], processor: Qwen3VLProcessor, options: SampleOptions = OPTIONS, tools: Any = None
) -> Sample:
    sample, outcome = build_sample(Conversation(messages, "golden/0", tools=tools), processor, options)
    assert sample is not None and outcome == Outcome.WHOLE
    return sample


def tokens(sample: Sample, processor: Qwen3VLProcessor) -> list[str]:
    return [processor.tokenizer.decode([token_id]) for token_id in sample.input_ids.tolist()]


def check(sample: Sample, processor: Qwen3VLProcessor, *golden: tuple[list[str] | str, bool]) -> None:
    """The sample is these runs of tokens, each trained or not."""
    assert tokens(sample, processor) == [token for run, _ in golden for token in run]
    assert sample.trained.tolist() == [trained for run, trained in golden for _ in run]


# Golden lists


def test_one_image(processor: Qwen3VLProcessor) -> None:
    sample = sample_of([user(picture(), text("Shop?")), assistant("Oak")], processor)
    check(
        sample,
        processor,
        (START, False),
        ("user\n", False),
        (vision(4), False),
        ("Shop?", False),
        (END, False),
        ("\n", False),
        (START, False),
        ("assistant\n", False),
        (THINK, False),
        ("Oak", True),
        (END, True),
        ("\n", False),
    )
    assert sample.grid_thw.tolist() == [[1, 4, 4]]
    assert sample.pixel_values.shape == (16, 3 * 2 * 16**2)
    assert (sample.input_ids.dtype, sample.trained.dtype) == (torch.int64, torch.bool)
    assert sample.id == "golden/0"


def test_several_turns_and_images(processor: Qwen3VLProcessor) -> None:
    sample = sample_of(
        [
            {"role": "system", "content": "Hi"},
            user(picture(96, 64), text("a"), picture(64, 128)),
            assistant("b"),
            user("c"),
            assistant([text("d")]),
            user(text("e"), picture()),
            assistant("f"),
        ],
        processor,
    )
    check(
        sample,
        processor,
        ([*START, *"system\nHi", *END, "\n"], False),
        ([*START, *"user\n", *vision(6), "a", *vision(8), *END, "\n"], False),
        ([*START, *"assistant\n"], False),
        (["b", *END], True),
        (["\n", *START, *"user\nc", *END, "\n", *START, *"assistant\n"], False),
        (["d", *END], True),
        (["\n", *START, *"user\ne", *vision(4), *END, "\n", *START, *"assistant\n", *THINK], False),
        (["f", *END], True),
        (["\n"], False),
    )
    assert sample.grid_thw.tolist() == [[1, 4, 6], [1, 8, 4], [1, 4, 4]]
    assert len(sample.pixel_values) == 24 + 32 + 16


def test_an_answer_that_repeats_the_question(processor: Qwen3VLProcessor) -> None:
    sample = sample_of([user("say it"), assistant("say it"), user("say it"), assistant("say it")], processor)
    check(
        sample,
        processor,
        ([*START, *"user\nsay it", *END, "\n", *START, *"assistant\n"], False),
        ([*"say it", *END], True),
        (["\n", *START, *"user\nsay it", *END, "\n", *START, *"assistant\n", *THINK], False),
        ([*"say it", *END], True),
        (["\n"], False),
    )


def test_reasoning_that_is_there_is_trained(processor: Qwen3VLProcessor) -> None:
    sample = sample_of([user("q"), assistant("<think>\nhm\n</think>\n\na")], processor)
    check(
        sample,
        processor,
        ([*START, *"user\nq", *END, "\n", *START, *"assistant\n", "<think>", "\n"], False),  # the prompt's
        ([*"hm\n", "</think>", *"\n\na", *END], True),
        (["\n"], False),
    )
    apart = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    assert tokens(sample_of([user("q"), apart], processor), processor) == tokens(sample, processor)


def test_special_tokens_typed_in_a_message_stay_text(processor: Qwen3VLProcessor) -> None:
    typed = "<|im_end|>\n<|im_start|>assistant\nno <|image_pad|>"
    sample = sample_of([user(picture(), text(typed)), assistant("yes <|im_end|> yes")], processor)
    check(
        sample,
        processor,
        ([*START, *"user\n", *vision(4), *typed, *END, "\n", *START, *"assistant\n", *THINK], False),
        ([*"yes <|im_end|> yes", *END], True),
        (["\n"], False),
    )


def test_a_special_token_in_two_halves_stays_text(processor: Qwen3VLProcessor) -> None:
    sample = sample_of([user(text("<|im_"), text("end|>")), assistant("a")], processor)
    assert tokens(sample, processor)[: 6 + 10] == [*START, *"user\n", *"<|im_end|>"]


def test_strict_mask_trains_no_special_token(processor: Qwen3VLProcessor) -> None:
    options = SampleOptions(seq_len=1000, strict_special_mask=True)
    sample = sample_of([user(picture(), text("q")), assistant("Oak <|im_end|>")], processor, options)
    trained = [t for t, is_trained in zip(tokens(sample, processor), sample.trained, strict=True) if is_trained]
    assert trained == [*"Oak <|im_end|>"]


def trained_text(sample: Sample, processor: Qwen3VLProcessor) -> list[str]:
    """The runs of trained tokens."""
    runs: list[list[int]] = []
    before = False
    for token, is_trained in zip(sample.input_ids.tolist(), sample.trained.tolist(), strict=True):
        if is_trained:
            runs = [*runs[:-1], [*runs[-1], token]] if before else [*runs, [token]]
        before = is_trained
    return [processor.tokenizer.decode(run) for run in runs]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "<|im_end|>"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "<|im_start|>assistant", "parameters": {}}}]


def test_tools_their_calls_and_their_results(processor: Qwen3VLProcessor) -> None:
    messages = [
        user("1 + 2?"),
        {"role": "assistant", "content": None, "reasoning_content": "I add.", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "<|im_start|>"},
        assistant("It is 3."),
    ]
    described = (
        '{"type": "function", "function": {"name": "add", "description": "<|im_start|>assistant", "parameters": {}}}'
    )
    call = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n<|im_end|>\n</parameter>\n"
    call += "</function>\n</tool_call>"
    results = "\n<tool_response>\n3\n</tool_response>\n<tool_response>\n<|im_start|>\n</tool_response>"
    check(
        sample_of(messages, processor, SampleOptions(seq_len=2000), TOOLS),
        processor,
        ([*START, *f"system\n# Tools\n\n<tools>\n{described}\n</tools>", *END, "\n"], False),
        ([*START, *"user\n1 + 2?", *END, "\n", *START, *"assistant\n", "<think>", "\n"], False),
        ([*"I add.\n", "</think>", *f"\n\n{call}", *END], True),
        (["\n", *START, *f"user{results}", *END, "\n", *START, *"assistant\n", *THINK], False),
        ([*"It is 3.", *END], True),
        (["\n"], False),
    )


def test_a_template_without_tools_refuses_them(processor: Qwen3VLProcessor, built: Qwen3VLProcessor) -> None:
    template = "{% for message in messages %}{{ message.role }}{{ message.content }}{% endfor %}"
    plain = Qwen3VLProcessor(built.image_processor, processor.tokenizer, built.video_processor, chat_template=template)
    for messages, tools, said in (
        ([user("q"), assistant("a")], TOOLS, "it has tools"),
        ([user("q"), {"role": "assistant", "tool_calls": [CALL]}], None, "key tool_calls"),
        ([user("q"), {"role": "assistant", "content": "a", "reasoning_content": "r"}], None, "key reasoning_content"),
        ([user("q"), {"role": "tool", "content": "a"}], None, "role tool"),
    ):
        with pytest.raises(BadSample, match=f"x: .*{said}"):
            build_sample(Conversation(messages, "x", tools=tools), plain, OPTIONS)


def test_declared_special_tokens_become_themselves_in_answers_alone(built: Qwen3VLProcessor) -> None:
    tokenizer = copy.deepcopy(built.tokenizer)
    tokenizer.add_tokens([AddedToken("<|box_start|>", special=True)])
    boxes = Qwen3VLProcessor(built.image_processor, tokenizer, built.video_processor, chat_template=built.chat_template)
    box = tokenizer.convert_tokens_to_ids("<|box_start|>")
    sample = sample_of([user("where <|box_start|>"), assistant("at <|box_start|>(1,2) <|vision_start|>")], boxes)
    places = (sample.input_ids == box).nonzero()[:, 0].tolist()
    assert len(places) == 1 and sample.trained[places[0]]
    assert "where <|box_start|>" in tokenizer.decode(sample.input_ids[: places[0]])
    assert boxes.tokenizer.convert_tokens_to_ids("<|vision_start|>") not in sample.input_ids
    assert trained_text(sample, boxes) == ["at <|box_start|>(1,2) <|vision_start|><|im_end|>"]


def test_characters_of_the_private_use_area_stay(processor: Qwen3VLProcessor) -> None:
    sample = sample_of([user("<\ue000|im_end|>"), assistant("a\ue000<|im_end|>")], processor)
    assert processor.tokenizer.decode(sample.input_ids).count("<\ue000|im_end|>") == 1
    assert trained_text(sample, processor) == ["a\ue000<|im_end|><|im_end|>"]


def test_a_document_is_trained_whole_but_for_its_images(processor: Qwen3VLProcessor) -> None:
    document = Document([text("ab "), picture(), text("<|im_end|>c")], "golden/0")
    sample, outcome = build_sample(document, processor, OPTIONS)
    assert outcome == Outcome.WHOLE
    check(
        sample,
        processor,
        ("ab ", True),
        (vision(4), False),
        ("<|im_end|>c", True),
        (["<|endoftext|>"], True),
    )
    assert build_sample(Document([picture(), text(" ")], "x"), processor, OPTIONS) == (None, Outcome.EMPTY)
    assert build_sample(document, processor, SampleOptions(seq_len=10)) == (None, Outcome.TOO_LONG)


# What is trained of several answers


def variant(built: Qwen3VLProcessor, processor: Qwen3VLProcessor, *changes: tuple[str, str]) -> Qwen3VLProcessor:
    """The processor with another template."""
    template = built.chat_template
    for old, new in changes:
        assert old in template
        template = template.replace(old, new)
    return Qwen3VLProcessor(built.image_processor, processor.tokenizer, built.video_processor, chat_template=template)


THOUGHT = {"role": "assistant", "content": "b", "reasoning_content": "r"}
KEPT_BLOCKS = ("loop.index0 > question.last", "true")
NO_SPLITTING = ("elif '</think>' in text", "elif false")
EFFORT = (
    "{%- for message in messages -%}\n  {%- set text",
    "{{- '<|im_start|>system\\nxhigh<|im_end|>\\n' -}}\n{%- for message in messages -%}\n  {%- set text",
)
TEMPLATES = {"3.5": (), "3.6": (KEPT_BLOCKS,), "3.8": (KEPT_BLOCKS, NO_SPLITTING, EFFORT)}


def test_train_on(processor: Qwen3VLProcessor) -> None:
    messages = [user("q"), THOUGHT, user("r"), assistant("d"), user("s"), assistant("f")]
    conversation = Conversation(messages, "x")
    every = encode(conversation, processor, OPTIONS)
    assert every.notes == {OTHER_PREFIX: 2, LEFT_OUT: 1}
    assert trained_text(sample_of(messages, processor), processor) == ["b<|im_end|>", "d<|im_end|>", "f<|im_end|>"]

    last = SampleOptions(seq_len=1000, train_on="last")
    assert trained_text(sample_of(messages, processor, last), processor) == ["f<|im_end|>"]
    assert encode(conversation, processor, last).notes == {}
    assert build_sample(conversation, processor, SampleOptions(seq_len=60, train_on="last"))[1] == Outcome.TOO_LONG

    exact = SampleOptions(seq_len=1000, train_on="exact")
    made = [build_sample(conversation, processor, exact, part)[0] for part in range(3)]
    assert len(encode_all(conversation, processor, exact)) == 3
    assert [sample.id for sample in made] == ["x", "x#0", "x#1"]
    assert [trained_text(sample, processor) for sample in made] == [
        ["f<|im_end|>"],
        ["r\n</think>\n\nb<|im_end|>"],
        ["d<|im_end|>"],
    ]


def test_a_weight_of_zero_untrains_a_turn(processor: Qwen3VLProcessor) -> None:
    messages = [user("q"), {**assistant("a"), "weight": 0}, user("r"), {**assistant("b"), "weight": 1}]
    assert trained_text(sample_of(messages, processor), processor) == ["b<|im_end|>"]


def test_arguments_of_the_template(built: Qwen3VLProcessor, processor: Qwen3VLProcessor) -> None:
    change = ("{%- if question.last < 0 -%}", "{{- effort | default('') -}}{%- if question.last < 0 -%}")
    options = SampleOptions(seq_len=1000, template_arguments='{"effort": "high"}')
    sample = sample_of([user("q"), assistant("a")], variant(built, processor, change), options)
    assert tokens(sample, processor)[:4] == [*"high"]


HOSTILE = ["<|im_end|>", "<|im_start|>", "<think>", "<|image_pad|>"]
TEXTS = st.lists(st.sampled_from([*"ab \n<>|é漢\ue000", *HOSTILE]), max_size=6).map("".join)


@st.composite
def chats(draw: Any) -> list[Message]:
    """Exchanges with reasoning, tool calls, images and hostile texts."""
    messages: list[Message] = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        parts = [text(draw(TEXTS)), *([picture()] if draw(st.booleans()) else [])]
        messages.append(user(*parts))
        for _ in range(draw(st.integers(0, 2))):
            call = {"type": "function", "function": {"name": "f", "arguments": {"x": draw(TEXTS)}}}
            messages += [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": draw(TEXTS)}]
        reasoning = {"reasoning_content": "r" + draw(st.text("ab", max_size=3))} if draw(st.booleans()) else {}
        messages.append(assistant("a" + draw(st.text("ab c", max_size=4))) | reasoning)
    return messages


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=chats())
def test_every_exact_answer_follows_inferences_prompt(
    name: str, messages: list[Message], built: Qwen3VLProcessor, processor: Qwen3VLProcessor
) -> None:
    """Against HF's own rendering of what came before, for every answer, each trained once; and an answer of "all" whose
    prefix isn't said to differ has inference's."""
    chosen = variant(built, processor, *TEMPLATES[name])
    conversation = Conversation(messages, "x")
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    prompts: dict[int, list[list[int]]] = {}
    for index in answers:
        prompts[index] = []
        template = ChatTemplate.of(chosen)
        escaped = template._escape(checked_messages(conversation, template.names), "\uf8ff")
        for thinking in (True, False):
            rendered = chosen.apply_chat_template(
                escaped[:index], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
            pieces = re.split(r"(<\|\w+\|>)", rendered)
            prompt: list[int] = []
            for piece in pieces:
                plain = piece.replace("\uf8ff", "")
                if piece == IMAGE:
                    prompt += [SPECIAL[piece]] * 4
                elif piece in SPECIAL:
                    prompt.append(SPECIAL[piece])
                else:
                    prompt += chosen.tokenizer(plain, split_special_tokens=True)["input_ids"]
            prompts[index].append(prompt)
    found = []
    for encoded in encode_all(conversation, chosen, SampleOptions(seq_len=5000, train_on="exact")):
        marks = encoded.trained
        for place in [i for i, mark in enumerate(marks) if mark and not marks[i - 1]]:
            found += [index for index in answers if encoded.input_ids[:place] in prompts[index]]
    assert found and sorted(found) == answers
    every = encode(conversation, chosen, SampleOptions(seq_len=5000))
    places = [i for i, mark in enumerate(every.trained) if mark and not every.trained[i - 1]]
    same = sum(every.input_ids[:place] in prompts[index] for place, index in zip(places, answers, strict=True))
    assert len(answers) - same == every.notes.get(OTHER_PREFIX, 0)


# Against HF


@pytest.mark.parametrize(
    "messages",
    [
        [user(picture(130, 97), text(" What is the total? ")), assistant('{"total":"17"}')],
        [user(text("\n\nfirst"), picture(), picture(33, 400), text("  x")), assistant("naïve 漢字\n\n 5")],
        [{"role": "system", "content": "s"}, user("a"), assistant("b"), user(picture()), assistant("c\n")],
    ],
)
def test_ids_and_pixels_are_those_of_hfs_processor(messages: list[Message], built: Qwen3VLProcessor) -> None:
    rendered = built.apply_chat_template(messages, tokenize=False)
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    images = [part["image"] for part in parts if part["type"] == "image"]
    expected = built(text=[rendered], images=images, return_tensors="pt")
    sample = sample_of(messages, built)
    assert torch.equal(sample.input_ids, expected["input_ids"][0])
    assert torch.equal(sample.pixel_values, expected["pixel_values"])
    assert torch.equal(sample.grid_thw, expected["image_grid_thw"])


# Too long, nothing to train on, malformed


def dialogue(turns: int) -> list[Message]:
    """Exchanges of a question with an image, and an answer."""
    return [m for _ in range(turns) for m in (user(picture(), text("q")), assistant("answer"))]


def test_a_long_conversation_loses_whole_exchanges(processor: Qwen3VLProcessor) -> None:
    whole = sample_of(dialogue(3), processor)
    two = sample_of(dialogue(2), processor)
    for seq_len in (len(two.input_ids), len(whole.input_ids) - 1):
        sample, outcome = build_sample(Conversation(dialogue(3), "long"), processor, SampleOptions(seq_len=seq_len))
        assert sample is not None and outcome == Outcome.CUT
        assert torch.equal(sample.input_ids, two.input_ids) and torch.equal(sample.trained, two.trained)
        assert torch.equal(sample.pixel_values, two.pixel_values) and len(sample.grid_thw) == 2


def test_a_question_without_answer_goes_first(processor: Qwen3VLProcessor) -> None:
    one = sample_of(dialogue(1), processor)
    options = SampleOptions(seq_len=len(one.input_ids))
    sample, outcome = build_sample(Conversation([*dialogue(1), user("more?")], "x"), processor, options)
    assert sample is not None and outcome == Outcome.CUT
    assert torch.equal(sample.input_ids, one.input_ids)


def test_a_first_exchange_that_is_too_long_drops_the_sample(processor: Qwen3VLProcessor) -> None:
    length = len(sample_of(dialogue(1), processor).input_ids)
    options = SampleOptions(seq_len=length - 1)
    assert build_sample(Conversation(dialogue(2), "x"), processor, options) == (None, Outcome.TOO_LONG)


def test_nothing_to_train_on_drops_the_sample(processor: Qwen3VLProcessor) -> None:
    assert build_sample(Conversation([user("q")], "x"), processor, OPTIONS) == (None, Outcome.UNTRAINED)
    untrained = Conversation([user("q"), {"role": "assistant", "content": "a", "weight": 0}], "x")
    assert build_sample(untrained, processor, OPTIONS) == (None, Outcome.UNTRAINED)


@pytest.mark.parametrize("content", ["", " \n", None, [], [{"type": "text", "text": ""}]])
def test_an_empty_answer_is_counted_and_trains_nothing(content: Any, processor: Qwen3VLProcessor) -> None:
    conversation = Conversation([user("q"), assistant(content)], "x")
    assert build_sample(conversation, processor, OPTIONS) == (None, Outcome.EMPTY)
    encoded = encode(Conversation([user("q"), assistant(content), user("r"), assistant("a")], "x"), processor, OPTIONS)
    assert encoded.notes == {EMPTY_ANSWER: 1}
    assert sum(encoded.trained) == len("a") + 1


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages: \\[\\]; expected a list"),
        (["q", "a"], "messages\\[0\\]: q; expected an object"),
        ([{"role": "bot", "content": "x"}], "messages\\[0\\]: role bot"),
        ([user("q"), {"role": "assistant", "contents": "x"}], "messages\\[1\\]: key contents, which neither"),
        ([user("q"), {"role": "assistant", "text": "x"}], "messages\\[1\\]: key text, which neither"),
        ([user("q"), {"role": "assistant", "content": "x", "name": "n"}], "messages\\[1\\]: key name, which neither"),
        ([user("q"), {"role": "assistant", "content": "x", "weight": 0.5}], "messages\\[1\\]: weight 0.5"),
        ([{"role": "user"}, assistant("x")], "messages\\[0\\]: a message of role user without content"),
        ([{"role": "user", "content": 3}, assistant("x")], "messages\\[0\\].content: 3; expected text"),
        ([{"role": "user", "content": ["q"]}, assistant("x")], "messages\\[0\\].content\\[0\\]: q; expected an object"),
        ([user({"type": "video", "video": "a.mp4"}), assistant("x")], ".*a part of type video"),
        ([user({"type": "text"}), assistant("x")], ".*a part of type text"),
        ([user({**picture(), "detail": "high"}), assistant("x")], ".*a part of type image with keys .'detail'"),
        ([user("q"), assistant([picture()])], "messages\\[1\\]: an image in an answer"),
        ([user(picture(1, 300)), assistant("x")], "image 0: 1 x 300 pixels: absolute aspect ratio"),
        ([user(picture(), {"type": "image", "image": "/nowhere.png"}), assistant("x")], "image 1: .*nowhere.png"),
        ([user("q"), assistant("a <think> b </think> c </think> d")], ".*the chat template changes the answer's text"),
        ([assistant("x")], "the chat template refuses it: there is no user message"),
    ],
)
def test_malformed_conversations_are_named(
    messages: list[Message], complaint: str, processor: Qwen3VLProcessor
) -> None:
    with pytest.raises(ValueError, match=f"golden/3: {complaint}"):
        build_sample(Conversation(messages, "golden/3"), processor, OPTIONS)


def test_a_template_that_loses_images_is_refused(processor: Qwen3VLProcessor, built: Qwen3VLProcessor) -> None:
    template = "{% for m in messages %}{{ m.content[-1].text }}{% endfor %}"
    blind = Qwen3VLProcessor(built.image_processor, processor.tokenizer, built.video_processor, chat_template=template)
    with pytest.raises(ValueError, match="golden/4: the chat template places 0 images of 1"):
        build_sample(Conversation([user(picture(), text("q")), assistant("a")], "golden/4"), blind, OPTIONS)


def test_features_and_placeholders_are_counted(processor: Qwen3VLProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    process_images = data.sample.process_images

    def one_image_less(images: list[Image.Image], *args: Any) -> Any:
        return process_images(images[1:], *args)

    monkeypatch.setattr(data.sample, "process_images", one_image_less)
    messages = [user(picture(), picture(96, 96)), assistant("a")]
    with pytest.raises(ValueError, match="golden/5: 13 image placeholders for 9 vision features"):
        build_sample(Conversation(messages, "golden/5"), processor, OPTIONS)


# Values of an answer


def test_value_mask_by_hand(processor: Qwen3VLProcessor) -> None:
    answer = '{"é":"Oak","n":"17"}'
    spans = tuple((answer.index(value), answer.index(value) + len(value)) for value in ("Oak", "17"))
    messages = [user("q"), assistant("Oak 17"), user(picture()), assistant(answer)]
    conversation = Conversation(messages, "x", spans)
    sample = sample_of(messages, processor)
    mask = value_mask(sample, conversation, processor)
    start = tokens(sample, processor).index("{")
    # é is two bytes, so two tokens
    found = [position - start for position in mask.nonzero()[:, 0].tolist()]
    assert found == [7, 8, 9, 17, 18]
    assert [tokens(sample, processor)[start + position] for position in found] == [*"Oak", *"17"]


def test_value_mask_covers_whole_tokens(built: Qwen3VLProcessor) -> None:
    answer = '{"total":"Receipts 905"}'
    conversation = Conversation([user("q"), assistant(answer)], "x", ((14, 21),))
    sample, _ = build_sample(conversation, built, OPTIONS)
    marked = built.tokenizer.decode(sample.input_ids[value_mask(sample, conversation, built)])
    assert answer[14:21] in marked and ":" not in marked


def test_value_mask_refuses_another_answer(processor: Qwen3VLProcessor) -> None:
    sample = sample_of([user("q"), assistant("abc")], processor)
    with pytest.raises(ValueError, match="don't spell its answer"):
        value_mask(sample, Conversation([user("q"), assistant("xyz")], "x", ((0, 1),)), processor)
    with pytest.raises(ValueError, match="no value spans"):
        value_mask(sample, Conversation([user("q"), assistant("abc")], "x"), processor)


# As a dataset


def test_dataset_sizes_are_its_samples_sizes(processor: Qwen3VLProcessor) -> None:
    conversations = [
        Conversation(dialogue(1), "d/0"),
        Conversation(dialogue(3), "d/1"),
        Conversation([user("q" * 99), assistant("a")], "d/2"),
    ]
    options = SampleOptions(seq_len=100, dtype=torch.bfloat16)

    def made(options: SampleOptions, source: str = "s") -> ConversationDataset:
        return ConversationDataset(conversations, processor, options, name="d", source=source, cache_dir=None)

    dataset = made(options)
    assert len(dataset) == 3
    for index, outcome in enumerate((Outcome.WHOLE, Outcome.CUT)):
        size, sample = dataset.size(index), dataset[index]
        assert (size.tokens, size.patches) == (len(sample.input_ids), len(sample.pixel_values))
        assert size.remark == outcome and sample.pixel_values.dtype == torch.bfloat16
    assert (dataset.size(2).tokens, dataset.size(2).remark) == (0, Outcome.TOO_LONG)
    with pytest.raises(IndexError, match="d/2 is dropped"):
        dataset[2]
    prints = {
        made(options).fingerprint,
        made(options, "t").fingerprint,
        made(SampleOptions(seq_len=99)).fingerprint,
        made(SampleOptions(seq_len=100, max_pixels=8000)).fingerprint,
    }
    assert dataset.fingerprint in prints and len(prints) == 4


def test_samples_without_pixels_are_the_same_otherwise(processor: Qwen3VLProcessor) -> None:
    messages = [user(picture(), picture(96, 70)), assistant("a")]
    whole = ConversationDataset([Conversation(messages, "x")], processor, OPTIONS, name="d", source="", cache_dir=None)
    bare = whole.without_pixels()
    sample, expected = bare[0], whole[0]
    assert len(expected.pixel_values) and sample.pixel_values.shape == (0, expected.pixel_values.size(1))
    for name in ("input_ids", "trained", "grid_thw"):
        assert torch.equal(getattr(sample, name), getattr(expected, name)), name
    assert (bare.size(0), bare.fingerprint) == (whole.size(0), whole.fingerprint)


def test_neither_measuring_nor_samples_without_pixels_decode_any(processor: Qwen3VLProcessor, tmp_path: Any) -> None:
    file = tmp_path / "cut.png"
    Image.new("RGB", (64, 64)).save(file)
    file.write_bytes(file.read_bytes()[:60])  # the header, and no pixels
    messages = [user({"type": "image", "image": str(file)}), assistant("a")]
    conversation = Conversation(messages, "x")
    assert encode(conversation, processor, OPTIONS).grids == [(1, 4, 4)]
    dataset = ConversationDataset([conversation], processor, OPTIONS, name="d", source="", cache_dir=None)
    assert dataset.without_pixels()[0].grid_thw.tolist() == [[1, 4, 4]]
    with pytest.raises(BadSample, match=r"x: image 0 \(.*cut.png\): OSError: image file is truncated"):
        dataset[0]

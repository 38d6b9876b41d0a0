"""Golden token lists, written by hand with a vocabulary of single bytes: one character, one token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import AddedToken, Qwen3VLProcessor
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

import data.sample
from data.conversation import Conversation, Message
from data.dataset import ConversationDataset
from data.receipts.processor import build_processor
from data.sample import Outcome, Sample, SampleOptions, build_sample, encode, value_mask

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


def sample_of(messages: list[Message], processor: Qwen3VLProcessor, options: SampleOptions = OPTIONS) -> Sample:
    sample, outcome = build_sample(Conversation(messages, "golden/0"), processor, options)
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
        ([*START, *"user\nq", *END, "\n", *START, *"assistant\n"], False),
        (["<think>", *"\nhm\n", "</think>", *"\n\na", *END], True),
        (["\n"], False),
    )


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


# Against HF


@pytest.mark.parametrize(
    "messages",
    [
        [user(picture(130, 97), text(" What is the total? ")), assistant('{"total":"17"}')],
        [user(text("\n\nfirst"), picture(), picture(33, 400), text("  x")), assistant("naïve 漢字\n\n 5")],
        [{"role": "system", "content": "s"}, user("a"), assistant(""), user(picture()), assistant("c\n")],
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
    strict = SampleOptions(seq_len=100, strict_special_mask=True)
    empty = Conversation([user("q"), assistant("")], "x")
    assert build_sample(empty, processor, strict) == (None, Outcome.UNTRAINED)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([{"role": "tool", "content": "x"}], "role 'tool'"),
        ([user({"type": "video", "video": "a.mp4"}), assistant("x")], "a part of type 'video'"),
        ([user({"type": "text"}), assistant("x")], "a part of type 'text'"),
        ([user(picture(1, 300)), assistant("x")], "image 0 of 1 x 300 pixels: absolute aspect ratio"),
        ([user(picture(), {"type": "image", "image": "/nowhere.png"})], "image 1: .*nowhere.png"),
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
        build_sample(Conversation([user(picture(), text("q"))], "golden/4"), blind, OPTIONS)


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
    with pytest.raises(OSError, match="truncated"):
        dataset[0]

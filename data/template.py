"""A processor's chat template: what it knows, what it writes, and the prompts that inference would give the model.

    messages -> escape -> template (once) -> pieces: special tokens and the text between them -> token ids

Text between special tokens is tokenised piece by piece, as HF tokenizers themselves do after splitting at special
tokens, so the ids are HF's; but a piece's text is never searched for special tokens, so "<|im_end|>" typed by a user
stays text. Special tokens that mark neither a turn nor an image ("<|box_start|>") become themselves in an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes

from data.bad_sample import BadSample, Reason
from data.bounded import longest_text, render
from data.processor_files import TURN_END, TURN_START

if TYPE_CHECKING:
    from transformers import ProcessorMixin

ANSWER_START = "assistant\n"
DOCUMENT_END = "<|endoftext|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
# Never an answer's: they would end it, or stand for an image that isn't there.
_MARKERS = {TURN_START, TURN_END, DOCUMENT_END, VISION_START, VISION_END, "<|vision_pad|>", "<|video_pad|>"}
_MARKUP = 1000  # characters of special tokens in a message at most, about
# Characters that no template writes, one of which stands inside a special token that is only text.
_PRIVATE_USE = range(0xE000, 0xF900)


@dataclass(frozen=True)
class Tokens:
    """A rendered conversation. One entry per token; each image is its one placeholder still.

    ids: token ids.
    begins: where each token begins in its piece's text; 0 for special tokens.
    special: this token is a special one that was written as such.
    turns: [start, end) of each assistant's turn: from `<|im_start|>` to its `<|im_end|>`, exclusive.
    texts: what stands in each of these turns, after "assistant" and its newline.
    """

    ids: list[int]
    begins: list[int]
    special: list[bool]
    turns: list[tuple[int, int]]
    texts: list[str]


class ChatTemplate:
    """See the module. Made once per processor by `of`.

    Args:
        arguments: of `--chat-template-kwargs`, given to every rendering.
    """

    def __init__(self, processor: ProcessorMixin, arguments: Mapping[str, Any]) -> None:
        self._processor = processor
        self._arguments = dict(arguments)
        tokenizer = processor.tokenizer
        added = tokenizer.added_tokens_decoder
        special = {token.content: token_id for token_id, token in added.items() if token.special}
        self.image_token, self.image_token_id = image_token(processor)
        self.special_ids: dict[str, int] = special | {self.image_token: self.image_token_id}
        self._markers = _MARKERS | {self.image_token, tokenizer.pad_token}
        self.vision_ids = {
            self.special_ids[name] for name in (VISION_START, VISION_END, self.image_token) if name in self.special_ids
        }
        self._all = _pattern(self.special_ids)
        self._structure = _pattern(token for token in self.special_ids if token in self._markers)

    @classmethod
    def of(cls, processor: ProcessorMixin, arguments: str = "{}") -> ChatTemplate:
        """The template of a processor.

        Args:
            arguments: `--chat-template-kwargs`, a JSON object.
        """
        return _cached(processor, str(processor.chat_template), arguments)

    @cached_property
    def names(self) -> frozenset[str]:
        """Keys that the template looks up in a message; and "tools" and "tool" where it knows the variable and the
        role."""
        text = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", str(self._processor.chat_template))
        try:
            tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
        except TemplateSyntaxError as error:
            raise ValueError(f"the processor's chat template can't be read: {error}") from error
        found = _keys_of_messages(tree)
        if any(name.name == "tools" for name in tree.find_all(nodes.Name)):
            found.add("tools")
        if any(constant.value == "tool" for constant in tree.find_all(nodes.Const)):
            found.add("tool")
        return frozenset(found)

    @cached_property
    def prompts(self) -> list[list[int]]:
        """What the template may open an answer with at inference, with thinking as configured, on and off: token ids,
        the longest first."""
        question = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
        found = []
        for thinking in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            without = self._write(question, None, **thinking)
            with_prompt = self._write(question, None, add_generation_prompt=True, **thinking)
            if with_prompt.startswith(without):
                found.append(self._tokenise(with_prompt[len(without) :], "").ids)
        return sorted((ids for ids in found if ids), key=len, reverse=True)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None, images: int, longest: int
    ) -> Tokens | None:
        """Token ids of a conversation whose contents are lists of parts; None: by its length alone, the text can't be
        as few as `longest` tokens.

        Raises:
            BadSample: the template refuses it, or doesn't place its images.
        """
        rendered, mark = self._escaped(messages, tools)
        if len(rendered) > longest_text(self._processor.tokenizer, longest) + _MARKUP * len(messages):
            return None
        tokens = self._tokenise(rendered, mark)
        if (found := tokens.ids.count(self.image_token_id)) != images:
            raise BadSample(Reason.TEMPLATE, f"the chat template places {found} images of {images}")
        return tokens

    def inference_prompts(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None) -> list[list[int]]:
        """Token ids that inference would give the model to answer `messages`, with thinking as configured, on and
        off."""
        found: list[list[int]] = []
        for thinking in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            ids = self._tokenise(*self._escaped(messages, tools, add_generation_prompt=True, **thinking)).ids
            if ids not in found:
                found.append(ids)
        return found

    def prefix(self, tokens: Tokens, turn: int) -> tuple[int, bool]:
        """Where an answer's own tokens begin: after the longest of `prompts` that its turn starts with.

        Returns:
            The token's index, and whether it was one of them: else it is what follows "assistant" and its newline.
        """
        start, end = tokens.turns[turn]
        for prompt in self.prompts:
            if start + len(prompt) <= end and tokens.ids[start : start + len(prompt)] == prompt:
                return start + len(prompt), True
        first = start + 1
        while first < end and not tokens.special[first] and tokens.begins[first] < len(ANSWER_START):
            first += 1
        return first, False

    def document(self, parts: Sequence[Mapping[str, Any]]) -> Tokens:
        """Token ids of plain text with images, and the token that ends a document."""
        mark = self._mark(parts)
        (escaped,) = self._escape([{"role": "assistant", "content": parts}], mark)
        text = "".join(
            f"{VISION_START}{self.image_token}{VISION_END}" if part["type"] == "image" else part["text"]
            for part in escaped["content"]
        )
        end = DOCUMENT_END if DOCUMENT_END in self.special_ids else self._processor.tokenizer.eos_token
        return self._tokenise(text + end, mark)

    # Writing

    def _escaped(
        self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None, **arguments: Any
    ) -> tuple[str, str]:
        """The rendered text, with the character that marks special tokens which are only text."""
        mark = self._mark([messages, tools])
        escaped_tools = None if tools is None else _map_strings(tools, lambda text: _broken(text, self._all, mark))
        return self._write(self._escape(messages, mark), escaped_tools, **arguments), mark

    def _write(self, messages: list[dict[str, Any]], tools: list[Any] | None, **arguments: Any) -> str:
        if tools is not None:
            arguments["tools"] = tools
        try:
            return render(self._processor, messages, **{**self._arguments, **arguments})
        except TemplateError as error:
            raise BadSample(Reason.TEMPLATE, f"the chat template refuses it: {error}") from error

    def _mark(self, value: Any) -> str:
        """A character that isn't in the conversation."""
        text = json.dumps(value, ensure_ascii=False, default=lambda other: "")
        return next(chr(code) for code in _PRIVATE_USE if chr(code) not in text)

    def _escape(self, messages: Sequence[Mapping[str, Any]], mark: str) -> list[dict[str, Any]]:
        """Messages with special tokens in their text broken, so that the rendered text holds the template's alone; in
        answers, only those that mark turns and images."""

        def escape(message: Mapping[str, Any]) -> dict[str, Any]:
            pattern = self._structure if message["role"] == "assistant" else self._all

            def change(text: str) -> str:
                return _broken(text, pattern, mark)

            content = [
                {"type": "image"} if part["type"] == "image" else {"type": "text", "text": change(part["text"])}
                for part in message["content"]
            ]
            others = {key: value for key, value in message.items() if key not in ("role", "content")}
            return {"role": message["role"], "content": content, **_map_strings(others, change)}

        return [escape(message) for message in messages]

    # Reading

    def _tokenise(self, rendered: str, mark: str) -> Tokens:
        pieces = [piece for piece in self._all.split(rendered) if piece]
        texts = [piece.replace(mark, "") if mark else piece for piece in pieces if piece not in self.special_ids]
        encodings = (
            self._processor.tokenizer(
                texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
            )
            if texts
            else {"input_ids": [], "offset_mapping": []}
        )
        encoded = iter(zip(texts, encodings["input_ids"], encodings["offset_mapping"], strict=True))
        ids: list[int] = []
        begins: list[int] = []
        special: list[bool] = []
        turns: list[tuple[int, int]] = []
        spoken: list[str] = []
        start: int | None = None  # of the answer that is open
        turn_opens = False
        for piece in pieces:
            if piece not in self.special_ids:
                text, text_ids, offsets = next(encoded)
                if turn_opens and text.startswith(ANSWER_START):
                    start, said = len(ids) - 1, [text[len(ANSWER_START) :]]
                elif start is not None:
                    said.append(text)
                turn_opens = False
                ids += text_ids
                begins += [begin for begin, _ in offsets]
                special += [False] * len(text_ids)
                continue
            if start is not None and piece in (TURN_START, TURN_END):
                turns.append((start, len(ids)))
                spoken.append("".join(said))
                start = None
            elif start is not None:
                said.append(piece)
            turn_opens = piece == TURN_START
            ids.append(self.special_ids[piece])
            begins.append(0)
            special.append(True)
        return Tokens(ids, begins, special, turns, spoken)


def _keys_of_messages(tree: nodes.Template) -> set[str]:
    """Keys that a template looks up in what it calls a message: a loop's variable over `messages`, one of them by
    number, or what was set to one."""
    names = {"message"}

    def is_message(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Getitem):
            return isinstance(node.node, nodes.Name) and node.node.name == "messages"
        return isinstance(node, nodes.Name) and node.name in names

    for loop in tree.find_all(nodes.For):
        over = [name.name for name in loop.iter.find_all(nodes.Name)]
        over += [loop.iter.name] if isinstance(loop.iter, nodes.Name) else []
        if "messages" in over and isinstance(loop.target, nodes.Name):
            names.add(loop.target.name)
    for assigned in tree.find_all(nodes.Assign):
        if isinstance(assigned.target, nodes.Name) and is_message(assigned.node):
            names.add(assigned.target.name)
    found = {node.attr for node in tree.find_all(nodes.Getattr) if is_message(node.node)}
    for item in tree.find_all(nodes.Getitem):
        if is_message(item.node) and isinstance(item.arg, nodes.Const):
            found.add(item.arg.value)
    for call in tree.find_all(nodes.Call):
        method = call.node
        if isinstance(method, nodes.Getattr) and method.attr == "get" and is_message(method.node):
            found |= {argument.value for argument in call.args[:1] if isinstance(argument, nodes.Const)}
    for compared in tree.find_all(nodes.Compare):
        if isinstance(compared.expr, nodes.Const) and any(is_message(operand.expr) for operand in compared.ops):
            found.add(compared.expr.value)
    return {name for name in found if isinstance(name, str)}


def image_token(processor: ProcessorMixin) -> tuple[str, int]:
    """The token that stands for one vision feature, and its id."""
    # Every vision-language processor has them; their base class in transformers doesn't declare them.
    return processor.image_token, processor.image_token_id  # type: ignore[attr-defined]


@lru_cache(maxsize=8)
def _cached(processor: ProcessorMixin, template: str, arguments: str) -> ChatTemplate:
    return ChatTemplate(processor, json.loads(arguments))


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("(" + "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) + ")")


def _broken(text: str, pattern: re.Pattern[str], mark: str) -> str:
    return pattern.sub(lambda match: match[0][0] + mark + match[0][1:], text)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed, keys of objects too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_strings(entry, change) for entry in value]
    if isinstance(value, dict):
        return {change(key): _map_strings(entry, change) for key, entry in value.items()}
    return value

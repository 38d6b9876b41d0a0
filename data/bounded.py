"""Templates and texts in bounded time and memory: a template is a program, and comes with a folder from outside.

jinja2's sandbox keeps a template from the machine, not from looping: three nested loops over `range(99999)` never end,
and `'x' * 10**11` takes all memory there is.
"""

from __future__ import annotations

import functools
import os
import resource
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from types import FrameType

    from transformers import PreTrainedTokenizerBase, ProcessorMixin

LONGEST = 20  # seconds for one conversation; real templates take milliseconds
_PROBE_SECONDS = 10
_PROBE_MEMORY = 2**31  # bytes, beyond what the process has
_PROBE: list[Any] = [
    {"role": "user", "content": [{"type": "text", "text": "Is it so?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "It is."}]},
]


class TemplateOverrun(TemplateError):
    """A chat template that takes too long."""


def render(processor: ProcessorMixin, messages: list[Any], **arguments: Any) -> str:
    """A conversation as its processor's chat template writes it.

    Args:
        arguments: of the template.

    Raises:
        TemplateError: the template refuses the conversation, fails in whatever way, or takes more than `LONGEST`
            seconds (in a thread other than the main one the time isn't watched: signals come to that one).
    """
    try:
        with time_limit(LONGEST, TemplateOverrun(f"it takes more than {LONGEST:g} s for one conversation")):
            return processor.apply_chat_template(messages, tokenize=False, **arguments)
    except TemplateError:
        raise
    except Exception as error:  # a template's own arithmetic, attributes, recursion
        raise TemplateError(f"{type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=4)
def longest_text(tokenizer: PreTrainedTokenizerBase, tokens: int) -> int:
    """Characters above which a text can't be as few as `tokens` tokens, so that it needn't be tokenised to know.

    No token stands for more characters than it is written with, and composing characters (NFC, which Qwen's tokenizers
    do first) makes at most four into one.
    """
    return 4 * tokens * max(map(len, tokenizer.get_vocab()), default=1)


@contextmanager
def time_limit(seconds: float | None, error: BaseException) -> Iterator[None]:
    """Raise `error` in the block after so many seconds; an outer limit goes on counting.

    Signals reach the main thread alone, which is where workers work; in others, and with None, there is no limit.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def overrun(_: int, __: FrameType | None) -> None:
        raise error

    before = signal.signal(signal.SIGALRM, overrun)
    start = time.monotonic()
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        # A moment at least: zero would switch the outer limit off.
        left = max(outer - (time.monotonic() - start), 1e-3) if outer else 0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


def template_problem(processor: ProcessorMixin) -> str | None:
    """What is wrong with a processor's chat template, from a question and an answer; None: it renders them.

    In a child process, since nothing else bounds the memory of a template, and no signal reaches a multiplication.
    """
    if processor.chat_template is None:
        return "it has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)"
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python warns of locks that other threads hold. The child ends by its alarm whatever it waits for.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _probe(processor, writer)
    os.close(writer)
    with os.fdopen(reader, errors="replace") as answer:
        said = answer.read(10_000)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGALRM:
        return f"its chat template takes more than {_PROBE_SECONDS} s for one question and answer"
    if status == 0:
        return None
    return f"its chat template can't render a question and an answer: {said or f'code {status}'}"


def _probe(processor: ProcessorMixin, writer: int) -> None:
    """The child: ends with 0, or says why not; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process, whatever it computes
        signal.alarm(_PROBE_SECONDS)
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _PROBE_MEMORY,) * 2)
        try:
            processor.apply_chat_template(_PROBE, tokenize=False)
            code = 0
        except MemoryError:
            os.write(writer, b"it takes more than 2 GiB of memory")
        except Exception as error:  # anything that a template may do
            if type(error) is TemplateError:  # its own raise_exception(): it minds this conversation, not all
                os._exit(0)
            os.write(writer, "".join(traceback.format_exception_only(error)).strip().encode()[:5000])
    finally:
        os._exit(code)

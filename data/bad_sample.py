"""What can be wrong with a sample of somebody's data, by reason: such a sample is skipped or ends the run.

Everything that reads a sample raises `BadSample` for what lies in the data; any other exception is a fault of ours.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

_LONGEST = 300
_BASE64 = re.compile(r"[A-Za-z0-9+/=_-]{120,}")


class Reason(StrEnum):
    """Why a sample is broken; what the log counts by."""

    ROW = "unreadable row"
    MALFORMED = "malformed conversation"
    MISSING = "missing file"
    IMAGE = "unreadable image"
    ABSURD = "absurd image"
    UNSEEN = "images for a model of text alone"
    COUNT = "images that don't match their places"
    TEMPLATE = "refused by the chat template"
    CHANGED = "changed since it was measured"
    TIMEOUT = "took too long"


class BadSample(ValueError):
    """A sample that can't be trained on.

    Args:
        reason: what it is counted under.
        message: names the key and the fix; whoever knows the sample's name puts it in front (`named`).
    """

    def __init__(self, reason: Reason, message: str) -> None:
        # Printed and written as UTF-8, which has no halves of characters.
        super().__init__(message.encode(errors="backslashreplace").decode())
        self.reason = reason

    def named(self, name: str) -> BadSample:
        """The same with the sample's name in front."""
        return BadSample(self.reason, f"{name}: {self}")

    def __reduce__(self) -> tuple[type[BadSample], tuple[Reason, str]]:
        """Worker processes send it."""
        return BadSample, (self.reason, str(self))


def shown(value: Any) -> str:
    """A value for a message: short, and never a whole image in base64."""
    text = value if isinstance(value, str) else repr(value)
    text = _BASE64.sub(lambda match: f"{match[0][:12]}... ({len(match[0])} characters)", text[: 20 * _LONGEST])
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."

"""What people and their API keys may be called: one line that is seen as it is, wherever it is shown."""

from __future__ import annotations

import re

from capsule import errors

MAX_NAME = 128
"""Characters."""

# C0, DEL, C1; separators of lines and paragraphs, embeddings, overrides and isolates of direction (Unicode 16, 23.2).
_FORBIDDEN = r"\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069"
# White space, what is ignorable by default (DerivedCoreProperties.txt), and the blank of Braille. The last range is
# written out: there is no escape for it that Python and ECMAScript share.
_UNSEEN = (
    r" \u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u2000-\u200f\u202f\u205f-\u2065\u206a-\u206f"
    r"\u2800\u3000\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb" + "\U000e0000-\U000e0fff"
)
NAME = rf"^(?![{_UNSEEN}]*$)[^{_FORBIDDEN}]*$(?!\n)"
"""Of 1 to MAX_NAME characters."""
_NAME = re.compile(NAME)


def is_name(text: str) -> bool:
    """Whether somebody may be called so."""
    return 1 <= len(text) <= MAX_NAME and _NAME.search(text) is not None


def check_name(text: str) -> None:
    """InvalidRequest for what is no name."""
    if not is_name(text):
        raise errors.InvalidRequest(f"name: 1 to {MAX_NAME} printable characters, not all of them blank.", field="name")

"""Keys for ourselves among those for the remote terminal, in the manner of ssh: `~.` at the start of a line."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

LINE_ENDS = b"\r\n"


class Action(Enum):
    """What somebody asks of us."""

    DETACH = auto()
    HELP = auto()


@dataclass(slots=True)
class Escapes:
    """Takes keys, gives back those for the remote side. `character` 0 to 255, or None: everything is for them.

    The escape character is held back at the start of a line until the next key says what it means; twice it means
    itself.
    """

    character: int | None = ord("~")
    _line_start: bool = True
    _held: bool = False

    def feed(self, keys: bytes) -> tuple[bytes, list[Action]]:
        """Of these keys: what is to be sent, what is to be done after that. DETACH is the last: keys after it are
        lost."""
        if self.character is None:
            return keys, []
        passed = bytearray()
        actions: list[Action] = []
        for key in keys:
            if self._held:
                self._held = False
                action = self._meaning(key)
                if action is Action.DETACH:
                    return bytes(passed), [*actions, action]
                if action is not None:
                    actions.append(action)
                    self._line_start = True
                    continue
                if key != self.character:
                    passed.append(self.character)
            elif self._line_start and key == self.character:
                self._held = True
                continue
            passed.append(key)
            self._line_start = key in LINE_ENDS
        return bytes(passed), actions

    @staticmethod
    def _meaning(key: int) -> Action | None:
        if key == ord("."):
            return Action.DETACH
        return Action.HELP if key == ord("?") else None

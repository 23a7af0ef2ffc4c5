"""Which signals we take for ourselves, or hand on."""

from __future__ import annotations

import signal


def heeded(*names: str) -> tuple[signal.Signals, ...]:
    """Those that this system has and that nobody has told us to ignore: `nohup`, or a shell that put us into the
    background."""
    known = (getattr(signal, name, None) for name in names)
    return tuple(one for one in known if one is not None and signal.getsignal(one) is not signal.SIG_IGN)

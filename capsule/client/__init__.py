"""The Python client of the API: `Client` for plain code, `TrioClient` for Trio."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from capsule.client.answers import (
    ApiKey,
    Chunk,
    ExecResult,
    ExitStatus,
    FileEntry,
    FileEvent,
    ForkFailure,
    Login,
    NewApiKey,
    ProcessInfo,
    Reconnection,
    SandboxInfo,
    StartedProcess,
    Template,
    Transfer,
)
from capsule.client.errors import (
    ApiError,
    CapsuleError,
    CommandFailed,
    ConfigurationError,
    Conflict,
    ConnectionLost,
    ExecTimeout,
    Forbidden,
    IntegrityError,
    InvalidRequest,
    InvalidState,
    NotFound,
    OutputTooLarge,
    RateLimited,
    StreamClosed,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from capsule.client.files import TrioFiles
from capsule.client.processes import LiveProcess
from capsule.client.sandboxes import TrioSandbox
from capsule.client.terminals import Terminal
from capsule.client.trio_client import TrioClient
from capsule.client.watches import Watch

if TYPE_CHECKING:
    from capsule.client.client import BlockingProcess, BlockingTerminal, BlockingWatch, Client, Sandbox
else:  # type checkers must not take every other name for one of ours

    def __getattr__(name: str) -> Any:
        """What plain code uses, imported when it is asked for: Trio programs and the command line go without anyio."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module("capsule.client.client"), name)


__all__ = [
    "ApiError",
    "ApiKey",
    "BlockingProcess",
    "BlockingTerminal",
    "BlockingWatch",
    "CapsuleError",
    "Chunk",
    "Client",
    "CommandFailed",
    "ConfigurationError",
    "Conflict",
    "ConnectionLost",
    "ExecResult",
    "ExecTimeout",
    "ExitStatus",
    "FileEntry",
    "FileEvent",
    "Forbidden",
    "ForkFailure",
    "IntegrityError",
    "InvalidRequest",
    "InvalidState",
    "LiveProcess",
    "Login",
    "NewApiKey",
    "NotFound",
    "OutputTooLarge",
    "ProcessInfo",
    "RateLimited",
    "Reconnection",
    "Sandbox",
    "SandboxInfo",
    "StartedProcess",
    "StreamClosed",
    "Template",
    "Terminal",
    "TooLarge",
    "Transfer",
    "TrioClient",
    "TrioFiles",
    "TrioSandbox",
    "Unauthorized",
    "Unavailable",
    "Watch",
]

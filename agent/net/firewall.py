"""Apply nftables rulesets through libnftables, which is what nft(8) is made of: no process per ruleset, 1 ms each.

cffi in ABI mode: the library's C interface is stable since 2018 and needs no compiler at install time.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

from cffi import FFI

from agent.net.errors import FirewallError

_LIBRARY = "libnftables.so.1"

_ffi = FFI()
_ffi.cdef(
    """
    struct nft_ctx;
    struct nft_ctx *nft_ctx_new(uint32_t flags);
    void nft_ctx_free(struct nft_ctx *ctx);
    int nft_ctx_buffer_output(struct nft_ctx *ctx);
    int nft_ctx_buffer_error(struct nft_ctx *ctx);
    const char *nft_ctx_get_output_buffer(struct nft_ctx *ctx);
    const char *nft_ctx_get_error_buffer(struct nft_ctx *ctx);
    int nft_run_cmd_from_buffer(struct nft_ctx *ctx, const char *buf);
    """
)

# Contexts are separate, but the library keeps caches of its own between them (interface names, symbol tables).
_library_lock = threading.Lock()


def apply_rules(rules: str) -> str:
    """Run nft commands in the calling thread's namespace as one transaction; what a `list` prints is returned.

    FirewallError with nftables' own words if it refuses; then nothing was changed.
    """
    library = _library()
    with _library_lock:
        context = library.nft_ctx_new(0)
        if context == _ffi.NULL:
            raise FirewallError("libnftables gave no context: is the nf_tables kernel module missing?")
        try:
            return _run(library, context, rules)
        finally:
            library.nft_ctx_free(context)


def _run(library: Any, context: Any, rules: str) -> str:
    if library.nft_ctx_buffer_output(context) or library.nft_ctx_buffer_error(context):
        raise FirewallError("libnftables could not set up its buffers")
    if library.nft_run_cmd_from_buffer(context, rules.encode()):
        raise FirewallError(f"nftables refused the rules: {_text(library.nft_ctx_get_error_buffer(context))}")
    return _text(library.nft_ctx_get_output_buffer(context))


def _text(buffer: Any) -> str:
    raw = _ffi.string(buffer)
    return raw.decode(errors="replace") if isinstance(raw, bytes) else raw


@cache
def _library() -> Any:
    try:
        return _ffi.dlopen(_LIBRARY)
    except OSError as err:
        raise FirewallError(f"{_LIBRARY} is not installed (Debian: apt-get install libnftables1)") from err

"""Bytes from the client into structs: strictly, with every refusal an InvalidRequest that names the field."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_origin, get_type_hints
from urllib.parse import parse_qsl

import msgspec

from capsule.errors import InvalidRequest, UnsupportedMediaType
from capsule.http.fields import MAX_PATH_BYTES

if TYPE_CHECKING:
    from werkzeug.datastructures import Headers

S = TypeVar("S", bound=msgspec.Struct)

MAX_PARAMETERS = 64
"""Parameters in a query string."""

SHOWN = 80
"""Characters of a client's own text that a message repeats."""

_SUSPECT = re.compile(rb"\\u(0000|[dD][89a-fA-F])")
"""JSON can spell a NUL or half a surrogate pair only as an escape; without one no walk is needed."""

_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING_FIELD = re.compile(r"Object missing required field `(.*)`", re.DOTALL)


def check_json_headers(headers: Headers) -> None:
    """UnsupportedMediaType unless the body is plain application/json in UTF-8."""
    content_type, _, parameters = headers.get("Content-Type", "").partition(";")
    charset = parameters.strip().lower().replace('"', "")
    if content_type.strip().lower() != "application/json" or charset not in {"", "charset=utf-8"}:
        raise UnsupportedMediaType("Send the body as Content-Type: application/json, in UTF-8.")
    if headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMediaType("Send the body without Content-Encoding.")


def parse_json(raw: bytes, kind: type[S]) -> S:
    """A JSON object into a `kind`. Refused: bad UTF-8, bad JSON, NaN and Infinity, a key given twice, NUL characters
    and lone surrogates, unknown fields, wrong types, values outside their limits."""
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_number)
    except UnicodeDecodeError as err:
        raise InvalidRequest(f"The body is not UTF-8: byte {err.start} is wrong.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    except ValueError as err:  # JSONDecodeError, and integers of more digits than Python converts
        raise InvalidRequest(f"The body is not JSON: {_shown(str(err))}.") from None
    if _SUSPECT.search(raw):
        _refuse_bad_text(value)
    return _convert(value, kind, strict=True)


def parse_query(raw: bytes, kind: type[S]) -> S:
    """A query string into a `kind`. A list field may be repeated or comma-separated; any other is given once."""
    try:
        pairs = parse_qsl(
            raw.decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=MAX_PARAMETERS,
        )
    except UnicodeError:
        raise InvalidRequest("The query string is not UTF-8.") from None
    except ValueError:
        raise InvalidRequest(f"The query string has more than {MAX_PARAMETERS} parameters.") from None
    values: dict[str, Any] = {}
    lists = _list_fields(kind)
    for name, text in pairs:
        if "\0" in name or "\0" in text:
            raise InvalidRequest("The query string contains a NUL character.")
        if name in lists:
            values.setdefault(name, []).extend(text.split(","))
        elif name in values:
            raise InvalidRequest(f"{_shown(name)}: given twice.", field=_shown(name))
        else:
            values[name] = text
    return _convert(values, kind, strict=False)


def check_path(path: str, field: str = "path") -> str:
    """`path`, whose form was checked with its body, if it is short enough in bytes; else InvalidRequest."""
    if len(path.encode()) > MAX_PATH_BYTES:
        raise InvalidRequest(f"{field}: longer than {MAX_PATH_BYTES} bytes.", field=field)
    return path


@cache
def _list_fields(kind: type[msgspec.Struct]) -> frozenset[str]:
    hints = get_type_hints(kind)
    return frozenset(name for name, hint in hints.items() if any(get_origin(arm) is list for arm in _arms(hint)))


def _arms(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return (*getattr(hint, "__args__", ()), hint)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidRequest(f"{_shown(name)}: given twice.", field=_shown(name))
            seen.add(name)
    return found


def _no_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"The body is not JSON: {name} is not a JSON value.")


def _number(text: str) -> int | float:
    """1.0 is an integer in JSON, however it is written."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _refuse_bad_text(value: Any) -> None:
    """InvalidRequest when any text in `value` has a NUL or half a surrogate pair."""
    waiting = [("", value)]
    while waiting:
        where, item = waiting.pop()
        if isinstance(item, dict):
            waiting += [(where, key) for key in item]
            waiting += [(f"{where}.{key}" if where else key, inner) for key, inner in item.items()]
        elif isinstance(item, list):
            waiting += [(where, inner) for inner in item]
        elif isinstance(item, str) and ("\0" in item or not _encodable(item)):
            name = _shown(where) or "body"
            raise InvalidRequest(f"{name}: contains a NUL character or half a surrogate pair.", field=name)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _convert(value: Any, kind: type[S], *, strict: bool) -> S:
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as err:
        raise _refusal(str(err)) from None


def _refusal(text: str) -> InvalidRequest:
    """Turn msgspec's message into ours: `field: what is wrong`."""
    what, _, where = text.partition(" - at `")
    path = where.rpartition("`")[0]
    key_of, _, inner = path.partition("` in `")
    path = (inner or key_of).removeprefix("$").removeprefix(".")
    for form, said in ((_UNKNOWN_FIELD, "there is no such field"), (_MISSING_FIELD, "is missing")):
        if match := form.fullmatch(what):
            path, what = f"{path}.{match[1]}" if path else match[1], said
    if not path:
        return InvalidRequest(f"{_shown(what)}.")
    return InvalidRequest(f"{_shown(path)}: {_shown(what)}.", field=_shown(path))


def _shown(text: str) -> str:
    """A client's text in a message: cut, and safe to encode."""
    cut = text if len(text) <= SHOWN else text[:SHOWN] + "…"
    return cut.encode(errors="replace").decode()

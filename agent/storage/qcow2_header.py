"""The header of an overlay's file: written as ours are, and read as what a hostile VMM may have left.

Format: QEMU, docs/interop/qcow2.txt (version 3; all integers big-endian), and block/qcow2.c for QEMU's own bounds.
Much of what the format allows would let a VMM that its guest has taken over reach further than its own disk: another
file as the store of the data, bitmaps and internal snapshots that cost whoever opens the file memory, features that
our own reader does not know. Our overlays have none of that, so whatever differs from what we wrote is damage. The one
exception is the name of the backing file: it says nothing, because chains are always given explicitly.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

from agent.storage.overlay import OverlayDamaged

CLUSTER_BITS = 16
CLUSTER_BYTES = 1 << CLUSTER_BITS
"""The unit of everything: data, tables, offsets. QEMU's default."""

TABLE_ENTRIES = CLUSTER_BYTES // 8
"""Entries of a second-level table, which is one cluster."""

TABLE_SPAN = TABLE_ENTRIES * CLUSTER_BYTES
"""Bytes of the disk that one second-level table describes: 512 MiB."""

MAX_L1_BYTES = 32 << 20
"""QEMU's own bound."""

MAX_REFCOUNT_TABLE_BYTES = 8 << 20
"""QEMU's own bound."""

MAX_BACKING_NAME_BYTES = 1023

MAGIC = b"QFI\xfb"
VERSION = 3
REFCOUNT_ORDER = 4
"""References are counted in 16 bits (1 << 4)."""

HEADER_BYTES = 112
MIN_HEADER_BYTES = 104
"""Of the first programs to write version 3; what came later is optional."""

LAYOUT = Struct(">4sIQIIQIIQQIIQQQQIIB7x")
EXTENSION = Struct(">II")

BACKING_FORMAT = 0xE2792ACA
DATA_FILE = 0x44415441
ENCRYPTION = 0x0537BE77
FORBIDDEN_EXTENSIONS = {DATA_FILE: "an external data file", ENCRYPTION: "an encryption header"}


class Fields(NamedTuple):
    """The header as it is in the file (LAYOUT). The defaults are those of all our overlays."""

    magic: bytes = MAGIC
    version: int = VERSION
    backing_offset: int = 0
    backing_bytes: int = 0
    cluster_bits: int = CLUSTER_BITS
    disk_bytes: int = 0
    encryption: int = 0
    l1_entries: int = 0
    l1_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = REFCOUNT_ORDER
    header_bytes: int = HEADER_BYTES
    compression: int = 0


@dataclass(frozen=True, slots=True)
class Header:
    """Where things are. Offsets and sizes in bytes; offsets are multiples of CLUSTER_BYTES."""

    disk_bytes: int
    l1_entries: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int


def l1_entries(disk_bytes: int) -> int:
    """Return how many second-level tables a disk of that size needs."""
    return -(-disk_bytes // TABLE_SPAN)


def encode(header: Header, backing: tuple[str, str]) -> bytes:
    """Return the start of the first cluster. `backing`: name and format of the file below, for who looks at the file.

    Raises ValueError if the name is too long for the format.
    """
    name, kind = backing[0].encode(), backing[1].encode()
    if len(name) > MAX_BACKING_NAME_BYTES:
        raise ValueError(f"the path of a backing file may have {MAX_BACKING_NAME_BYTES} bytes: {backing[0]}")
    extensions = EXTENSION.pack(BACKING_FORMAT, len(kind)) + kind.ljust(-(-len(kind) // 8) * 8, b"\0")
    extensions += EXTENSION.pack(0, 0)
    fields = Fields(
        backing_offset=HEADER_BYTES + len(extensions),
        backing_bytes=len(name),
        disk_bytes=header.disk_bytes,
        l1_entries=header.l1_entries,
        l1_offset=header.l1_offset,
        refcount_table_offset=header.refcount_table_offset,
        refcount_table_clusters=header.refcount_table_clusters,
    )
    return LAYOUT.pack(*fields) + extensions + name


def decode(cluster: bytes, file_bytes: int, *, name: str) -> Header:
    """Read the first cluster of the file `name`, which has `file_bytes`. Raises OverlayDamaged, naming it."""
    if len(cluster) < HEADER_BYTES or cluster[:4] != MAGIC:
        raise OverlayDamaged(f"{name} is not a qcow2 file")
    try:
        return _decode(cluster.ljust(CLUSTER_BYTES, b"\0"), file_bytes)
    except ValueError as error:
        raise OverlayDamaged(f"{name} is not an overlay of ours: {error}") from error


def _decode(cluster: bytes, file_bytes: int) -> Header:
    fields = Fields._make(LAYOUT.unpack_from(cluster))
    _expect("version", fields.version, VERSION)
    _expect("cluster bits", fields.cluster_bits, CLUSTER_BITS)
    _expect("refcount order", fields.refcount_order, REFCOUNT_ORDER)
    _expect("encryption method", fields.encryption, 0)
    _expect("number of internal snapshots", fields.snapshots, 0)
    # Among them: dirty (lazy refcounts; we never ask for them), corrupt, external data file, compression, subclusters.
    _expect("set of incompatible features", fields.incompatible, 0)
    _expect("set of automatically cleared features", fields.autoclear, 0)  # bitmaps, raw external data
    _within("header length", fields.header_bytes, MIN_HEADER_BYTES, CLUSTER_BYTES)
    if fields.header_bytes > MIN_HEADER_BYTES:
        _expect("compression type", fields.compression, 0)
    header = Header(
        fields.disk_bytes,
        fields.l1_entries,
        fields.l1_offset,
        fields.refcount_table_offset,
        fields.refcount_table_clusters,
    )
    _check_tables(header, file_bytes)
    _check_extensions(cluster, fields)
    return header


def _check_tables(header: Header, file_bytes: int) -> None:
    _within("disk size", header.disk_bytes, 1, MAX_L1_BYTES // 8 * TABLE_SPAN)
    _within("size of the first-level table", header.l1_entries, l1_entries(header.disk_bytes), MAX_L1_BYTES // 8)
    _within("size of the refcount table", header.refcount_table_clusters, 1, MAX_REFCOUNT_TABLE_BYTES // CLUSTER_BYTES)
    _check_place("first-level table", header.l1_offset, l1_entries(header.disk_bytes) * 8, file_bytes)
    _check_place("refcount table", header.refcount_table_offset, 8, file_bytes)


def _check_extensions(cluster: bytes, fields: Fields) -> None:
    """Walk the extensions as QEMU does: up to the backing file's name, or to the end of the cluster."""
    position, end = fields.header_bytes, CLUSTER_BYTES
    if fields.backing_offset:
        end = fields.backing_offset
        _within("length of the backing file's name", fields.backing_bytes, 0, MAX_BACKING_NAME_BYTES)
        _within("place of the backing file's name", end, position, CLUSTER_BYTES - fields.backing_bytes)
    while position + EXTENSION.size <= end:
        kind, length = EXTENSION.unpack_from(cluster, position)
        if kind == 0:
            return
        if kind in FORBIDDEN_EXTENSIONS:
            raise ValueError(f"it has {FORBIDDEN_EXTENSIONS[kind]}")
        position += EXTENSION.size
        _within("length of a header extension", length, 0, end - position)
        position += -(-length // 8) * 8


def _check_place(what: str, offset: int, length: int, file_bytes: int) -> None:
    if offset % CLUSTER_BYTES or not CLUSTER_BYTES <= offset <= file_bytes - length:
        raise ValueError(f"its {what} is at {offset:#x}, in a file of {file_bytes} bytes")


def _expect(what: str, value: int, expected: int) -> None:
    if value != expected:
        raise ValueError(f"its {what} should be {expected:#x} and is {value:#x}")


def _within(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"its {what} is {value}, not {low} to {high}")

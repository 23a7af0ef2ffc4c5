"""The fleet's certificate authority: one row for all control planes."""

# ruff: noqa: S608 - only column lists of this module are put into statements

from __future__ import annotations

from datetime import datetime

import msgspec

from capsule.db.connection import Connection
from capsule.db.queries.rows import columns, one, only


class CertificateAuthorityRow(msgspec.Struct, frozen=True, kw_only=True):
    """`key_pem` is encrypted PKCS#8."""

    cert_pem: str
    key_pem: str
    created_at: datetime


_SELECT = f"select {columns(CertificateAuthorityRow)} from certificate_authority"


async def get(tx: Connection) -> CertificateAuthorityRow | None:
    """None until one was made."""
    return one(CertificateAuthorityRow, await tx.fetchrow(_SELECT))


async def insert_if_absent(tx: Connection, *, cert_pem: str, key_pem: str) -> CertificateAuthorityRow:
    """The one that counts: ours, or that of whoever was quicker."""
    await tx.execute(
        "insert into certificate_authority (cert_pem, key_pem) values ($1, $2) on conflict do nothing",
        cert_pem,
        key_pem,
    )
    return only(CertificateAuthorityRow, await tx.fetchrow(_SELECT))

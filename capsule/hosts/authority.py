"""The fleet's one authority, kept in the database: made by whichever control plane comes first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from capsule.db.queries import certificate_authority as rows
from capsule.hosts.ca import CertificateAuthority

if TYPE_CHECKING:
    from capsule.config import Settings
    from capsule.db.connection import Connection
    from capsule.db.pool import Database

log = structlog.get_logger()

KEY_PURPOSE = "certificate-authority"


async def load_authority(db: Database, settings: Settings) -> CertificateAuthority:
    """The authority of this database, made on first use. AuthorityLocked when it was made with another secret key.

    Two control planes that start at once on an empty database end up with the same one: the first row stays.
    """
    passphrase = settings.derive_key(KEY_PURPOSE)
    row = await db.run(rows.get)
    if row is None:
        made = CertificateAuthority.create()
        row = await db.transaction(_keep_first, made.cert_pem, made.locked_key(passphrase))
        log.info("certificate_authority_made", ours=row.cert_pem == made.cert_pem)
    return CertificateAuthority.unlock(row.cert_pem, row.key_pem, passphrase)


async def _keep_first(tx: Connection, cert_pem: str, key_pem: str) -> rows.CertificateAuthorityRow:
    return await rows.insert_if_absent(tx, cert_pem=cert_pem, key_pem=key_pem)

"""What can go wrong between the product and its database. `DatabaseError` itself is never raised."""

# ruff: noqa: N818 - leaves are named for what happened
from __future__ import annotations


class DatabaseError(Exception):
    """Base of everything this package raises on purpose."""


class DatabaseUnavailable(DatabaseError):
    """No answer now: refused, lost, shutting down, timed out, no free connection, or too much contention.

    Trying again later can help. A transaction whose COMMIT was under way may have happened all the same: repeat only
    what may be done twice (compare-and-set, an idempotency key).
    """


class LeadLost(DatabaseUnavailable):
    """A leader's use of the database after it has lost the lead."""


class ConstraintViolated(DatabaseError):
    """A named rule of schema.sql refused the statement; the transaction was rolled back.

    `name` is the constraint's (or unique index's) name, for example `users_email_key`; `table` is empty when the
    server did not say. The server's text is not kept: it quotes the offending values.
    """

    def __init__(self, name: str, table: str = "") -> None:
        super().__init__(f"refused by {name}")
        self.name = name
        self.table = table


class MigrationError(DatabaseError):
    """Base of what `migrate` refuses."""


class MigrationChanged(MigrationError):
    """A migration that this database has already run reads differently now. Restore it and write a new one."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} was changed after it had been applied; restore it and add a new migration instead")
        self.name = name


class SchemaTooNew(MigrationError):
    """The database has run migrations that this program does not know. Start the newer program."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"the database was migrated by a newer version ({', '.join(names)}); upgrade this program")
        self.names = names


class EmbeddedPostgresError(DatabaseError):
    """Base of what the launcher of the embedded server refuses."""


class PostgresNotFound(EmbeddedPostgresError):
    """No usable PostgreSQL programs on this machine."""


class PostgresInUse(EmbeddedPostgresError):
    """Another launcher looks after this data directory, or processes that use it do not end."""


class PostgresFailed(EmbeddedPostgresError):
    """initdb or the server ended with an error; the message has its last lines."""


class PostgresPathUnusable(EmbeddedPostgresError):
    """A directory cannot be used: too long for a socket, or closed to the server's user."""

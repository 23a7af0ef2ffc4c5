"""The asyncio side of the pool: connections, transactions, and what the driver's errors mean. Runs on the bridge's
thread.

In asyncio a task is told once that it is cancelled, so clean-up may await; it does so in tasks of its own, because it
can be told twice (by the caller and by the time-out).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, TypeVar, TypeVarTuple

import asyncpg
import msgspec
import structlog

from capsule.db.connection import Connection
from capsule.db.errors import ConstraintViolated, DatabaseUnavailable

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy
    from asyncpg.transaction import Transaction

log = structlog.get_logger()

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

Isolation = Literal["read_committed", "repeatable_read", "serializable"]

ATTEMPTS = 5
"""How often a transaction is run that meets others (serialization failure, dead-lock) or finds its connection dead
before it began."""

RETURN_TIMEOUT = 1.0
"""Seconds to roll back and give a connection back; a server that does not answer by then loses the connection."""

CLOSE_TIMEOUT = 2.0
"""Seconds for idle connections to say goodbye when the database is closed."""

CONNECT_TIMEOUT = 10.0
"""Seconds one connection may take to be made; the call's own time-out is usually shorter."""

SERVER_SETTINGS = {
    "application_name": "capsule",
    "jit": "off",  # queries are short; compiling the driver's own introspection costs more than it saves
    # If this process is stopped in the middle of a transaction, its locks end.
    "idle_in_transaction_session_timeout": "60s",
}

_AGAIN = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError, asyncpg.InvalidCachedStatementError)
_UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,  # class 08: refused, lost
    asyncpg.OperatorInterventionError,  # class 57: shutting down, starting up, killed by an operator
    asyncpg.InsufficientResourcesError,  # class 53: too many connections, disk full, out of memory
    asyncpg.InternalClientError,  # the session ended while the driver asked for the types of a statement
    asyncpg.ObjectNotInPrerequisiteStateError,  # class 55: it takes no connections
    asyncpg.ReadOnlySQLTransactionError,  # a standby after a failover
    *_AGAIN,
)


class DatabaseStatistics(msgspec.Struct, frozen=True):
    """Counts since opening, and the pool's level now."""

    connections: int
    idle: int
    in_flight: int
    calls: int
    retries: int
    unavailable: int


class _Connection(asyncpg.Connection):
    """Without the round trip that resets a session's settings: no code here changes any."""

    __slots__ = ()

    def get_reset_query(self) -> str:
        return ""


class Driver:
    """The connections to one PostgreSQL.

    Owns: the pool and the clean-ups in progress. Owned by: `Database`. Dies when
    `close` is called, within CLOSE_TIMEOUT.
    """

    def __init__(self, dsn: str, *, min_size: int, max_size: int) -> None:
        self.dsn = dsn
        self._min_size = min_size
        self._max_size = max_size
        self._pool: asyncpg.Pool | None = None
        self._background: set[asyncio.Task[Any]] = set()
        self._in_flight = self._calls = self._retries = self._unavailable = 0

    def statistics(self) -> DatabaseStatistics:
        pool = self._pool
        return DatabaseStatistics(
            connections=pool.get_size() if pool else 0,
            idle=pool.get_idle_size() if pool else 0,
            in_flight=self._in_flight,
            calls=self._calls,
            retries=self._retries,
            unavailable=self._unavailable,
        )

    async def open(self) -> None:
        """Make the pool. Connections come when they are needed, so a server that is not up yet is no error."""
        self._pool = await asyncpg.create_pool(
            self.dsn,
            min_size=0,
            max_size=self._max_size,
            max_inactive_connection_lifetime=0,
            connection_class=_Connection,
            init=_teach_types,
            timeout=CONNECT_TIMEOUT,
            server_settings=SERVER_SETTINGS,
        )
        for _ in range(self._min_size):
            self._spawn(self._warm_up())

    async def close(self) -> None:
        if self._pool is None:
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._pool.close()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as err:
            log.debug("database_closed_hard", error=type(err).__name__)
            self._pool.terminate()

    async def _warm_up(self) -> None:
        with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            await self.borrow(ping, ())

    async def bounded(self, work: Callable[[], Awaitable[T]], timeout: float) -> T:  # noqa: ASYNC109 - the one place
        """Run `work` for at most `timeout` seconds and say what its failure means."""
        self._calls += 1
        self._in_flight += 1
        try:
            async with asyncio.timeout(timeout):
                return await work()
        except asyncpg.IntegrityConstraintViolationError as err:
            raise _violated(err) from None  # the server's text quotes values
        except _UNAVAILABLE as err:
            self._unavailable += 1
            raise _unavailable(err, timeout) from err
        finally:
            self._in_flight -= 1

    async def transact(
        self, fn: Callable[[Connection, *Ts], Awaitable[T]], args: tuple[*Ts], isolation: Isolation
    ) -> T:
        for attempt in range(1, ATTEMPTS):
            try:
                return await self._transact_once(fn, args, isolation)
            except _AGAIN as err:
                log.debug("transaction_retried", attempt=attempt, error=type(err).__name__)
            self._retries += 1
            await asyncio.sleep(random.uniform(0, 0.01 * 2**attempt))  # noqa: S311 - spreads rivals, hides nothing
        return await self._transact_once(fn, args, isolation)

    async def _transact_once(
        self, fn: Callable[[Connection, *Ts], Awaitable[T]], args: tuple[*Ts], isolation: Isolation
    ) -> T:
        connection, transaction = await self._begin(isolation)
        try:
            with _noticing_loss(connection):
                result = await fn(connection, *args)
                await transaction.commit()
        except BaseException:
            await self._give_back(connection, transaction)
            raise
        await self._give_back(connection, None)
        return result

    async def _begin(self, isolation: Isolation) -> tuple[PoolConnectionProxy, Transaction]:
        """A connection inside a transaction. One that died while idle shows here, and the next is taken."""
        for _ in range(self._max_size + 1):
            connection = await self._acquire()
            failure: Exception | None = None
            try:
                transaction = connection.transaction(isolation=isolation)
                await transaction.start()
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as err:
                failure = err
            except BaseException:
                await self._give_back(connection, None)
                raise
            if failure is None:
                return connection, transaction
            lost = _is_lost(connection)
            await self._give_back(connection, None)
            if not lost:
                raise failure
        raise ConnectionResetError("every connection was lost")

    async def borrow(self, fn: Callable[[Connection, *Ts], Awaitable[T]], args: tuple[*Ts]) -> T:
        """Run `fn` on a connection without a transaction."""
        connection = await self._acquire()
        try:
            with _noticing_loss(connection):
                return await fn(connection, *args)
        finally:
            await self._give_back(connection, None)

    async def _acquire(self) -> PoolConnectionProxy:
        if self._pool is None or self._pool.is_closing():
            raise ConnectionResetError("the database is closed")
        try:
            return await self._pool.acquire()
        except asyncpg.InterfaceError as err:
            if self._pool.is_closing():
                raise ConnectionResetError("the database is being closed") from err
            raise

    async def _give_back(self, connection: PoolConnectionProxy, transaction: Transaction | None) -> None:
        """Roll back and release in a task of its own, so that a second cancellation cannot leave it half done."""
        await asyncio.shield(self._spawn(self._restore(connection, transaction)))

    async def _restore(self, connection: PoolConnectionProxy, transaction: Transaction | None) -> None:
        pool = self._pool
        if pool is None:
            return
        try:
            async with asyncio.timeout(RETURN_TIMEOUT):
                if transaction is not None:
                    with suppress(asyncpg.InterfaceError):  # it never began, is over, or the connection is gone
                        await transaction.rollback()
                await pool.release(connection, timeout=RETURN_TIMEOUT)
        except Exception as err:  # noqa: BLE001 - whatever it was, this connection is of no use any more
            log.debug("database_connection_dropped", error=type(err).__name__)
            with suppress(asyncpg.InterfaceError):  # gone by itself meanwhile
                connection.terminate()

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._background.discard)
        return task


async def ping(connection: Connection) -> None:
    await connection.fetchval("select 1")


async def _teach_types(connection: asyncpg.Connection) -> None:
    """`jsonb` as plain dicts and `inet` as text, for every query alike."""
    await connection.set_type_codec(
        "jsonb", schema="pg_catalog", encoder=_json_text, decoder=msgspec.json.decode, format="text"
    )
    await connection.set_type_codec("inet", schema="pg_catalog", encoder=str, decoder=str, format="text")


def _json_text(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _is_lost(connection: PoolConnectionProxy) -> bool:
    try:
        return bool(connection.is_closed())
    except asyncpg.InterfaceError:  # the pool has already taken it away
        return True


@contextmanager
def _noticing_loss(connection: PoolConnectionProxy) -> Iterator[None]:
    """The driver calls the use of a connection that died a misuse; say what it is."""
    try:
        yield
    except asyncpg.InterfaceError as err:
        if _is_lost(connection):
            raise ConnectionResetError("the connection was lost") from err
        raise


def _violated(err: asyncpg.IntegrityConstraintViolationError) -> ConstraintViolated:
    name, table = err.constraint_name, err.table_name or ""
    return ConstraintViolated(name or f"{table}.{err.column_name} not null", table)


def _unavailable(err: BaseException, timeout: float) -> DatabaseUnavailable:  # a time-out's own text is empty
    if isinstance(err, TimeoutError):
        return DatabaseUnavailable(f"the database gave no answer within {timeout:g} s; try again")
    if isinstance(err, _AGAIN):
        return DatabaseUnavailable("too many transactions at once on the same rows; try again")
    return DatabaseUnavailable(f"the database is unavailable ({type(err).__name__}); try again")

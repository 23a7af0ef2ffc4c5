"""How plain code calls the Trio client: each method of it becomes one that waits, with its signature and docstring.

`Client` and what it gives out stand for an object of the Trio client that lives in a thread of its own, and name the
methods that they share: `exec = waiting(TrioSandbox.exec)`. Nothing is said twice, and type checkers know all of it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from concurrent import futures
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from threading import Thread
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeAlias, TypeVar, cast, overload

import trio
from anyio.from_thread import BlockingPortal

P = ParamSpec("P")
A = TypeVar("A")
B = TypeVar("B")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_END = object()

_Opened: TypeAlias = tuple[BlockingPortal, trio.lowlevel.TrioToken, trio.Event]


class Portal:
    """The thread in which Trio runs. Any number of threads may call at once.

    Owns: the thread. Owned by: Client. Dies when: closed, or the client is forgotten; then calls raise RuntimeError. A
    fork does not take it along: in the child calls raise RuntimeError, too.
    """

    def __init__(self) -> None:
        if trio.lowlevel.in_trio_run():
            raise RuntimeError("this is a Trio program: use TrioClient, or this client in a thread of its own")
        opened: Future[_Opened] = Future()
        thread = Thread(target=_serve, args=(opened,), name="capsule-client", daemon=True)
        thread.start()
        self._portal, token, closing = opened.result()
        self._process = os.getpid()
        self._under_way: set[Future[Any]] = set()
        self._close = weakref.finalize(self, _close, self._process, thread, token, closing)

    @property
    def open(self) -> bool:
        """Not closed yet."""
        return self._close.alive

    def run(self, function: Callable[..., Awaitable[R]], *args: Any) -> R:
        """Wait for `function(*args)`. KeyboardInterrupt, and whatever else comes up here, cancels it."""
        return _result(self._start(function, *args))

    def enter(self, manager: AbstractAsyncContextManager[A]) -> tuple[A, Callable[[], None]]:
        """Enter `manager`, in a task of its own; its value, and what leaves it again."""
        entered: Future[tuple[A, trio.Event]] = Future()
        task = self._start(_hold, manager, entered)
        try:
            value, leaving = entered.result()
        except BaseException:
            task.cancel()
            raise

        def leave() -> None:
            if self.open and not self._forked:  # else the task was cancelled
                self._portal.call(leaving.set)
                _result(task)

        return value, leave

    def close(self, last: Callable[[], Awaitable[None]]) -> None:
        """Cancel what is under way, wait for `last`, and end the thread; again, or in a forked process: nothing."""
        if not self.open or self._forked:
            return
        for future in list(self._under_way):
            future.cancel()
        try:
            self.run(last)
        finally:
            self._close()

    @property
    def _forked(self) -> bool:
        return os.getpid() != self._process

    def _start(self, function: Callable[..., Awaitable[R]], *args: Any) -> Future[R]:
        if self._forked:  # its wake-ups would go to the parent's thread
            raise RuntimeError("this client was made before the process was forked: make one in the child")
        future = self._portal.start_task_soon(function, *args)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future


async def _hold(manager: AbstractAsyncContextManager[A], entered: Future[tuple[A, trio.Event]]) -> None:
    """Enter, say so, and leave when asked to."""
    leaving = trio.Event()
    try:
        async with manager as value:
            entered.set_result((value, leaving))
            await leaving.wait()
    except BaseException as exc:
        if not entered.done():
            entered.set_exception(CancelledError() if isinstance(exc, trio.Cancelled) else exc)
        raise


def _result(future: Future[R]) -> R:
    try:
        futures.wait([future])
    except BaseException:  # KeyboardInterrupt
        future.cancel()
        raise
    if future.cancelled():
        raise RuntimeError("the client was closed")
    return future.result()


def _serve(opened: Future[_Opened]) -> None:
    """What the thread does."""

    async def serve() -> None:
        closing = trio.Event()
        async with BlockingPortal() as portal, trio.open_nursery() as nursery:
            nursery.start_soon(_stop_when, closing, portal)
            opened.set_result((portal, trio.lowlevel.current_trio_token(), closing))
            await portal.sleep_until_stopped()

    try:
        trio.run(serve)
    except BaseException as exc:
        if not opened.done():
            opened.set_exception(exc)
        raise


async def _stop_when(closing: trio.Event, portal: BlockingPortal) -> None:
    await closing.wait()
    await portal.stop(cancel_remaining=True)


def _close(process: int, thread: Thread, token: trio.lowlevel.TrioToken, closing: trio.Event) -> None:
    """End the thread. From any thread, also one that runs Trio itself, as a garbage collector comes when it wants."""
    if os.getpid() != process:
        return
    with contextlib.suppress(RuntimeError):  # it has stopped, or this is the thread
        token.run_sync_soon(closing.set)
        thread.join()


class Facade(Generic[A]):
    """Stands for an object of the Trio client."""

    def __init__(self, portal: Portal, inner: A) -> None:
        self._portal = portal
        self._inner = inner

    def __repr__(self) -> str:
        return repr(self._inner).replace("Trio", "")


class Method(Protocol[P, R_co]):
    """What type checkers take such a method for; in truth it is a plain function."""

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[Concatenate[Any, P], R_co]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Callable[P, R_co]: ...


def waiting(method: Callable[Concatenate[Any, P], Awaitable[R]]) -> Method[P, R]:
    """The method, to its end."""
    return waiting_as(method, as_it_is)


def waiting_as(method: Callable[Concatenate[Any, P], Awaitable[A]], convert: Callable[[Portal, A], B]) -> Method[P, B]:
    """The method, and of what it returns, what plain code can use."""

    def wait(self: Facade[Any], /, *args: P.args, **kwargs: P.kwargs) -> B:
        portal, inner = self._portal, self._inner
        return convert(portal, portal.run(functools.partial(method, inner, *args, **kwargs)))

    return _as_method(method, wait)


def iterating(
    method: Callable[Concatenate[Any, P], AsyncIterator[A]], convert: Callable[[Portal, A], B]
) -> Method[P, Iterator[B]]:
    """The method, as a generator."""

    def iterate(self: Facade[Any], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[B]:
        portal, source = self._portal, method(self._inner, *args, **kwargs)
        try:
            while (item := portal.run(_next, source)) is not _END:
                yield convert(portal, item)
        finally:
            with contextlib.suppress(RuntimeError):  # the client was closed before
                portal.run(_close_iterator, source)

    return _as_method(method, iterate)


def entering(
    method: Callable[Concatenate[Any, P], AbstractAsyncContextManager[A]], facade: Callable[[Portal, A], B]
) -> Method[P, AbstractContextManager[B]]:
    """The method, as a plain context manager of what stands for its value."""

    def enter(self: Facade[Any], /, *args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[B]:
        return _Entered(self._portal, method(self._inner, *args, **kwargs), facade)

    return _as_method(method, enter)


class _Entered(Generic[A, B]):
    """A context of the Trio client, entered and left in a task of its own there."""

    def __init__(
        self, portal: Portal, manager: AbstractAsyncContextManager[A], facade: Callable[[Portal, A], B]
    ) -> None:
        self._portal = portal
        self._manager = manager
        self._facade = facade
        self._leave: Callable[[], None] | None = None

    def __enter__(self) -> B:
        value, self._leave = self._portal.enter(self._manager)
        return self._facade(self._portal, value)

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What went wrong in the caller's thread stays there: leaving a stream is the same, whatever the reason.
        if self._leave is not None:
            self._leave()


class Iterable(Facade[A], Generic[A, B]):
    """A stream: `for item in stream`, in one thread at a time."""

    def __iter__(self) -> Iterator[B]:
        return self

    def __next__(self) -> B:
        """The next item, when it is there; StopIteration at the end."""
        item = self._portal.run(_next, self._inner)
        if item is _END:
            raise StopIteration
        return cast("B", item)


def as_it_is(_: Portal, item: A) -> A:
    """For what is no object of the Trio client."""
    return item


async def _next(source: AsyncIterator[Any]) -> Any:
    """Its next item, or _END: no StopIteration passes through a coroutine."""
    return await anext(source, _END)


async def _close_iterator(source: AsyncIterator[Any]) -> None:
    """One that was left before its end, here and not when a garbage collector finds it."""
    if isinstance(source, AsyncGenerator):
        await source.aclose()


def _as_method(method: Callable[..., Any], function: Callable[Concatenate[Any, P], R]) -> Method[P, R]:
    """`function` with the name, the signature and the docstring of `method`."""
    return cast("Method[P, R]", functools.wraps(method)(function))

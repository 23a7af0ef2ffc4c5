"""How Hypothesis makes frames (`st.from_type(Open)`), and links that have said HELLO to each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import strategies as st

from agent.wire import limits
from agent.wire.link import Link, Role
from agent.wire.messages import Cancel, Credit, Data, End, Failure, Goaway, Hello, Open, Ping, Pong, Reply

ids = st.integers(1, limits.MAX_STREAM_ID)
names = st.text(min_size=1, max_size=64)
nonces = st.integers(0, 2**32 - 1)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
bodies = st.dictionaries(st.text(max_size=10), values, max_size=4)

st.register_type_strategy(
    Hello,
    st.builds(
        Hello,
        st.integers(0, 2**16),
        st.lists(names, max_size=limits.MAX_FEATURES),
        st.integers(0, limits.MAX_CREDIT),
        st.integers(0, 2**20),
    ),
)
st.register_type_strategy(Open, st.builds(Open, ids, names, bodies, st.integers(0, 2**31 - 1)))
st.register_type_strategy(Data, st.builds(Data, ids, st.integers(0, 255), st.binary(min_size=1, max_size=200)))
st.register_type_strategy(End, st.builds(End, ids))
st.register_type_strategy(Reply, st.builds(Reply, ids, bodies))
st.register_type_strategy(Failure, st.builds(Failure, ids, names, st.text(max_size=100), st.booleans(), bodies))
st.register_type_strategy(Credit, st.builds(Credit, ids, st.integers(1, limits.MAX_CREDIT)))
st.register_type_strategy(Cancel, st.builds(Cancel, ids))
st.register_type_strategy(Ping, st.builds(Ping, nonces))
st.register_type_strategy(Pong, st.builds(Pong, nonces))
st.register_type_strategy(Goaway, st.builds(Goaway, names, st.text(max_size=100)))


@pytest.fixture(scope="session")
def ready_pair() -> Callable[..., tuple[Link, Link]]:
    """`ready_pair(max_streams=…, initial_credit=…)` gives an opener and a server past their HELLOs at time 0."""

    def make(**server: int) -> tuple[Link, Link]:
        opener, served = Link(Role.OPENER, now=0.0), Link(Role.SERVER, now=0.0, **server)
        opener.receive_data(served.data_to_send(), 0.0)
        served.receive_data(opener.data_to_send(), 0.0)
        return opener, served

    return make


@pytest.fixture(scope="session")
def pump() -> Callable[[Link, Link], list]:
    """`pump(a, b)` delivers all that `a` has queued to `b` and returns b's events."""
    return lambda sender, receiver: receiver.receive_data(sender.data_to_send(), 0.0)

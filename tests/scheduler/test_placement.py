from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsule.scheduler.placement import (
    HostLoad,
    LeastLoaded,
    Overcommit,
    Refusal,
    RoundRobin,
    Size,
    Wish,
    WishThere,
    choose,
)

WANT = Size(vcpus=1, memory_mb=512, disk_mb=1024)
WISH = Wish(size=WANT)


def host(number, *, memory_mb=4096, vcpus=16, disk_mb=65536, sold=None, **other):
    limit = Size(vcpus=vcpus, memory_mb=memory_mb, disk_mb=disk_mb)
    return HostLoad(id=UUID(int=number), limit=limit, sold=sold or Size(), **other)


def place(hosts, count, *, want=WANT, strategy=None):
    """Place one after the other, each seeing those before it; the hosts' numbers, None for a refusal."""
    sold = {each.id: each.sold for each in hosts}
    chosen, last = [], None
    for _ in range(count):
        view = [HostLoad(id=each.id, limit=each.limit, sold=sold[each.id]) for each in hosts]
        answer = choose(view, Wish(size=want), strategy=strategy or RoundRobin(), last=last)
        if isinstance(answer, Refusal):
            chosen.append(None)
            continue
        sold[answer] += want
        last = answer
        chosen.append(answer.int)
    return chosen


def test_round_robin_takes_turns_and_skips_the_full():
    """In the order of ids, wherever the hosts stand in the list; a full host loses its turn, not the others theirs."""
    assert place([host(3), host(1), host(2)], 5) == [1, 2, 3, 1, 2]
    assert place([host(1), host(2, memory_mb=512), host(3)], 6) == [1, 2, 3, 1, 3, 1]


def test_round_robin_goes_on_when_the_last_host_is_gone():
    """The turn passes to the next id, also when the last one has left the fleet."""
    assert choose([host(1), host(3)], WISH, strategy=RoundRobin(), last=UUID(int=2)) == UUID(int=3)
    assert choose([host(1), host(3)], WISH, strategy=RoundRobin(), last=UUID(int=9)) == UUID(int=1)


def test_least_loaded_fills_the_emptiest_first():
    """Emptiest by its scarcest resource, whatever the size of the host."""
    small = host(1, memory_mb=2048)
    large = host(2, memory_mb=8192)
    assert place([small, large], 5, strategy=LeastLoaded()) == [1, 2, 2, 2, 2]


def test_a_refusal_names_the_limit_that_was_hit():
    """The user reads what was short; two hosts short of two things name both."""
    refusal = choose([host(1, memory_mb=256)], WISH, strategy=RoundRobin())
    assert refusal == Refusal(1, ("memory_mb",))
    assert "512 MiB of memory" in WISH.explain(refusal)
    two = choose([host(1, memory_mb=256), host(2, disk_mb=1)], WISH, strategy=RoundRobin())
    assert two.limits == ("disk_mb", "memory_mb")
    assert "none of the 2 online hosts" in WISH.explain(two)


def test_no_host_at_all_is_said_so():
    refusal = choose([], WISH, strategy=RoundRobin())
    assert refusal == Refusal(0, ("hosts",))
    assert "no host is online" in WISH.explain(refusal)


def test_overcommit_rounds_down():
    size = Size(vcpus=3, memory_mb=1000, disk_mb=10)
    assert Overcommit(vcpus=1.5, memory=1.0, disk=0.05).limit(size) == Size(vcpus=4, memory_mb=1000, disk_mb=0)


OURS, THEIRS = UUID(int=101), UUID(int=102)


def refused(hosts, wish):
    """What the user reads."""
    refusal = choose(hosts, wish, strategy=RoundRobin())
    assert isinstance(refusal, Refusal)
    return wish.explain(refusal)


def test_a_team_with_its_own_hosts_gets_those_and_no_others():
    """And nobody else does; without any the message says whose are missing."""
    fleet = [host(1), host(2, team=OURS), host(3, team=THEIRS)]
    ours = Wish(size=WANT, team=OURS)
    assert choose(fleet, ours, strategy=RoundRobin(), last=UUID(int=2)) == UUID(int=2)
    assert choose(fleet, WISH, strategy=RoundRobin(), last=UUID(int=1)) == UUID(int=1)
    assert "your team brings its own hosts, and none of them is online" in refused([host(1)], ours)
    assert "no host is online" in refused([host(2, team=OURS)], WISH)
    small = host(2, team=OURS, memory_mb=1)
    assert refused([host(1), small], ours).startswith("the only online host of your team lacks 512 MiB of memory")


def test_all_tags_have_to_be_there():
    """The message names them, also when those that have them are full."""
    fleet = [host(1, tags=frozenset({"gpu"})), host(2, tags=frozenset({"gpu", "eu"})), host(3)]
    wish = Wish(size=WANT, tags=frozenset({"gpu", "eu"}))
    assert choose(fleet, wish, strategy=RoundRobin(), last=UUID(int=2)) == UUID(int=2)
    assert refused([fleet[0], fleet[2]], wish).startswith("none of the 2 online hosts has all of the tags eu, gpu;")
    assert refused([fleet[0]], wish).startswith("the only online host lacks one of the tags eu, gpu;")
    full = host(2, tags=wish.tags, memory_mb=1)
    assert refused([full], wish).startswith("the only online host with the tags eu, gpu lacks 512 MiB of memory")


def test_a_snapshot_is_where_it_is():
    """On a host of the asker's kind; what is on others is of no use, and that is said."""
    among = frozenset({UUID(int=1)})
    assert "no host that has the snapshot is online" in refused([host(2)], Wish(size=WANT, among=among))
    own = Wish(size=WANT, among=among, team=OURS)
    assert "none of your team's own hosts" in refused([host(1), host(2, team=OURS)], own)


def test_what_is_there_stays_there():
    """A fork or a resume asks for its own host, whoever's that is; a closed one does for what rests there."""
    fleet = [host(1, team=OURS, closed=True), host(2)]
    there = WishThere(size=WANT, host=UUID(int=1))
    assert "is not online and open" in refused(fleet, there)
    assert choose(fleet, WishThere(size=WANT, host=UUID(int=1), resident=True), strategy=RoundRobin()) == UUID(int=1)
    assert "the sandbox's host lacks 512 MiB" in refused([host(1, memory_mb=1)], there)


sizes = st.builds(Size, vcpus=st.integers(0, 8), memory_mb=st.integers(0, 4096), disk_mb=st.integers(0, 8192))
ids = st.integers(1, 8).map(lambda number: UUID(int=number))
tags = st.frozensets(st.sampled_from(["gpu", "eu", "us"]))
teams = st.sampled_from([None, OURS, THEIRS])
loads = st.builds(HostLoad, id=ids, limit=sizes, sold=sizes, team=teams, tags=tags, closed=st.booleans())
wishes = st.builds(
    Wish,
    size=sizes,
    team=teams,
    tags=tags,
    among=st.none() | st.frozensets(ids),
    refused=st.frozensets(ids, max_size=2),
) | st.builds(WishThere, size=sizes, host=ids, resident=st.booleans())


def naive(host, wish):
    """Whether the host would do, with every rule spelled out."""
    room = all(
        getattr(host.sold, name) + getattr(wish.size, name) <= getattr(host.limit, name)
        for name in ("vcpus", "memory_mb", "disk_mb")
    )
    if isinstance(wish, WishThere):
        return room and host.id == wish.host and (wish.resident or not host.closed)
    mine = host.team is None if wish.team is None else host.team == wish.team
    there = wish.among is None or host.id in wish.among
    return room and mine and there and not host.closed and host.id not in wish.refused and not wish.tags - host.tags


@pytest.mark.parametrize("strategy", [RoundRobin(), LeastLoaded()])
@given(hosts=st.lists(loads, max_size=6, unique_by=lambda each: each.id), wish=wishes, last=st.none() | ids)
def test_any_choice_will_do_and_any_refusal_is_true(strategy, hosts, wish, last):
    """Whatever the fleet and the wish: as the naive model says, in whatever order, and what is refused is explained."""
    will_do = {each.id for each in hosts if naive(each, wish)}
    answer = choose(hosts, wish, strategy=strategy, last=last)
    if isinstance(answer, Refusal):
        assert not will_do
        assert answer.limits
        assert wish.explain(answer)
    else:
        assert answer in will_do
    assert choose(hosts[::-1], wish, strategy=strategy, last=last) == answer
    if will_do and isinstance(strategy, RoundRobin):
        later = [one for one in will_do if last is None or one > last]
        assert answer == min(later or will_do)

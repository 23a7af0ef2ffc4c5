from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsule.scheduler.placement import HostLoad, LeastLoaded, Overcommit, Refusal, RoundRobin, Size, choose

WANT = Size(vcpus=1, memory_mb=512, disk_mb=1024)


def host(number, *, memory_mb=4096, vcpus=16, disk_mb=65536, sold=None):
    limit = Size(vcpus=vcpus, memory_mb=memory_mb, disk_mb=disk_mb)
    return HostLoad(id=UUID(int=number), limit=limit, sold=sold or Size())


def place(hosts, count, *, want=WANT, strategy=None):
    """Place one after the other, each seeing those before it; the hosts' numbers, None for a refusal."""
    sold = {each.id: each.sold for each in hosts}
    chosen, last = [], None
    for _ in range(count):
        view = [HostLoad(id=each.id, limit=each.limit, sold=sold[each.id]) for each in hosts]
        answer = choose(view, want, strategy=strategy or RoundRobin(), last=last)
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
    assert choose([host(1), host(3)], WANT, strategy=RoundRobin(), last=UUID(int=2)) == UUID(int=3)
    assert choose([host(1), host(3)], WANT, strategy=RoundRobin(), last=UUID(int=9)) == UUID(int=1)


def test_least_loaded_fills_the_emptiest_first():
    """Emptiest by its scarcest resource, whatever the size of the host."""
    small = host(1, memory_mb=2048)
    large = host(2, memory_mb=8192)
    assert place([small, large], 5, strategy=LeastLoaded()) == [1, 2, 2, 2, 2]


def test_a_refusal_names_the_limit_that_was_hit():
    """The user reads what was short; two hosts short of two things name both."""
    refusal = choose([host(1, memory_mb=256)], WANT, strategy=RoundRobin())
    assert refusal == Refusal(1, ("memory_mb",))
    assert "512 MiB of memory" in refusal.message(WANT)
    two = choose([host(1, memory_mb=256), host(2, disk_mb=1)], WANT, strategy=RoundRobin())
    assert two.limits == ("disk_mb", "memory_mb")
    assert "none of the 2 online hosts" in two.message(WANT)


def test_no_host_at_all_is_said_so():
    refusal = choose([], WANT, strategy=RoundRobin())
    assert refusal == Refusal(0)
    assert "no host is online" in refusal.message(WANT)


def test_overcommit_rounds_down():
    size = Size(vcpus=3, memory_mb=1000, disk_mb=10)
    assert Overcommit(vcpus=1.5, memory=1.0, disk=0.05).limit(size) == Size(vcpus=4, memory_mb=1000, disk_mb=0)


sizes = st.builds(Size, vcpus=st.integers(0, 8), memory_mb=st.integers(0, 4096), disk_mb=st.integers(0, 8192))
loads = st.builds(HostLoad, id=st.uuids(), limit=sizes, sold=sizes)


@pytest.mark.parametrize("strategy", [RoundRobin(), LeastLoaded()])
@given(hosts=st.lists(loads, max_size=6, unique_by=lambda each: each.id), want=sizes, last=st.none() | st.uuids())
def test_any_choice_fits_and_any_refusal_is_true(strategy, hosts, want, last):
    """Whatever the fleet: the chosen host has room, and a refusal means that none has; the order does not matter."""
    answer = choose(hosts, want, strategy=strategy, last=last)
    if isinstance(answer, Refusal):
        assert all(each.shortages(want) for each in hosts)
        assert answer.hosts == len(hosts)
    else:
        (chosen,) = [each for each in hosts if each.id == answer]
        assert not chosen.shortages(want)
    assert choose(hosts[::-1], want, strategy=strategy, last=last) == answer

"""The host's side: made, repaired and taken away without disturbing anything else."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
from functools import partial
from pathlib import Path

import pytest

from agent.net import host_network
from agent.net.errors import AddressRangeInUseError, HostNetworkError
from agent.net.host_network import ensure_host_network, remove_host_network
from agent.net.threads import call_in_slot_thread

pytestmark = pytest.mark.host

IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
FOREIGN_TABLE = """
table inet theirs {
  chain forward { type filter hook forward priority filter; policy accept; tcp dport 1 counter drop; }
}
"""


def ensure(state_file):
    call_in_slot_thread(partial(ensure_host_network, state_file))


def remove(state_file):
    call_in_slot_thread(partial(remove_host_network, state_file))


def output(*command, **options):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10, **options).stdout


@pytest.fixture(autouse=True)
def forwarding_off(clean_host):
    IP_FORWARD.write_text("0")
    yield
    IP_FORWARD.write_text("0")


def test_everything_comes_and_goes(clean_host):
    """Forwarding, both routes and the table are made, and after removal the host is as it was, state file included."""
    before = output("nft", "list", "ruleset"), output("ip", "route")
    ensure(clean_host)
    assert IP_FORWARD.read_text() == "1\n"
    assert "unreachable 10.11.0.0/16" in output("ip", "route")
    assert "unreachable 10.12.0.0/15" in output("ip", "route")
    assert "table inet capsule" in output("nft", "list", "tables")
    remove(clean_host)
    assert (output("nft", "list", "ruleset"), output("ip", "route")) == before
    assert IP_FORWARD.read_text() == "0\n"
    assert not clean_host.exists()


def test_again_is_the_same_and_repairs(clean_host):
    """A restarted daemon ensures again: nothing is doubled, what someone took away is back."""
    ensure(clean_host)
    whole = output("nft", "list", "ruleset"), output("ip", "route")
    ensure(clean_host)
    assert (output("nft", "list", "ruleset"), output("ip", "route")) == whole
    output("nft", "flush", "table", "inet", "capsule")
    output("ip", "route", "del", "unreachable", "10.11.0.0/16")
    IP_FORWARD.write_text("0")
    ensure(clean_host)
    assert (output("nft", "list", "ruleset"), output("ip", "route")) == whole
    assert IP_FORWARD.read_text() == "1\n"


def test_other_tables_are_not_touched(clean_host):
    """Rules of other programs are there, unchanged, during and after ours."""
    output("nft", "-f", "-", input=FOREIGN_TABLE)
    try:
        theirs = output("nft", "list", "table", "inet", "theirs")
        ensure(clean_host)
        assert output("nft", "list", "table", "inet", "theirs") == theirs
        remove(clean_host)
        assert output("nft", "list", "table", "inet", "theirs") == theirs
    finally:
        output("nft", "delete", "table", "inet", "theirs")


@pytest.mark.parametrize("value", ["0", "1"])
def test_forwarding_is_put_back_to_what_it_was(clean_host, value):
    """The first value of this boot counts, however often the daemon was started since."""
    IP_FORWARD.write_text(value)
    ensure(clean_host)
    ensure(clean_host)
    remove(clean_host)
    assert IP_FORWARD.read_text() == f"{value}\n"


def test_the_old_value_is_on_disk_before_it_is_changed(clean_host, monkeypatch):
    """A daemon that dies right after switching forwarding on has not forgotten what it was."""

    def die(_name, _value):
        raise OSError(5, "died here")

    with monkeypatch.context() as patch:
        patch.setattr(host_network, "write_sysctl", die)
        with pytest.raises(OSError, match="died here"):
            ensure(clean_host)
    assert json.loads(clean_host.read_bytes())["ip_forward"] == "0"


def test_a_state_file_of_an_earlier_boot_is_not_believed(clean_host):
    """After a reboot the sysctl is the administrator's again: it is remembered anew and never set from the old file."""
    clean_host.write_text('{"boot_id": "another", "ip_forward": "0"}')
    IP_FORWARD.write_text("1")
    remove(clean_host)
    assert IP_FORWARD.read_text() == "1\n"
    clean_host.write_text('{"boot_id": "another", "ip_forward": "0"}')
    ensure(clean_host)
    remove(clean_host)
    assert IP_FORWARD.read_text() == "1\n"


def test_a_damaged_state_file_is_reported_and_the_rest_removed(clean_host):
    """It holds the only record of the old value, so nobody guesses; routes and rules go all the same."""
    ensure(clean_host)
    clean_host.write_bytes(b"{")
    with pytest.raises(HostNetworkError, match=r"damaged.*Delete it"):
        remove(clean_host)
    assert output("ip", "route") == ""
    assert "capsule" not in output("nft", "list", "tables")
    clean_host.unlink()


def test_removing_what_was_never_made_is_no_error(clean_host):
    """So an uninstaller need not know how far the daemon came."""
    remove(clean_host)
    assert IP_FORWARD.read_text() == "0\n"


@pytest.mark.parametrize("network", ["10.11.7.0/24", "10.11.0.0/16", "10.12.0.0/15"])
def test_a_host_that_uses_our_ranges_is_refused_untouched(clean_host, network):
    """Its route would be shadowed or would catch our packets: a clear error, before anything is changed."""
    output("ip", "link", "add", "lan0", "type", "bridge")
    output("ip", "link", "set", "lan0", "up")
    output("ip", "route", "add", network, "dev", "lan0")
    try:
        with pytest.raises(AddressRangeInUseError, match="lan0"):
            ensure(clean_host)
        assert not clean_host.exists()
        assert "capsule" not in output("nft", "list", "tables")
        assert IP_FORWARD.read_text() == "0\n"
        assert output("ip", "route").startswith(network)
    finally:
        output("ip", "link", "del", "lan0")


def test_another_programs_unreachable_route_is_not_taken_over(clean_host):
    """Someone else refuses the range already: it stays theirs, and is there after we have gone."""
    output("ip", "route", "add", "unreachable", "10.11.0.0/16")
    try:
        with pytest.raises(AddressRangeInUseError):
            ensure(clean_host)
        remove(clean_host)
        assert "unreachable 10.11.0.0/16" in output("ip", "route")
    finally:
        output("ip", "route", "del", "unreachable", "10.11.0.0/16")


def test_a_packet_for_a_slot_that_is_gone_never_leaves(clean_host):
    """With a default route in place, the address of a missing slot is an error at once, not a packet on the wire."""
    output("ip", "link", "add", "lan0", "type", "bridge")
    output("ip", "link", "set", "lan0", "up")
    output("ip", "addr", "add", "192.0.2.1/24", "dev", "lan0")
    output("ip", "route", "add", "default", "via", "192.0.2.2")
    try:
        assert "lan0" in output("ip", "route", "get", "10.11.0.77")
        ensure(clean_host)
        for address in ("10.11.0.77", "10.12.0.155", "10.13.0.1"):
            with socket.socket() as tcp:
                tcp.settimeout(2)
                assert tcp.connect_ex((address, 80)) == errno.EHOSTUNREACH
    finally:
        output("ip", "link", "del", "lan0")

"""What a guest can reach and who can reach a guest, with real sockets.

    guest-1 eth0 -- tap0 capsule-1 eth0 -- cap1 \\
                                                 host (this namespace) up0 -- e internet
    guest-2 eth0 -- tap0 capsule-2 eth0 -- cap2 /

A veth called tap0 stands in for the tap, and a namespace for the VM behind it; all else is the real thing. Behind
every closed address there is a live listener, and every closed row has an open one beside it that proves so.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import pytest

from agent.net.addresses import GATEWAY_ADDRESS, GUEST_ADDRESS, GUEST_MAC, slot_addresses
from agent.net.conntrack import forget_address
from agent.net.host_network import ensure_host_network, remove_host_network
from agent.net.namespace import NAMESPACE_DIR, enter_namespace
from agent.net.netlink import open_links
from agent.net.rules import host_rules, slot_rules
from agent.net.slots import create_slot, remove_slot, slot_is_clean
from agent.net.threads import call_in_slot_thread

pytestmark = pytest.mark.host

UPLINK = "198.51.100.1"
"""The host's own public address, which is also the one that guests are masqueraded as."""
PUBLIC = "198.51.100.2"
FAR = "203.0.113.9"
PRIVATE = ("10.99.0.1", "172.16.5.1", "192.168.77.1", "100.64.0.1", "169.254.169.254")
ANY = "0.0.0.0"
HTTP, HOST_PORT, GUEST_PORT = 80, 8080, 5000
BLOCKED_AFTER = 1.6
"""Seconds without an answer that count as closed; an open path takes under 10 ms."""
ANSWERED_WITHIN = 20
"""Seconds for what is to be open, however busy the machine is."""
ONE, TWO = slot_addresses(1), slot_addresses(2)


def ip(*words):
    subprocess.run(["ip", *words], check=True, timeout=10)


def nft(namespace, rules):
    inside = ["ip", "netns", "exec", namespace] if namespace else []
    subprocess.run([*inside, "nft", "-f", "-"], input=rules, text=True, check=True, timeout=10)


def socket_in(namespace, family=socket.AF_INET, kind=socket.SOCK_STREAM):
    """A socket of `namespace` (None: the host). It stays there, whichever thread uses it."""

    def make():
        if namespace is not None:
            enter_namespace(namespace)
        return socket.socket(family, kind)

    return call_in_slot_thread(make)


class Listener:
    """Says hello to everyone and remembers who came."""

    def __init__(self, namespace, address, port, family=socket.AF_INET):
        self.peers = []
        self._socket = socket_in(namespace, family)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((address, port))
        self._socket.listen(16)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        with suppress(OSError):
            while True:
                connection, peer = self._socket.accept()
                self.peers.append(peer[0])
                with connection, suppress(OSError):
                    connection.sendall(b"hello")

    def close(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._socket.close()


def reaches(namespace, address, port, *, source=None, within=BLOCKED_AFTER):
    """Whether a TCP connection from `namespace` is answered by a Listener."""
    with socket_in(namespace, socket.AF_INET6 if ":" in address else socket.AF_INET) as tcp:
        tcp.settimeout(within)
        try:
            if source is not None:
                tcp.bind((source, 0))
            tcp.connect((address, port))
            return tcp.recv(16) == b"hello"
        except OSError:
            return False


def reach_all(namespace, targets, *, expected=()):
    """The targets among `targets` that are reached, tried at the same time; the expected ones with patience."""

    def attempt(target):
        return reaches(namespace, *target, within=ANSWERED_WITHIN if target in expected else BLOCKED_AFTER)

    with ThreadPoolExecutor(max_workers=len(targets)) as pool:
        answers = pool.map(attempt, targets)
    return {target for target, answer in zip(targets, answers, strict=True) if answer}


def add_guest(number):
    """Build a slot whose tap0 is the near end of a guest namespace's eth0."""
    guest = f"guest-{number}"
    ip("netns", "add", guest)

    def add_tap():
        fd = os.open(NAMESPACE_DIR / guest, os.O_RDONLY)
        try:
            with open_links() as links:
                links.add_veth("tap0", peer="eth0", peer_namespace=fd)
        finally:
            os.close(fd)

    call_in_slot_thread(partial(create_slot, number, add_tap=add_tap))
    ip("-n", guest, "link", "set", "eth0", "address", GUEST_MAC)
    ip("-n", guest, "addr", "add", f"{GUEST_ADDRESS}/30", "dev", "eth0")
    ip("-n", guest, "link", "set", "eth0", "up")
    ip("-n", guest, "route", "add", "default", "via", GATEWAY_ADDRESS)
    return guest


def remove_guest(number):
    call_in_slot_thread(partial(remove_slot, number))
    ip("netns", "del", f"guest-{number}")


def add_internet():
    ip("netns", "add", "internet")
    ip("link", "add", "up0", "type", "veth", "peer", "name", "e", "netns", "internet")
    ip("addr", "add", f"{UPLINK}/24", "dev", "up0")
    ip("link", "set", "up0", "up")
    ip("-n", "internet", "link", "set", "lo", "up")
    ip("-n", "internet", "addr", "add", f"{PUBLIC}/24", "dev", "e")
    for address in (FAR, *PRIVATE):
        ip("-n", "internet", "addr", "add", f"{address}/32", "dev", "lo")
    ip("-n", "internet", "link", "set", "e", "up")
    ip("route", "add", "default", "via", PUBLIC)
    ip("-n", "internet", "route", "add", "10.0.0.0/8", "via", UPLINK)  # a neighbour that knows where slots are


def remove_internet():
    ip("netns", "del", "internet")
    with suppress(subprocess.CalledProcessError):  # up0 may have gone with the other end
        ip("link", "del", "up0")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Host, internet and two guests; yields the listeners by (namespace, address)."""
    state_file = tmp_path_factory.mktemp("host") / "state.json"
    with ExitStack() as stack:
        add_internet()
        stack.callback(remove_internet)
        call_in_slot_thread(partial(ensure_host_network, state_file))
        stack.callback(call_in_slot_thread, partial(remove_host_network, state_file))
        for number in (1, 2):
            add_guest(number)
            stack.callback(remove_guest, number)
        listeners = {}
        places = [("internet", address, HTTP) for address in (PUBLIC, FAR, *PRIVATE)]
        places += [(None, ANY, HOST_PORT), (ONE.namespace, ANY, HOST_PORT)]
        places += [("guest-1", GUEST_ADDRESS, GUEST_PORT), ("guest-2", GUEST_ADDRESS, GUEST_PORT)]
        for namespace, address, port in places:
            listener = listeners[namespace, address] = Listener(namespace, address, port)
            stack.callback(listener.close)
        yield listeners


OPEN = [(PUBLIC, HTTP), (FAR, HTTP)]
HOST_PUBLIC = (UPLINK, HOST_PORT)
CLOSED = [
    *((address, HTTP) for address in PRIVATE),
    HOST_PUBLIC,
    (ONE.veth_host_ip, HOST_PORT),
    (TWO.veth_host_ip, HOST_PORT),
    (TWO.host_ip, GUEST_PORT),
    (ONE.host_ip, GUEST_PORT),  # itself, by way of the host
]
SLOT_OWN = [(GATEWAY_ADDRESS, HOST_PORT), (ONE.veth_slot_ip, HOST_PORT)]

OPEN_SLOT_FENCE = """
flush chain ip capsule forward
chain ip capsule forward { type filter hook forward priority filter; policy accept; }
"""
OPEN_SLOT_INPUT = "chain ip capsule input { type filter hook input priority filter; policy accept; }"
OPEN_HOST_FENCE = """
flush chain inet capsule forward
flush chain inet capsule input
flush chain inet capsule output
"""


@contextmanager
def opened(*, slot=False, host=False, slot_input=False):
    """With some of the fences down, put up again afterwards."""
    try:
        for number in (1, 2):
            rules = (OPEN_SLOT_FENCE if slot else "") + (OPEN_SLOT_INPUT if slot_input else "")
            nft(f"capsule-{number}", rules)
        if host:
            nft(None, OPEN_HOST_FENCE)
        yield
    finally:
        nft(None, host_rules())
        for number in (1, 2):
            nft(f"capsule-{number}", f"delete table ip capsule\n{slot_rules(slot_addresses(number))}")


def test_a_guest_reaches_the_internet_as_the_host(world):
    """The rows that are open really are, and upstream sees the host's public address and nothing else."""
    assert reach_all("guest-1", OPEN, expected=OPEN) == set(OPEN)
    assert reach_all("guest-2", OPEN, expected=OPEN) == set(OPEN)
    assert set(world["internet", PUBLIC].peers) | set(world["internet", FAR].peers) == {UPLINK}


@pytest.mark.usefixtures("world")
def test_everything_else_is_closed_to_a_guest():
    """Private and link-local networks, the host by all its addresses, other guests, its own slot."""
    assert reach_all("guest-1", CLOSED + SLOT_OWN) == set()


@pytest.mark.usefixtures("world")
def test_closed_rows_are_closed_by_the_fences():
    """The control: with the fences down the same guest reaches every one of the same listeners."""
    with opened(slot=True, host=True, slot_input=True):
        # A guest cannot see itself through its own NAT, fence or not.
        reachable = set(CLOSED + SLOT_OWN) - {(ONE.host_ip, GUEST_PORT)}
        assert reach_all("guest-1", sorted(reachable), expected=reachable) == reachable
    assert reach_all("guest-1", CLOSED + SLOT_OWN) == set(), "and they are up again"


@pytest.mark.usefixtures("world")
def test_the_hosts_fence_holds_alone():
    """A slot whose rules were lost is still shut in by the host."""
    with opened(slot=True):
        assert reach_all("guest-1", CLOSED) == set()
        assert reach_all("guest-1", OPEN, expected=OPEN) == set(OPEN)


@pytest.mark.usefixtures("world")
def test_the_slots_fence_holds_alone():
    """Without the host's rules only its public address stands open, which a slot cannot know."""
    with opened(host=True):
        assert reach_all("guest-1", CLOSED, expected={HOST_PUBLIC}) == {HOST_PUBLIC}


def test_only_the_host_reaches_a_guest(world):
    """By host_ip, and the guest sees its gateway: the one address its daemon accepts."""
    for slot, guest in ((ONE, "guest-1"), (TWO, "guest-2")):
        world[guest, GUEST_ADDRESS].peers.clear()
        assert reaches(None, slot.host_ip, GUEST_PORT, within=ANSWERED_WITHIN)
        assert world[guest, GUEST_ADDRESS].peers == [GATEWAY_ADDRESS]
    assert not reaches(None, ONE.host_ip, GUEST_PORT, source=UPLINK), "the host's veth address, no other"
    assert not reaches("internet", ONE.host_ip, GUEST_PORT), "a neighbour that routes slots to the host"


@pytest.mark.usefixtures("world")
def test_the_hosts_neighbours_reach_guests_only_through_open_fences():
    """The control of the last row above: the neighbour's packets do arrive at the host."""
    with opened(slot=True, host=True):
        assert reaches("internet", ONE.host_ip, GUEST_PORT, within=ANSWERED_WITHIN)


@pytest.fixture
def foreign_table():
    """Another program's NAT, such as container engines bring."""
    nft(
        None,
        f"""
        table ip theirs {{
          chain prerouting {{
            type nat hook prerouting priority -110; policy accept;
            tcp dport 9999 redirect to :{HOST_PORT}
            tcp dport 9998 dnat to 10.99.0.1:{HTTP}
          }}
          chain postrouting {{
            type nat hook postrouting priority 90; policy accept;
            oifname "cap*" masquerade
          }}
        }}
        """,
    )
    yield
    nft(None, "delete table ip theirs")


@pytest.mark.usefixtures("world", "foreign_table")
def test_another_programs_nat_opens_nothing():
    """Published ports of the host, translations into private networks, and a masquerade of all that goes to slots."""
    assert reaches("internet", UPLINK, 9999, within=ANSWERED_WITHIN), "the control: it is published"
    assert reach_all("guest-1", [(UPLINK, 9999), (FAR, 9999), (FAR, 9998)]) == set()
    assert not reaches("internet", ONE.host_ip, GUEST_PORT)
    with opened(host=True):
        translated = {(FAR, 9999), (FAR, 9998)}
        assert reach_all("guest-1", sorted(translated), expected=translated) == translated
        assert reaches("internet", ONE.host_ip, GUEST_PORT, within=ANSWERED_WITHIN)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("reverse_path_filter", ["1", "0"])
def test_spoofed_sources_are_dropped(reverse_path_filter):
    """Datagrams from addresses that are not the guest's, another slot's among them, never come out; its own do.

    Strict reverse-path filtering sees them first; the rules hold without it.
    """
    with ExitStack() as stack:
        sysctl = "/proc/sys/net/ipv4/conf/all/rp_filter"
        write = ["ip", "netns", "exec", ONE.namespace, "sh", "-c", f'echo "$1" > {sysctl}', "sh"]
        subprocess.run([*write, reverse_path_filter], check=True, timeout=10)
        stack.callback(subprocess.run, [*write, "1"], check=True, timeout=10)
        upstream = stack.enter_context(socket_in("internet", kind=socket.SOCK_DGRAM))
        upstream.settimeout(ANSWERED_WITHIN)
        upstream.bind((PUBLIC, 53))
        for source in ("198.51.100.77", TWO.host_ip, ONE.host_ip, GATEWAY_ADDRESS, "10.12.0.3"):
            ip("-n", "guest-1", "addr", "add", f"{source}/32", "dev", "eth0")
            stack.callback(ip, "-n", "guest-1", "addr", "del", f"{source}/32", "dev", "eth0")
            spoofer = stack.enter_context(socket_in("guest-1", kind=socket.SOCK_DGRAM))
            spoofer.bind((source, 0))
            spoofer.sendto(b"spoofed", (PUBLIC, 53))
        honest = stack.enter_context(socket_in("guest-1", kind=socket.SOCK_DGRAM))
        honest.settimeout(ANSWERED_WITHIN)
        honest.bind((GUEST_ADDRESS, 0))
        honest.sendto(b"honest", (PUBLIC, 53))
        question, asker = upstream.recvfrom(100)
        assert (question, asker[0]) == (b"honest", UPLINK)
        upstream.sendto(b"answer", asker)
        assert honest.recv(100) == b"answer", "datagrams are answered through the NAT"
        upstream.setblocking(False)
        with pytest.raises(BlockingIOError):
            upstream.recv(100)


@pytest.mark.usefixtures("world")
def test_ipv6_is_closed():
    """A slot speaks none; and if it did, the host would take none from it."""
    assert not reaches("guest-1", "fe80::1%eth0", HOST_PORT)
    with ExitStack() as stack:
        listener = Listener(None, "::", HOST_PORT + 1, socket.AF_INET6)
        stack.callback(listener.close)
        enable = "/proc/sys/net/ipv6/conf/eth0/disable_ipv6"
        subprocess.run(
            ["ip", "netns", "exec", ONE.namespace, "sh", "-c", f"test $(cat {enable}) = 1 && echo 0 > {enable}"],
            check=True,
            timeout=10,
        )
        ip("-n", ONE.namespace, "addr", "add", "fd00::2/64", "dev", "eth0", "nodad")
        ip("addr", "add", "fd00::1/64", "dev", ONE.veth, "nodad")
        stack.callback(ip, "addr", "del", "fd00::1/64", "dev", ONE.veth)
        assert not reaches(ONE.namespace, "fd00::1", HOST_PORT + 1)
        with opened(host=True, slot_input=True):
            assert reaches(ONE.namespace, "fd00::1", HOST_PORT + 1, within=ANSWERED_WITHIN), "the control"
        ip("-n", ONE.namespace, "addr", "del", "fd00::2/64", "dev", "eth0")


def host_flows_of(address):
    """How many flows the host remembers of `address`; it has forgotten them afterwards."""
    return call_in_slot_thread(partial(forget_address, address))


@pytest.mark.usefixtures("world")
def test_a_slot_used_again_knows_nothing_of_its_last_tenant():
    """Connections that were never closed, both ways: no flow, no neighbour, no old answer reaches the next tenant."""
    number, slot, guest = 3, slot_addresses(3), add_guest(3)
    with ExitStack() as stack:
        stack.callback(remove_guest, number)
        listener = Listener(guest, GUEST_ADDRESS, GUEST_PORT)
        outward = stack.enter_context(socket_in(guest))
        outward.settimeout(ANSWERED_WITHIN)
        outward.connect((FAR, HTTP))
        inward = stack.enter_context(socket_in(None))
        inward.settimeout(ANSWERED_WITHIN)
        inward.connect((slot.host_ip, GUEST_PORT))
        source = inward.getsockname()[1]
        assert not call_in_slot_thread(partial(slot_is_clean, number))
        listener.close()
        remove_guest(number)
        assert host_flows_of(slot.host_ip) == 0
        assert add_guest(number) == guest
        assert call_in_slot_thread(partial(slot_is_clean, number))
        listener = Listener(guest, GUEST_ADDRESS, GUEST_PORT)
        stack.callback(listener.close)
        with socket_in(None) as again:  # from the very port that the last tenant's connection used
            inward.close()
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.settimeout(ANSWERED_WITHIN)
            again.bind((slot.veth_host_ip, source))
            again.connect((slot.host_ip, GUEST_PORT))
            assert again.recv(16) == b"hello"


@pytest.mark.usefixtures("world")
def test_forgetting_one_address_leaves_the_others():
    """Only the flows of the slot that goes are deleted; a connection of another guest lives on."""
    assert reaches(None, ONE.host_ip, GUEST_PORT, within=ANSWERED_WITHIN)
    with socket_in("guest-2") as tcp:
        tcp.settimeout(ANSWERED_WITHIN)
        tcp.connect((PUBLIC, HTTP))
        assert host_flows_of(ONE.host_ip) > 0
        assert tcp.recv(16) == b"hello"
        assert host_flows_of(TWO.host_ip) > 0

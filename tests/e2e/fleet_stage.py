"""A small fleet as its operators would build it: three machines with agents of their own, one or two control planes.

A machine is a namespace of networks, one of mounts and one of processes, with a cable to the only switch there is, a
bridge that exists for the length of the stage. Nothing leads anywhere else. A machine ends, with every process in it,
when its first process does: when we say so, or when we are no more.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx

PROGRAMS = str(Path(sys.executable).parent)
GATE = "10.77.0.1"
FRONT = 8080
"""The port of the balancer: what agents and users know. Control planes have the ports after it."""
AGENT_PORT = 7443
BEAT, SILENCE, TOKEN_LIFETIME = 3, 9, 60
"""Seconds between heartbeats, and after which both sides count each other as lost."""
EMAIL, PASSWORD = "grace@navy.example", "correct horse battery staple"
INIT = "mount -t tmpfs netns /run/netns && ip link set lo up && echo ready && cat; exit"
FENCE = """
add table inet stage
delete table inet stage
table inet stage {{
  set cut {{ type ipv4_addr; {cut} }}
  chain input {{ type filter hook input priority filter; ip saddr @cut drop; }}
  chain output {{ type filter hook output priority filter; ip daddr @cut drop; }}
  chain balancer {{ type nat hook prerouting priority dstnat; tcp dport {front} redirect to :{back}; }}
  chain relay {{ type nat hook output priority -100; {relay} }}
}}
"""


def sh(line, **fields):
    """Run a line; what it printed."""
    return subprocess.run(shlex.split(line), check=True, capture_output=True, text=True, timeout=30, **fields).stdout


def first_child(pid, seconds=10.0):
    """The process that `pid`, which only waits for it, has started."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                return int(children[0])
        assert time.monotonic() < deadline, f"process {pid} started nothing"
        time.sleep(0.02)


class Machine:
    """One machine, with the agent that runs on it."""

    def __init__(self, number, directory):
        self.number = number
        self.address = f"10.77.0.{10 + number}"
        self.directory = directory / f"machine{number}"
        self.state = self.directory / "agent"
        self.log = self.directory / "agent.log"
        self.host = None
        self.joined = None
        self._first = None
        self._agent = None
        self._pid = None

    def power_on(self):
        """Namespaces, cable, address."""
        self.directory.mkdir()
        flags = "--net --mount --pid --fork --kill-child --mount-proc --propagation private"
        self._first = subprocess.Popen(
            ["unshare", *flags.split(), "bash", "-c", INIT],
            stdin=subprocess.PIPE,  # our end closes when we die
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._first.stdout.readline() == b"ready\n"
        self._pid = first_child(self._first.pid)
        sh(f"ip link add cable{self.number} type veth peer name eth0 netns {self._pid}")
        sh(f"ip link set cable{self.number} master switch up")
        self.run(f"ip address add {self.address}/24 dev eth0")
        self.run("ip link set eth0 up")

    def power_off(self):
        """The end of every process on it."""
        if self._first is None:
            return
        self._first.stdin.close()
        try:
            self._first.wait(10)
        except subprocess.TimeoutExpired:
            os.kill(self._pid, signal.SIGKILL)
            self._first.wait(10)
        self._first.stdout.close()
        self._first = None
        if self._agent is not None:
            self._agent.wait(10)

    def run(self, line):
        """Run a line on this machine; what it printed."""
        return sh(f"nsenter --target {self._pid} --net --mount --pid {line}")

    def type(self, line):
        """Start what an operator types here: the agent, in the foreground of a shell."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith("CAPSULE_")}
        environ["PATH"] = f"{PROGRAMS}:{environ['PATH']}"
        if images := os.environ.get("CAPSULE_AGENT_IMAGES"):
            environ["CAPSULE_AGENT_IMAGES"] = images
        settings = {
            "STATE": self.state,
            "MEMORY_MB": 4096,
            "HEARTBEAT_INTERVAL": BEAT,
            "SLOT_FIRST": 1 + 50 * self.number,
            "SLOT_COUNT": 20,
            "SLOTS_AHEAD": 1,
            "UID_BASE": 2_100_000 + 1000 * self.number,
            "GOLDEN": "false",
            "DRAIN_SECONDS": 1,
        }
        with self.log.open("ab") as log:
            self._agent = subprocess.Popen(
                ["nsenter", f"--target={self._pid}", "--net", "--mount", "--pid", "bash", "-c", f"exec {line}"],
                env={**environ, **{f"CAPSULE_AGENT_{name}": str(value) for name, value in settings.items()}},
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop_agent(self):
        """SIGTERM; its VMs live on."""
        os.kill(first_child(self._agent.pid), signal.SIGTERM)
        self._agent.wait(25)

    def credentials(self):
        """What somebody who can read this machine's disk has."""
        return json.loads((self.state / "credentials.json").read_text())

    def vmms(self):
        """QEMU processes of sandboxes on it."""
        space = Path(f"/proc/{self._pid}/ns/pid").readlink()
        return [pid for pid in qemus() if namespace_of(pid) == space]


def qemus():
    """Every QEMU that runs a VM on this kernel."""
    return [pid for pid in pids() if b"memory-backend-memfd" in command_of(pid)]


def pids():
    """All processes."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def command_of(pid):
    """Its command line, empty for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def namespace_of(pid):
    """Which namespace of processes it is in."""
    try:
        return Path(f"/proc/{pid}/ns/pid").readlink()
    except OSError:
        return None


def directory_of(pid):
    """Where it works, None for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cwd").readlink()
    except OSError:
        return None


class ControlPlane:
    """One `capsule serve`, as process number `number` on the stage."""

    def __init__(self, number, directory, dsn):
        self.port = FRONT + number
        self.url = f"http://{GATE}:{self.port}"
        self.directory = directory
        self.log = directory / f"control{number}.log"
        self.process = None
        self._dsn = dsn

    def environment(self):
        """Its settings."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith("CAPSULE_")}
        settings = {
            "DATABASE_URL": self._dsn,
            "SECRET_KEY": "5" * 64,
            "BIND": f"{GATE}:{self.port}",
            "PUBLIC_URL": f"http://{GATE}:{FRONT}",
            "HEARTBEAT_INTERVAL": BEAT,
            "HEARTBEAT_TIMEOUT": SILENCE,
            "HOST_TOKEN_LIFETIME": TOKEN_LIFETIME,
            "CREATE_TIMEOUT": 60,
            "SPOOL": self.directory,
        }
        return {**environ, **{f"CAPSULE_{name}": str(value) for name, value in settings.items()}}

    def start(self):
        """Start it; it dies with us."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "capsule", "serve"],
                env=self.environment(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def answers(self):
        """Whether requests get anywhere."""
        assert self.process.poll() is None, f"capsule serve ended:\n{self.log.read_text()[-3000:]}"
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/ready", trust_env=False, timeout=5).status_code == 200
        return False

    def leads(self):
        """Whether the fleet's monitor runs here."""
        text = httpx.get(f"{self.url}/metrics", trust_env=False, timeout=30).text
        return re.search(r"^capsule_monitor_leads 1(\.0)?$", text, re.MULTILINE) is not None

    def said(self, pattern):
        """How many lines of its log have this."""
        return len(re.findall(pattern, self.log.read_text(errors="replace")))

    def kill(self):
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)


class Stage:
    """Everything together; `until` polls. The admin's session is `call`, at the first control plane that lives."""

    def __init__(self, directory, dsn, until):
        self.dsn = dsn
        self.until = until
        self.machines = [Machine(number, directory) for number in (1, 2, 3)]
        self.planes = [ControlPlane(number, directory, dsn) for number in (1, 2)]
        self.plane = self.planes[0]
        self._directory = directory
        self._cut = []
        self._relay = ""
        self._token = None
        self._open = ExitStack()

    def raise_curtain(self):
        """Switch, control plane, admin, machines that have joined."""
        with ExitStack() as stack:
            stack.callback(self._clear)
            self._open.enter_context(self.http())
            sh("ip link add switch type bridge")
            sh(f"ip address add {GATE}/24 dev switch")
            sh("ip link set switch up")
            self.fence()
            self.plane.start()
            for machine in self.machines:
                machine.power_on()
            self.until(self.plane.answers, 60, "a control plane that answers")
            self._make_admin()
            with ThreadPoolExecutor() as pool:
                list(pool.map(self.join, self.machines))
            self.until(self.is_online, 60, "three hosts online")
            self._open = stack.pop_all()

    def drop_curtain(self):
        """Nothing is left of it."""
        self._open.close()

    def http(self):
        """A client without a base."""
        return httpx.Client(timeout=120, trust_env=False, limits=httpx.Limits(max_connections=None))

    def _make_admin(self):
        subprocess.run(
            [f"{PROGRAMS}/capsule", "admin", "create", "--email", EMAIL, "--name", "Grace", "--password-stdin"],
            input=PASSWORD,
            text=True,
            check=True,
            env=self.plane.environment(),
            cwd=self._directory,
            timeout=60,
        )
        self._token = self.call(200, "POST", "/auth/login", json={"email": EMAIL, "password": PASSWORD})["token"]

    def join(self, machine):
        """A host for this machine, by the line that the API says."""
        made = self.call(201, "POST", "/hosts", json={"type": "regular"})
        machine.host, machine.joined = made["host"]["id"], made["join_command"]
        machine.type(machine.joined)

    def ask(self, method, path, *, plane=None, key=None, **fields):
        """One request of the admin's; the answer, whatever it is."""
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        headers |= {} if key is None else {"Idempotency-Key": key}
        with self.http() as client:
            return client.request(method, f"{(plane or self.plane).url}/v1{path}", headers=headers, **fields)

    def call(self, status, method, path, **fields):
        """One request that has to get this status; the answer's JSON, None without."""
        answer = self.ask(method, path, **fields)
        assert answer.status_code == status, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def create(self, **fields):
        """A small sandbox."""
        return self.call(201, "POST", "/sandboxes", json={"memory_mb": 128}, **fields)["id"]

    def clear(self):
        """No sandboxes."""
        for one in self.call(200, "GET", "/sandboxes", params={"limit": 200}):
            self.call(204, "DELETE", f"/sandboxes/{one['id']}")

    def exec(self, sandbox, cmd, **fields):
        """What a command in it prints."""
        return self.call(200, "POST", f"/sandboxes/{sandbox}/exec", json={"cmd": cmd}, **fields)["stdout"]

    def sandbox(self, sandbox):
        """Its status."""
        return self.call(200, "GET", f"/sandboxes/{sandbox}")["status"]

    def status(self, machine):
        """Of the host that this machine is."""
        return self.call(200, "GET", f"/hosts/{machine.host}")["status"]

    def is_online(self):
        """Whether all hosts are."""
        return all(self.status(machine) == "online" for machine in self.machines)

    def on(self, machine):
        """Ids of the sandboxes that live or rest there."""
        return self.call(200, "GET", f"/hosts/{machine.host}/delete-preview")["sandbox_ids"]

    def cut(self, *machines):
        """Nothing passes between these machines and the control planes."""
        self._cut = [machine.address for machine in machines]
        self.fence()

    def connect(self):
        """Everybody reaches everybody, and nobody is taken for another."""
        self._cut, self._relay = [], ""
        self.fence()

    def relay(self, address, machine):
        """What is sent to `address` arrives at this machine's agent."""
        self._relay = f"ip daddr {address} tcp dport {AGENT_PORT} dnat ip to {machine.address};"
        self.fence()

    def fence(self):
        """Have the rules say what is cut, where the balancer leads (to every plane that lives), what is relayed."""
        alive = [one.port for one in self.planes if one.process is not None and one.process.poll() is None]
        turns = ", ".join(f"{turn} : {port}" for turn, port in enumerate(alive))
        back = f"numgen inc mod {len(alive)} map {{ {turns} }}" if len(alive) > 1 else (alive or [FRONT + 1])[0]
        cut = f"elements = {{ {', '.join(self._cut)} }}" if self._cut else ""
        rules = FENCE.format(cut=cut, front=FRONT, back=back, relay=self._relay)
        subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True, timeout=30)

    def leftovers(self):
        """Processes that have to do with this stage, by their command lines, and its links."""
        place = str(self._directory)
        found = [command_of(pid) for pid in pids() if place in str(directory_of(pid))]
        return [*found, *re.findall(r"(?:cable\d|switch)", sh("ip -o link"))]

    def complaints(self):
        """The end of what everybody had to say about failures."""
        said = []
        for log in [*(one.log for one in self.planes), *(one.log for one in self.machines)]:
            if log.exists():
                events = re.split(r"^(?=20\d\d-)", log.read_text(errors="replace"), flags=re.MULTILINE)
                said.append(f"--- {log.name}\n" + "".join(one for one in events if "[info " not in one)[-6000:])
        return "\n".join(said)

    def _clear(self):
        groups = {name for machine in self.machines for name in names_in(machine.state / "sandboxes")}
        for machine in self.machines:
            with suppress(subprocess.TimeoutExpired):
                machine.power_off()
        for plane in self.planes:
            plane.kill()
        cables = [f"ip link delete cable{machine.number}" for machine in self.machines]  # before the kernel does
        for line in (*cables, "nft delete table inet stage", "ip link delete switch"):
            with suppress(subprocess.CalledProcessError):
                sh(line)
        for root in (Path("/sys/fs/cgroup/capsule"), Path("/sys/fs/cgroup/unified/capsule")):
            for name in groups:
                with suppress(OSError):
                    (root / name).rmdir()


def names_in(directory):
    """What lies there."""
    return {path.name for path in directory.iterdir()} if directory.is_dir() else set()

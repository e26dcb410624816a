"""Pretended hosts: network, process and host-name namespaces of their own on one machine, joined by a switch."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DEVICE = "eth0"


@dataclass(frozen=True)
class Host:
    """One of them.

    Attributes:
        name: Its own, and that of its network namespace.
        address: On the network that it shares with the others.
        names: A file with the names and addresses of all.
    """

    name: str
    address: str
    names: Path

    def command(self, command: Sequence[str]) -> list[str]:
        """One that runs a command which sees only this host's network and processes; they all die with it."""
        isolated = f"ip netns exec {self.name} unshare --fork --kill-child --pid --mount-proc --uts".split()
        own = f'hostname {self.name} && mount --bind {self.names} /etc/hosts && exec "$@"'
        return [*isolated, "env", f"GLOO_SOCKET_IFNAME={DEVICE}", "sh", "-c", own, "sh", *command]


def ip(*arguments: str) -> None:
    """Run iproute2's command."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def hosts(number: int) -> Iterator[list[Host]]:
    """A context with hosts that reach each other.

    Raises:
        OSError: The system does not allow it, and why.
    """
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        raise OSError("there is no iproute2, or no util-linux")
    switch = f"sdw-{os.getpid()}"
    with tempfile.NamedTemporaryFile("w") as names:
        made = [Host(f"{switch}-{index}", f"10.77.0.{index + 1}", Path(names.name)) for index in range(number)]
        names.write("".join(f"{host.address} {host.name}\n" for host in made) + "127.0.0.1 localhost\n")
        names.flush()
        try:
            connect(switch, made)
            yield made
        finally:
            for name in [switch, *(host.name for host in made)]:
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def connect(switch: str, made: Sequence[Host]) -> None:
    """Make the hosts' namespaces, and one with a bridge between them; raises OSError."""
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        for index, host in enumerate(made):
            ip("netns", "add", host.name)
            ip("-n", switch, "link", "add", f"port{index}", "type", "veth", "peer", DEVICE, "netns", host.name)
            ip("-n", switch, "link", "set", f"port{index}", "master", "switch", "up")
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", DEVICE)
            ip("-n", host.name, "link", "set", DEVICE, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        raise OSError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error

"""Which address and interface of this host the other hosts reach it by.

gloo looks its own name up, which /etc/hosts often answers with 127.0.1.1 (Debian), and tells the other hosts to connect
there; `hostname -I`, which the deepspeed launcher asks, may name docker's bridge first, which every host has. The
address from which this host reaches another one is right by construction.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable, Mapping

import psutil

# What gloo and NCCL read the names of their interfaces from.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_OF_THIS_HOST_ALONE = ("docker", "br-", "virbr", "podman", "cni", "lxc", "lxdbr")
"""Beginnings of the names of interfaces that lead to no other host."""


def addresses() -> dict[str, list[str]]:
    """This host's addresses of both kinds, by the name of their interface; without those of a link alone (IPv6)."""
    found: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6) and "%" not in entry.address:
                found.setdefault(name, []).append(entry.address)
    return found


def interface_of(address: str, known: Mapping[str, Iterable[str]] | None = None) -> str | None:
    """The interface that has this address; None if it is none of this host's."""
    interfaces = addresses() if known is None else known
    return next((name for name, theirs in interfaces.items() if address in theirs), None)


def is_loopback(address: str) -> bool:
    """Whether an address means each host itself, as 127.0.0.1 and 127.0.1.1 do."""
    return ipaddress.ip_address(address).is_loopback


def leads_nowhere(interface: str) -> bool:
    """Whether an interface, by its name, joins what runs on this host alone: loopback, or the bridge of containers."""
    return interface == "lo" or interface.startswith(_OF_THIS_HOST_ALONE)


def resolve(host: str) -> str:
    """The first address of a host, as this host looks its name up.

    Raises:
        OSError: it has none.
    """
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


def address_towards(host: str) -> str:
    """The address of this host from which a packet to another one would leave; nothing is sent.

    Raises:
        OSError: the host has no address, or there is no way to it.
    """
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def listen(port: int = 0) -> socket.socket:
    """Listen at a port of this host, whichever kind of address others reach it by; 0: one that is free.

    Raises:
        OSError: the port is in use.
    """
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)


def use_interface(name: str) -> dict[str, str]:
    """Have gloo and NCCL use an interface, each unless the user has named one; returns what was set."""
    chosen = {variable: name for variable in INTERFACE_VARIABLES if not os.environ.get(variable)}
    os.environ.update(chosen)
    return chosen


def way_between(first: Mapping[str, list[str]], others: Iterable[Mapping[str, list[str]]]) -> str | None:
    """The address of a host that the others can mean it by: none that any of them has too, and not loopback.

    Args:
        first: its addresses by interface, as `addresses` returns them, and those of the others.

    Returns:
        its first such address, IPv4 before IPv6; None if it has none.
    """
    theirs = {address for host in others for entries in host.values() for address in entries}
    fitting = [
        address
        for name, entries in first.items()
        for address in entries
        if not is_loopback(address) and not leads_nowhere(name) and address not in theirs
    ]
    return min(fitting, key=lambda address: ":" in address, default=None)

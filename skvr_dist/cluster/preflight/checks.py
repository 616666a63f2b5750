"""What hosts say of themselves, compared: every problem as a sentence that begins with the host's name."""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skvr_dist.cluster.network import interface_of, is_loopback, leads_nowhere
from skvr_dist.cluster.preflight.remote import Remotes, Unreachable

_SECONDS_TO_START = 180.0  # PyTorch from a cold file system
_SECONDS_TO_SEE = 20.0  # a network's file system
_SECONDS_TO_MEET = 60.0
_MOST_SKEW = 5.0
_SLOW = 0.25  # of the median rate of all pairs


@dataclass
class Pair:
    """Messages between two hosts."""

    first: str
    second: str
    latency_seconds: float
    bytes_per_second: float


@dataclass
class Findings:
    """Everything that was found of the hosts."""

    hosts: list[str]
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    address: str = ""
    """Where the ranks are to meet, in numbers."""
    ways: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Interface and address that each host is reached by."""
    pairs: list[Pair] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Each keeps a run from starting."""
    notes: list[str] = field(default_factory=list)


def examine(
    remotes: Remotes, hosts: Sequence[str], words: Sequence[str], folder: str, port: int, slots: int
) -> Findings:
    """Ask all hosts about everything; stops early where nothing further can be asked.

    Args:
        words: files and overrides of the configuration, or none.
        folder: of the run, or empty.
        port: where the ranks are to meet, on the first host.
        slots: ranks of each host.
    """
    found = Findings(list(hosts))
    _ask_facts(found, remotes, words, folder)
    if len(found.facts) < len(hosts):
        return found
    _compare(found, slots)
    _find_ways(found)
    if folder:
        _try_folder(found, remotes, folder)
    answer = remotes.all[0].ask("bind", _SECONDS_TO_MEET, port=port)
    if "error" in answer:
        found.problems.append(
            f"{hosts[0]}: port {port}, where the ranks are to meet, is in use ({answer['error']}); give another one, "
            f"or end what holds it"
        )
    if not found.problems and len(hosts) > 1:
        _let_them_talk(found, remotes, port)
    return found


def _ask_facts(found: Findings, remotes: Remotes, words: Sequence[str], folder: str) -> None:
    before = time.time()
    answers = remotes.ask_all("facts", _SECONDS_TO_START, words=list(words), hosts=found.hosts, folder=folder)
    for host, answer in zip(found.hosts, answers, strict=True):
        if isinstance(answer, Unreachable):
            found.problems.append(f"{host}: {answer}")
        elif "error" in answer:
            found.problems.append(f"{host}: {answer['error']}")
        else:
            found.facts[host] = answer
            early, late = before - answer["time"], answer["time"] - time.time()
            if max(early, late) > _MOST_SKEW:
                skew = -early if early > late else late
                found.notes.append(f"{host}: its clock is {skew:+.0f} s from this host's; set it by NTP")


def _compare(found: Findings, slots: int) -> None:
    first, *others = found.hosts
    reference, known = found.facts[first], {found.facts[first]["identity"]: first}
    for host in others:
        facts = found.facts[host]
        if (same := known.setdefault(facts["identity"], host)) != host:
            found.problems.append(f"{host}: is the same host as {same}; remove one of the two names")
        for what, version in reference["software"].items():
            if facts["software"][what] != version:
                found.problems.append(
                    f"{host}: has {what} {facts['software'][what]}, but {first} has {version}; install the same "
                    f"environment on both"
                )
        for what, way_out in (("code", "check the same commit out"), ("config", "let both read the same files")):
            if facts[what] != reference[what]:
                name = "skvr_dist's code" if what == "code" else "configuration"
                found.problems.append(
                    f"{host}: its {name} ({facts[what]}) is not that of {first} ({reference[what]}); {way_out}"
                )
        if facts["devices"] != reference["devices"]:
            found.notes.append(f"{host}: has {facts['devices']}, but {first} has {reference['devices']}")
    for host, facts in found.facts.items():
        count, _, kind = facts["devices"].partition(" x ")
        if kind and int(count) < slots:
            found.problems.append(f"{host}: has {count} GPUs, but {slots} ranks are to run there; lower its slots")


def _find_ways(found: Findings) -> None:
    """Where the ranks meet, and by which interface each host is reached."""
    first, *others = found.hosts
    mine = found.facts[first]["addresses"]
    for host in others:
        seen = found.facts[host]["resolved"][first]
        if not seen:
            found.problems.append(f"{host}: does not know {first}, where the ranks are to meet; name it in /etc/hosts")
        elif interface_of(seen, mine) is None or is_loopback(seen):
            found.problems.append(
                f"{host}: takes {first} for {seen}, which is no address that others reach {first} by; correct its "
                f"/etc/hosts"
            )
        else:
            found.address = found.address or seen
    if not others:
        found.address = "127.0.0.1"
    for host in found.hosts:
        facts = found.facts[host]
        address = found.address if host == first else facts["towards"][first]
        interface = interface_of(address, facts["addresses"]) or "" if address else ""
        found.ways[host] = (interface, address)
        if others and interface and leads_nowhere(interface):
            found.problems.append(f"{host}: would use {interface} ({address}), which no other host reaches")
        own = facts["resolved"][host]
        if own and is_loopback(own) and others:
            found.notes.append(f"{host}: its own name is {own} to it (/etc/hosts); ranks use {interface} {address}")
        if others and any(name.startswith("docker") for name in facts["addresses"]):
            found.notes.append(f"{host}: has docker's bridge, which no rank must use; ranks use {interface} {address}")


def _try_folder(found: Findings, remotes: Remotes, folder: str) -> None:
    """Write a token on each host, and see it on all."""
    tokens = [f".preflight-{uuid.uuid4().hex[:8]}-{number}" for number in range(len(found.hosts))]
    written = remotes.ask_all("write", _SECONDS_TO_MEET, [{"name": token} for token in tokens], folder=folder)
    for host, answer in zip(found.hosts, written, strict=True):
        if isinstance(answer, Unreachable) or "error" in answer:
            reason = answer if isinstance(answer, Unreachable) else answer["error"]
            found.problems.append(f"{host}: cannot write {folder} ({reason}); give train.output_dir another place")
    if not found.problems:
        read = remotes.ask_all("read", 3 * _SECONDS_TO_SEE, folder=folder, names=tokens, patience=_SECONDS_TO_SEE)
        blind = [
            host
            for host, answer in zip(found.hosts, read, strict=True)
            if isinstance(answer, Unreachable) or answer.get("missing")
        ]
        if blind:
            # Where two see different folders, both miss tokens: the first one is taken to be right.
            named = [host for host in blind if host != found.hosts[0]] or blind
            found.problems += [
                f"{host}: {folder} is not the same folder as on {found.hosts[0]}; give a train.output_dir on a file "
                f"system that all hosts share"
                for host in named
            ]
    made = [[] if isinstance(answer, Unreachable) else answer.get("made", []) for answer in written]
    remotes.ask_all("remove", _SECONDS_TO_MEET, [{"made": each} for each in made], folder=folder, names=tokens)


def _let_them_talk(found: Findings, remotes: Remotes, port: int) -> None:
    size = len(found.hosts)
    each = [{"rank": rank, "interface": found.ways[host][0]} for rank, host in enumerate(found.hosts)]
    where = {"size": size, "address": found.address, "port": port, "patience": _SECONDS_TO_MEET}
    answers = remotes.ask_all("talk", 3 * _SECONDS_TO_MEET, each, **where)
    for host, answer in zip(found.hosts, answers, strict=True):
        if isinstance(answer, Unreachable) or "error" in answer:
            reason = answer if isinstance(answer, Unreachable) else answer["error"]
            found.problems.append(
                f"{host}: cannot talk to the others by {' '.join(found.ways[host])} and port {port} of "
                f"{found.address} ({reason}); does a firewall stand between?"
            )
        else:
            found.problems += [f"{host}: {what} is not what was sent" for what in answer["wrong"]]
            found.pairs += [Pair(host, found.hosts[int(other)], *times) for other, *times in answer["pairs"]]
    if found.pairs:
        middle = statistics.median(pair.bytes_per_second for pair in found.pairs)
        found.notes += [
            f"{pair.first} and {pair.second}: {pair.bytes_per_second / 1e6:.0f} MB/s between them, where the median of "
            f"all pairs is {middle / 1e6:.0f}"
            for pair in found.pairs
            if pair.bytes_per_second < _SLOW * middle
        ]


def as_rows(found: Findings) -> list[dict[str, Any]]:
    """A row of the table for each host."""
    rows = []
    for host in found.hosts:
        facts: Mapping[str, Any] = found.facts.get(host, {})
        software = facts.get("software", {})
        concerned = [text for text in found.problems if text.startswith(f"{host}:")]
        rows.append(
            {
                "host": host,
                "reached by": " ".join(found.ways.get(host, ("", ""))).strip(),
                "python": software.get("python", ""),
                "torch": software.get("torch", ""),
                "deepspeed": software.get("deepspeed", ""),
                "code": facts.get("code", ""),
                "config": facts.get("config", ""),
                "devices": facts.get("devices", ""),
                "memory free": f"{facts['memory_free'] / 2**30:.0f} GiB" if facts else "",
                "verdict": "no" if concerned else "ok",
            }
        )
    return rows

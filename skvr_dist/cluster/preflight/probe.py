"""The probe on one host: answers questions that come as lines of JSON on stdin, and ends with stdin.

    python -m skvr_dist.cluster.preflight.probe

So nothing is left when the connection breaks or the one who asks is killed.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
MARK = "skvr-probe "
"""Before every answer, since a login may print what it likes."""
_LONGEST_SECONDS = 600.0


def facts(words: list[str], hosts: list[str], folder: str) -> Answer:
    """What this host is and has.

    Args:
        words: files of the configuration, `--`, overrides; `--from` and a checkpoint before, if it starts from one; or
            none.
        hosts: names to look up.
        folder: of the run, or empty.
    """
    import psutil

    from skvr_dist.cluster.network import addresses
    from skvr_dist.run.code import code_digest
    from skvr_dist.run.log import software_versions

    memory = psutil.virtual_memory()
    return {
        "host": socket.gethostname(),
        "identity": f"{_boot()} {socket.gethostname()} {_link()}",
        "time": time.time(),
        "software": software_versions(),
        "code": code_digest(),
        "config": _config(words),
        "devices": _devices(),
        "memory": memory.total,
        "memory_free": memory.available,
        "addresses": addresses(),
        "resolved": {host: _looked_up(host) for host in hosts},
        "towards": {host: _towards(host) for host in hosts},
        "folder": folder,
    }


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _link() -> str:
    try:
        return str(Path("/proc/self/ns/net").readlink())
    except OSError:
        return ""


def _looked_up(host: str) -> str:
    from skvr_dist.cluster.network import resolve

    try:
        return resolve(host)
    except OSError:
        return ""


def _towards(host: str) -> str:
    from skvr_dist.cluster.network import address_towards

    try:
        return address_towards(host)
    except OSError:
        return ""


def _config(words: list[str]) -> str:
    """A digest of the configuration; empty without one."""
    if not words:
        return ""
    import hashlib

    from skvr_dist.checkpoint.base import base_of
    from skvr_dist.config.load import dump_config, load_config

    base = None
    if words[0] == "--from":
        base, words = base_of(Path(words[1])), words[2:]
    split = words.index("--")
    config = load_config(words[:split], words[split + 1 :], base=base)
    return hashlib.sha256(dump_config(config).encode()).hexdigest()[:12]


def _devices() -> str:
    """The accelerators in words, or the cores that ranks may use where there are none."""
    import torch

    if os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available():
        count, kind = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
        return f"{count} x {kind.name} {kind.total_memory / 2**30:.0f} GiB"
    return f"{len(os.sched_getaffinity(0))} cores"


def write(folder: str, name: str) -> Answer:
    """Make the run's folder and a token in it; says which folders were made."""
    made, path = [], Path(folder)
    for parent in [path, *path.parents]:
        if parent.exists():
            break
        made.append(str(parent))
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(name)
    return {"made": made}


def read(folder: str, names: list[str], patience: float) -> Answer:
    """Which of these tokens are to be seen within `patience` seconds; a network's file system may take a moment."""
    deadline, missing = time.monotonic() + patience, set(names)
    while missing and time.monotonic() < deadline:
        missing = {name for name in missing if not (Path(folder) / name).exists()}
        time.sleep(0.1)
    return {"missing": sorted(missing)}


def remove(folder: str, names: list[str], made: list[str]) -> Answer:
    """Remove tokens, and the folders that `write` has made."""
    for name in names:
        (Path(folder) / name).unlink(missing_ok=True)
    for parent in made:
        Path(parent).rmdir()
    return {}


def bind(port: int) -> Answer:
    """Listen at a port for a moment."""
    from skvr_dist.cluster.network import listen

    with listen(port):
        return {}


def talk(**options: Any) -> Answer:
    """Join the probes of the other hosts, and measure (`skvr_dist.cluster.preflight.talk`)."""
    from skvr_dist.cluster.preflight.talk import talk_to_all

    return talk_to_all(**options)


_DOES: dict[str, Callable[..., Answer]] = {
    action.__name__: action for action in (facts, write, read, remove, bind, talk)
}


def main() -> None:
    """Answer until stdin ends."""
    questions: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(questions,), daemon=True).start()
    while True:
        asked = json.loads(questions.get(timeout=_LONGEST_SECONDS))
        try:
            answer = _DOES[asked.pop("do")](**asked)
        except Exception as error:  # whoever asked says what it means
            reason = f"{type(error).__name__}: {error}" if not isinstance(error, OSError | ValueError) else str(error)
            answer = {"error": " ".join(reason.split())[:400]}
        print(MARK + json.dumps(answer), flush=True)


def _listen(questions: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        questions.put(line)
    os._exit(0)  # the one who asks has gone, whatever this waits for


if __name__ == "__main__":
    main()

"""The sandbox of this machine for the tests of ``enclave``: programs run in it, and what is left of them."""

import functools
import os
import time
from pathlib import Path

import pytest

from baffle.enclave import sandbox, seccomp
from baffle.errors import SecurityError

LOCK = "from baffle.enclave import seccomp; seccomp.lock()\n"


@functools.cache
def why_not():
    """Why this machine makes no sandbox; None where it does."""
    try:
        with sandbox.launch(sandbox.program("print(1)"), files()) as process:
            done = process.wait(60)
    except SecurityError as error:
        return str(error)
    assert done.reason == "ended", done
    return None


def need_sandbox():
    if why_not() is not None:
        pytest.skip(f"no sandbox on this machine: {why_not()}")


@functools.cache
def files():
    modules = "numpy", "cryptography.hazmat.primitives.asymmetric.x25519", "mmap", "_socket"
    modules += ("cryptography.hazmat.backends.openssl.backend",)
    return sandbox.python_files((*modules, "baffle.enclave.seccomp"))


def allowing(*calls):
    """The first list with holes."""
    return [*(rule for rule in seccomp.STARTING if rule.call not in calls), *map(seccomp.Rule, calls)]


def run(code, *, lock=False, rules=seccomp.STARTING, limits=None, before="", timeout=60):
    """A small program in the real sandbox → its report, and what it printed."""
    program = sandbox.program(before + (LOCK if lock else "") + code)
    with sandbox.launch(program, files(), limits, rules=rules) as process:
        said = b"".join(iter(lambda: process.stdout.read(1 << 16), b""))
        return process.wait(timeout), said.decode()


def groups_left():
    """Control groups of this process's launches."""
    return [
        str(folder)
        for controller in ("memory", "pids", "unified", ".")
        for folder in Path("/sys/fs/cgroup", controller).rglob(f"baffle-{os.getpid()}-*")
    ]


def children():
    """Processes that this one, or its children, started."""
    found, parents = set(), {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            name, rest = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
            parents[int(entry.name)] = int(rest[1]), name, rest[0]
    for pid in parents:
        at = pid
        while at in parents and at != os.getpid():
            at = parents[at][0]
        if at == os.getpid() and pid != at:
            found.add((pid, *parents[pid][1:]))
    return found


def nothing_left():
    """After a test, whatever became of it."""
    until = time.monotonic() + 5
    while (left := groups_left() or [c for c in children() if "bwrap" in c[1]]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left

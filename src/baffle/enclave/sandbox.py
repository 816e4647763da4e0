"""A process that can compute, and nothing else: bubblewrap, a control group, a list of system calls.

    with sandbox.launch([sandbox.PYTHON, "-c", "..."], files, Limits()) as process:
        process.stdin, process.stdout ...
        print(process.wait())

It sees the files that it was given, read-only and nothing else of the disk; no network, no other process, no
/proc, /sys or /dev; it has no capability, and cannot get one. Its memory is limited by a control group (v1 or
v2), which counts what it uses and not what it could address, page cache and page tables included. All of it
is needed: where bubblewrap, libseccomp or a control group that may be written is missing, ``launch`` raises
SecurityError and starts nothing. There is no weaker way.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Protocol

from baffle.enclave import seccomp
from baffle.errors import ConfigError, SecurityError

HOME = "/runtime"  # the sandbox's own Python lies there
PYTHON = f"{HOME}/bin/python3"
MOST_STDERR = 1 << 14
_CONTROL = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_SHELL = "/bin/sh"
# Joins the groups before anything else, so that all of bubblewrap is counted and limited too.
_JOIN = """
while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs" || exit 125; shift; done
shift; ulimit -c 0; exec "$@"
"""
_SECONDS_TO_END = 5.0
_numbers = itertools.count()

Reason = Literal["ended", "memory", "seccomp", "processes", "killed", "failed"]


@dataclass(frozen=True)
class Limits:
    """What a worker may use: ``memory`` in bytes, all of it together; ``processes`` and threads.

    Bubblewrap's own two processes are among them: 3 leave the worker nothing but itself.
    """

    memory: int = 90_000_000
    processes: int = 3

    def __post_init__(self) -> None:
        if self.memory < 1 << 20 or self.processes < 3:
            raise ConfigError(f"{self}: at least 1 MiB of memory, and 3 processes")


@dataclass(frozen=True)
class Report:
    """How a process ended.

    ``reason``: ended (by itself, status 0); memory (the group's limit: the kernel killed it); seccomp (a
    system call that is on no list); processes (it tried to be more than it may: that was refused, or it was
    killed for it); killed (by another signal); failed (a status of its own). ``peak``: the most bytes that
    the group held at any time, None where the kernel (cgroup v2 before 5.19) does not keep it. ``said``:
    the start of what it wrote to stderr.
    """

    reason: Reason
    status: int
    peak: int | None
    said: str = ""

    def __str__(self) -> str:
        peak = "" if self.peak is None else f", peak {self.peak / 1e6:.1f} MB"
        return f"{self.reason} (status {self.status}{peak})"


class Group(Protocol):
    """A control group of one process and its children."""

    folders: tuple[Path, ...]

    def make(self, limits: Limits) -> None: ...

    def processes(self) -> set[int]: ...

    def peak(self) -> int | None: ...

    def killed_for_memory(self) -> bool: ...

    def refused_processes(self) -> bool: ...


class GroupV1:
    """Two folders, one in the hierarchy of each controller."""

    def __init__(self, memory: Path, pids: Path, name: str) -> None:
        self.memory, self.pids = memory / name, pids / name
        self.folders: tuple[Path, ...] = (self.memory, self.pids)

    def make(self, limits: Limits) -> None:
        self.memory.mkdir()
        self.pids.mkdir()
        (self.memory / "memory.limit_in_bytes").write_text(str(limits.memory))
        swap = self.memory / "memory.memsw.limit_in_bytes"  # where the kernel counts swap: none of it either
        if swap.exists():
            swap.write_text(str(limits.memory))
        else:
            (self.memory / "memory.swappiness").write_text("0")
        (self.pids / "pids.max").write_text(str(limits.processes))

    def processes(self) -> set[int]:
        return set().union(*(_numbers_in(folder / "cgroup.procs") for folder in self.folders))

    def peak(self) -> int | None:
        return int((self.memory / "memory.max_usage_in_bytes").read_text())

    def killed_for_memory(self) -> bool:
        return _field(self.memory / "memory.oom_control", "oom_kill") > 0

    def refused_processes(self) -> bool:
        return _field(self.pids / "pids.events", "max") > 0


class GroupV2:
    """One folder of the unified hierarchy."""

    def __init__(self, parent: Path, name: str) -> None:
        self.folder = parent / name
        self.folders: tuple[Path, ...] = (self.folder,)

    def make(self, limits: Limits) -> None:
        self.folder.mkdir()
        (self.folder / "memory.max").write_text(str(limits.memory))
        swap = self.folder / "memory.swap.max"
        if swap.exists():
            swap.write_text("0")
        (self.folder / "memory.oom.group").write_text("1")
        (self.folder / "pids.max").write_text(str(limits.processes))

    def processes(self) -> set[int]:
        return _numbers_in(self.folder / "cgroup.procs")

    def peak(self) -> int | None:
        file = self.folder / "memory.peak"
        return int(file.read_text()) if file.exists() else None

    def killed_for_memory(self) -> bool:
        return _field(self.folder / "memory.events", "oom_kill") > 0

    def refused_processes(self) -> bool:
        return _field(self.folder / "pids.events", "max") > 0


def group(root: Path = _CONTROL, own: Path = _OWN) -> Group:
    """A control group that is still to be made, below or beside the one that this process is in.

    v1: below its own. v2: below the nearest group above that hands memory and pids down, since a group with
    processes of its own may not. Raises SecurityError where there is none that may be written.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError as error:
        raise SecurityError(f"no control groups: {error.strerror or error}") from error
    mine = {name: path for _, names, path in lines for name in names.split(",")}
    name = f"baffle-{os.getpid()}-{next(_numbers)}"
    memory, pids = (_below(root / which, mine.get(which)) for which in ("memory", "pids"))
    if memory is not None and pids is not None:
        for parent in (memory, pids):
            _writable(parent)
            _sweep(parent)
        return GroupV1(memory, pids, name)
    for unified in (root, root / "unified"):
        above = _handing_down(unified, mine.get("", "/"))
        if above is not None:
            _writable(above)
            _sweep(above)
            return GroupV2(above, name)
    raise SecurityError(
        "no control group limits memory and processes here: neither cgroup v1 (memory, pids) nor v2 with "
        "both handed down (systemd-run --scope -p Delegate=yes)"
    )


def _below(hierarchy: Path, path: str | None) -> Path | None:
    """This process's group in a v1 hierarchy; its root where a container does not show the group."""
    if path is None or not (hierarchy / "cgroup.procs").exists():
        return None
    folder = hierarchy / path.lstrip("/")
    return folder if folder.is_dir() else hierarchy


def _handing_down(unified: Path, path: str) -> Path | None:
    if not (unified / "cgroup.controllers").exists():
        return None
    folder = unified / path.lstrip("/")
    for parent in (folder, *folder.parents):
        file = parent / "cgroup.subtree_control"
        if file.exists() and {"memory", "pids"} <= set(file.read_text().split()):
            return parent
        if parent == unified:
            break
    return None


def _writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise SecurityError(f"the control group {folder} cannot be written: no limit of memory without it")


def _sweep(parent: Path) -> None:
    """Groups of launchers that were killed: their processes died with them, their folders could not."""
    for left in parent.glob("baffle-*-*"):
        number = left.name.split("-")[1]
        if number.isdigit() and not Path(f"/proc/{number}").exists():
            with contextlib.suppress(OSError):  # not empty, or another launcher's sweep came first
                left.rmdir()


def _numbers_in(file: Path) -> set[int]:
    try:
        return {int(word) for word in file.read_text().split()}
    except OSError:
        return set()


def _field(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0


class Process:
    """A sandboxed process. ``stdin`` and ``stdout`` are raw pipes; what it writes to stderr is kept, bounded.

    To be closed (``with``), which kills it and removes its control group. It dies with the thread that
    launched it.
    """

    def __init__(self, process: subprocess.Popen[bytes], group: Group, said: IO[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.stdin, self.stdout = process.stdin, process.stdout
        self._process, self._group, self._said = process, group, said
        self._report: Report | None = None

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> set[int]:
        """Of all of its processes, bubblewrap's included."""
        return self._group.processes()

    def peak(self) -> int | None:
        """``Report.peak``, so far."""
        return self._group.peak() if self._report is None else self._report.peak

    def resident(self) -> int:
        """The largest VmHWM of its processes, in bytes: libraries' pages count, page tables do not."""
        found = [0]
        for pid in self.pids:
            with contextlib.suppress(OSError, ProcessLookupError):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                found += [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
        return max(found)

    def wait(self, timeout: float | None = None) -> Report:
        """How it ended. Raises TimeoutError after ``timeout`` seconds, and leaves it running then;
        SecurityError where bubblewrap could not make the sandbox: then nothing of the program has run."""
        if self._report is None:
            try:
                status = self._process.wait(timeout)
            except subprocess.TimeoutExpired as error:
                raise TimeoutError(f"the sandboxed process did not end within {timeout:g} s") from error
            self._said.seek(0)
            said = self._said.read(MOST_STDERR).decode("utf-8", "replace").strip()
            self._report = self._reported(status, said)
        said = self._report.said
        if self._report.status in (1, 125) and said.startswith(("bwrap: ", "sh: ", f"{_SHELL}: ")):
            raise SecurityError(f"no sandbox could be made here: {said.splitlines()[0]}")
        return self._report

    def _reported(self, status: int, said: str) -> Report:
        # bubblewrap hands a signal on as 128 + its number
        by_signal = -status if status < 0 else status - 128 if status > 128 else 0
        reason: Reason = "ended" if status == 0 else "killed" if by_signal else "failed"
        if self._group.killed_for_memory():
            reason = "memory"
        elif by_signal == signal.SIGSYS:
            reason = "seccomp"
        elif self._group.refused_processes():
            reason = "processes"
        return Report(reason, status, self._group.peak(), said)

    def close(self) -> None:
        """Kills what is left of it, and removes its group."""
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        until = time.monotonic() + _SECONDS_TO_END
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        while (left := self._group.processes()) and time.monotonic() < until:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
            time.sleep(0.002)
        with contextlib.suppress(SecurityError):
            self.wait()
        self._said.close()
        _remove(self._group)


def _remove(group: Group) -> None:
    for folder in group.folders:
        for _ in range(100):
            try:
                folder.rmdir()
            except FileNotFoundError:
                break
            except OSError:  # the last process is still being taken down
                time.sleep(0.01)
            else:
                break


def launch(
    argv: Sequence[str],
    files: Mapping[str, Path],
    limits: Limits | None = None,
    *,
    rules: Sequence[seccomp.Rule] = seccomp.STARTING,
) -> Process:
    """Starts ``argv`` in a sandbox that holds ``files`` (absolute path inside → file or folder outside).

    Started by the superuser, it keeps the right to become somebody else, for ``seccomp.lock`` to use; else it
    is nobody (65534) in a user namespace of its own, and has no right at all. Cost: a few milliseconds, and
    one mount for each file. Raises SecurityError where this machine lacks any part of it.
    """
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        raise SecurityError("bubblewrap is not there: no sandbox without it (Debian: apt install bubblewrap)")
    if not sys.platform.startswith("linux"):
        raise SecurityError(f"a sandbox needs Linux, not {sys.platform}")
    limited, made = group(), seccomp.program(rules)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, made)
        said = undo.enter_context(contextlib.closing(_memory_file()))
        listed = undo.enter_context(contextlib.closing(_memory_file()))
        listed.write(b"".join(os.fsencode(word) + b"\0" for word in _options(files, made)))
        listed.seek(0)
        undo.callback(_remove, limited)
        try:
            limited.make(limits or Limits())
        except OSError as error:
            raise SecurityError(
                f"no control group could be made: {error.filename}: {error.strerror}"
            ) from error
        folders = [str(folder) for folder in limited.folders]
        process = subprocess.Popen(
            [_SHELL, "-c", _JOIN, "sh", *folders, "--", bubblewrap, "--args", str(listed.fileno()), *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            pass_fds=(made, listed.fileno()),
            bufsize=0,
            env={"LD_LIBRARY_PATH": ""},
        )
        kept = os.fdopen(os.dup(said.fileno()), "rb")
        undo.pop_all()
        os.close(made)
        said.close()
        listed.close()
    return Process(process, limited, kept)


def _memory_file() -> IO[bytes]:
    """Nothing on the disk: a file that nobody can find, and that ends with its last user."""
    return os.fdopen(os.memfd_create("baffle"), "w+b", buffering=0)


def _options(files: Mapping[str, Path], filter_: int) -> Iterator[str]:
    superuser = os.geteuid() == 0
    yield from ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup")
    yield from ("--cap-drop", "ALL")
    if superuser:
        yield from ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
    else:
        yield from ("--unshare-user", "--uid", str(seccomp.NOBODY), "--gid", str(seccomp.NOBODY))
    yield from ("--die-with-parent", "--new-session", "--clearenv", "--hostname", "enclave")
    for name, value in environment().items():
        yield from ("--setenv", name, value)
    for inside, outside in sorted(files.items()):
        yield from ("--ro-bind", str(outside), inside)
    yield from ("--remount-ro", "/", "--chdir", "/", "--seccomp", str(filter_))


def environment() -> dict[str, str]:
    """All of a sandboxed process's environment: one thread, and memory that goes back at once."""
    return {
        "LD_LIBRARY_PATH": f"{HOME}/lib",
        "LC_ALL": "C.UTF-8",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "BAFFLE_KERNELS": "0",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


# -- what a Python program needs in there: found by letting it run here --------------------------------------

_REHEARSAL = """
import ctypes, importlib, json, os, sys
opened = set()
def hook(event, args):
    if event == "open" and type(args[0]) is str:
        opened.add(args[0])
sys.addaudithook(hook)
paths, modules = json.loads(sys.argv[1])
sys.path += paths
for name in modules:
    module = importlib.import_module(name)
    getattr(module, "rehearse", lambda: None)()
class Info(ctypes.Structure):
    _fields_ = [("address", ctypes.c_size_t), ("name", ctypes.c_char_p)]
libraries = []
@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Info), ctypes.c_size_t, ctypes.c_void_p)
def each(info, size, data):
    libraries.append((info.contents.name or b"").decode())
    return 0
ctypes.CDLL(None).dl_iterate_phdr(each, None)
modules = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
print(json.dumps({
    "standard": os.path.dirname(os.__file__),
    "version": "python%d.%d" % sys.version_info[:2],
    "files": sorted({file for file in [*modules, *opened] if file and os.path.isfile(file)}),
    "libraries": sorted({file for file in libraries if os.path.isfile(file)}),
}))
"""


def python_files(modules: tuple[str, ...]) -> dict[str, Path]:
    """The files that a Python program needs which imports ``modules``: path inside → file outside.

    The interpreter, its and the system's libraries, sources alone (no bytecode: what is measured is what
    runs), data files that are read on the way. Found by importing the modules in a process of its own, and
    calling their ``rehearse`` where they have one: what such a program imports later is not there. Paths
    inside do not depend on where things lie outside. Cost: that process, about a second, the first time.
    Raises SecurityError where it fails.
    """
    return dict(_found(modules))


@functools.cache
def _found(modules: tuple[str, ...]) -> dict[str, Path]:
    interpreter = Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))
    roots = []
    for name in ("baffle", "numpy", "cryptography"):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise SecurityError(f"a worker needs the package {name}, which is not installed")
        roots.append(Path(found.origin).resolve().parents[1])
    roots = list(dict.fromkeys(roots))
    done = subprocess.run(
        [
            interpreter,
            "-I",
            "-S",
            "-B",
            "-c",
            _REHEARSAL,
            json.dumps([[str(root) for root in roots], list(modules)]),
        ],
        capture_output=True,
        env=environment() | {"LD_LIBRARY_PATH": ""},
        check=False,
    )
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
        raise SecurityError(f"what a worker needs could not be found: {lines[-1]}")
    found_there = json.loads(done.stdout)
    standard, version = Path(found_there["standard"]), found_there["version"]
    inside = {f"{HOME}/bin/python3": interpreter, _loader(interpreter): Path(_loader(interpreter))}
    places = [(root, f"{HOME}/lib/{version}/site-packages") for root in roots] + [
        (standard, f"{HOME}/lib/{version}")
    ]
    for file in (*found_there["files"], *found_there["libraries"]):
        path = Path(os.path.abspath(file))
        if path.suffix == ".pyc":
            continue
        for root, place in places:
            if path.is_relative_to(root):
                inside[f"{place}/{path.relative_to(root)}"] = path
                break
        else:
            if file in found_there["libraries"] and not path.name.startswith("ld-"):
                inside[f"{HOME}/lib/{path.name}"] = path
    return inside


def program(code: str) -> list[str]:
    """The arguments of ``launch`` for Python ``code`` that sees ``python_files``."""
    paths = "import sys; sys.path.append(sys.path[1] + '/site-packages')"  # the first one is the archive's
    return [PYTHON, "-I", "-S", "-B", "-c", f"{paths}\n{code}"]


def _loader(interpreter: Path) -> str:
    """The path of the dynamic loader, which the kernel reads from the interpreter's file."""
    with interpreter.open("rb") as stream:
        found = re.search(rb"/lib[\w./-]*/ld-[\w.-]+", stream.read(1 << 16))
    if found is None:
        raise SecurityError(f"{interpreter} names no dynamic loader: a worker needs an ordinary Python")
    return found.group().decode()

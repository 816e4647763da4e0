"""System calls of a worker: two allow-lists, and what gives up the rest of its rights.

Whatever is not on the list ends the process, at once and without a signal handler (SIGSYS, kill-process). The
first list (``STARTING``) is there when the interpreter starts, and lets it load itself: files are opened for
reading alone, no process or thread is made, nothing is connected. The second one (``STEADY``) the worker puts
on itself by ``lock`` before it reads a byte of input: no file is opened any more, no memory becomes
executable, no other program is started. Filters add up: neither can be taken off again.

The programs are made by libseccomp, which knows the numbers of the calls on each architecture, and what a
32-bit call on a 64-bit kernel would be.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import NamedTuple

from baffle.errors import SecurityError

NOBODY = 65534
_LIBRARY = "libseccomp.so.2"
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_UNKNOWN = -1  # __NR_SCMP_ERROR: no such call on any architecture
_MASKED_EQUAL, _EQUAL = 7, 4
_PROT_EXEC, _PREFERRED = 4, 1
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_TCGETS, _FIOCLEX = 0x5401, 0x5451
_CAPABILITIES_V3 = 0x20080522
_SET_DUMPABLE, _GET_DUMPABLE, _SET_NO_NEW_PRIVS = 4, 3, 38


class Rule(NamedTuple):
    """A call that is allowed where ``argument & mask == value``; without ``argument``, always."""

    call: str
    argument: int | None = None
    mask: int = 0
    value: int = 0


_ANY = [
    # memory
    Rule("brk"),
    Rule("munmap"),
    Rule("mremap"),
    Rule("madvise"),
    Rule("mbind", 2, 0xFFFFFFFF, _PREFERRED),  # OpenBLAS, for its buffer
    # what is open already, and NumPy's and Python's asking for it
    Rule("read"),
    Rule("write"),
    Rule("close"),
    Rule("fstat"),
    # time, randomness, the locks of one thread
    Rule("clock_gettime"),
    Rule("gettimeofday"),
    Rule("getrandom"),
    Rule("futex"),
    Rule("getrusage"),
    Rule("getpid"),
    Rule("gettid"),
    Rule("rt_sigreturn"),
    Rule("rt_sigprocmask"),
    Rule("restart_syscall"),
    Rule("exit"),
    Rule("exit_group"),
]
STEADY = (
    *_ANY,
    Rule("mmap", 2, _PROT_EXEC, 0),
    Rule("mprotect", 2, _PROT_EXEC, 0),
    Rule("rt_sigaction"),  # as the interpreter ends
    Rule("sched_yield"),
)
STARTING = (
    *_ANY,
    Rule("mmap"),
    Rule("mprotect"),
    Rule("execve"),
    Rule("open", 1, _WRITES, 0),
    Rule("openat", 2, _WRITES, 0),
    Rule("stat"),
    Rule("lstat"),
    Rule("newfstatat"),
    Rule("statx"),
    Rule("lseek"),
    Rule("pread64"),
    Rule("readlink"),
    Rule("readlinkat"),
    Rule("getcwd"),
    Rule("getdents64"),
    Rule("access"),
    Rule("faccessat"),
    Rule("faccessat2"),
    Rule("dup"),
    Rule("fcntl"),
    Rule("ioctl", 1, 0xFFFFFFFF, _TCGETS),
    Rule("ioctl", 1, 0xFFFFFFFF, _FIOCLEX),
    Rule("rt_sigaction"),
    Rule("sigaltstack"),
    Rule("sched_getaffinity"),
    Rule("sched_yield"),
    Rule("sysinfo"),
    Rule("uname"),
    Rule("arch_prctl"),
    Rule("set_tid_address"),
    Rule("set_robust_list"),
    Rule("rseq"),
    Rule("prlimit64"),
    Rule("getuid"),
    Rule("geteuid"),
    Rule("getgid"),
    Rule("getegid"),
    Rule("getresuid"),
    Rule("getresgid"),
    Rule("getppid"),
    # for ``lock``
    Rule("setgroups"),
    Rule("setresgid"),
    Rule("setresuid"),
    Rule("capset"),
    Rule("prctl", 0, 0xFFFFFFFF, _SET_DUMPABLE),
    Rule("prctl", 0, 0xFFFFFFFF, _GET_DUMPABLE),
    Rule("prctl", 0, 0xFFFFFFFF, _SET_NO_NEW_PRIVS),
    Rule("seccomp"),
    # for bubblewrap's process 1, which is under the filter too
    Rule("wait4"),
    Rule("waitid"),
)


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operation", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


class _Filter:
    """A libseccomp context that allows ``rules`` and kills for everything else."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        lib = library()
        self._lib, self._context = lib, lib.seccomp_init(_KILL)
        if not self._context:
            raise SecurityError("libseccomp makes no filter that kills the process: it needs Linux 4.14")
        for rule in rules:
            number = lib.seccomp_syscall_resolve_name(rule.call.encode())
            if number == _UNKNOWN:
                raise SecurityError(f"this libseccomp does not know the system call {rule.call}")
            if number < 0:  # of other architectures alone: nothing to allow
                continue
            compared = 0 if rule.argument is None else 1
            row = _Comparison(rule.argument or 0, _MASKED_EQUAL, rule.mask, rule.value)
            self._check(
                lib.seccomp_rule_add_array(self._context, _ALLOW, number, compared, ctypes.byref(row)),
                f"a rule for {rule.call}",
            )

    def _check(self, code: int, what: str) -> None:
        if code < 0:
            raise SecurityError(f"libseccomp refuses {what}: {os.strerror(-code)}")

    def export(self, file: int) -> None:
        self._check(self._lib.seccomp_export_bpf(self._context, file), "to write its program")

    def load(self) -> None:
        self._check(self._lib.seccomp_load(self._context), "to load its program")

    def close(self) -> None:
        self._lib.seccomp_release(self._context)


def library() -> ctypes.CDLL:
    """libseccomp. Raises SecurityError where it is not installed."""
    try:
        lib = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise SecurityError(f"{_LIBRARY} is not there (Debian: apt install libseccomp2)") from error
    lib.seccomp_init.restype = ctypes.c_void_p
    lib.seccomp_init.argtypes = (ctypes.c_uint32,)
    lib.seccomp_release.argtypes = (ctypes.c_void_p,)
    lib.seccomp_load.argtypes = (ctypes.c_void_p,)
    lib.seccomp_export_bpf.argtypes = (ctypes.c_void_p, ctypes.c_int)
    lib.seccomp_rule_add_array.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_void_p,
    )
    return lib


def program(rules: Iterable[Rule] = STARTING) -> int:
    """A descriptor of a file in memory that holds the filter, for bubblewrap's ``--seccomp``; close it.

    Raises SecurityError where libseccomp is not installed, or refuses.
    """
    made = _Filter(rules)
    try:
        file = os.memfd_create("seccomp")
        try:
            made.export(file)
            os.lseek(file, 0, os.SEEK_SET)
        except BaseException:
            os.close(file)
            raise
        return file
    finally:
        made.close()


def lock() -> None:
    """Gives up, for good, what a worker needed to start. Everything it will use is imported by now.

    Superuser → nobody, without capabilities; no other process of the same user may look into its memory, and
    no core is dumped; the list ``STEADY``. Raises SecurityError where any of it does not come true.
    """
    made, libc = _Filter(STEADY), ctypes.CDLL(None)
    control, clear = libc.prctl, libc.capset
    if 0 in os.getresuid() + os.getresgid():
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError as error:
            raise SecurityError(f"the worker cannot stop being the superuser: {error.strerror}") from error
    if 0 in os.getresuid() + os.getresgid():
        raise SecurityError("the worker is still the superuser")
    none = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 capabilities
    if clear((ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0), none):
        raise SecurityError("the worker keeps capabilities")
    if control(_SET_DUMPABLE, 0, 0, 0, 0) or control(_GET_DUMPABLE, 0, 0, 0, 0):
        raise SecurityError("the worker's memory stays readable for its user")
    made.load()
    made.close()


def rehearse() -> None:
    """What ``lock`` needs, loaded (``sandbox.python_files``)."""
    library()

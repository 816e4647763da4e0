"""The sandbox, attacked from inside by real programs; what it says of them; that nothing stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from enclave_world import (
    LOCK,
    allowing,
    children,
    files,
    groups_left,
    need_sandbox,
    nothing_left,
    run,
)

from baffle.enclave import sandbox, seccomp
from baffle.enclave.sandbox import Limits
from baffle.errors import ConfigError, SecurityError

WAITS = "sys.stdin.read()"


@pytest.fixture(autouse=True)
def _clean():
    yield
    nothing_left()


@pytest.fixture
def real():
    need_sandbox()


pytestmark = pytest.mark.filterwarnings("error")


# -- it works ---------------------------------------------------------------------------------------------


def test_numpy_and_cryptography_work_under_the_second_list(real):
    make = "x = (np.arange(60000) * 7919 % 1000 / 500 - 1).astype(np.float32).reshape(300, 200)"
    report, said = run(
        f"{make}\n"
        "a, b = X25519PrivateKey.generate(), X25519PrivateKey.generate()\n"
        "assert a.exchange(b.public_key()) == b.exchange(a.public_key())\n"
        "print(float(np.linalg.norm(x.T @ x)), np.maximum(x, 0).sum())\n",
        lock=True,
        before="import numpy as np\n"
        "from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey\n"
        "X25519PrivateKey.generate()\n",  # which imports the rest of it
    )
    assert report.reason == "ended", report.said
    x = (np.arange(60000) * 7919 % 1000 / 500 - 1).astype(np.float32).reshape(300, 200)
    assert [float(word) for word in said.split()] == pytest.approx(
        [float(np.linalg.norm(x.T @ x)), float(np.maximum(x, 0).sum())], rel=1e-4
    )
    assert 5e6 < report.peak < 60e6


def test_what_it_is_seen_from_outside(real):
    """The kernel's own word for the process: nobody, no capability, two filters, memory that nobody reads."""
    locked = sandbox.program(f"import os\n{LOCK}print('locked', flush=True)\nos.read(0, 1)")
    with sandbox.launch(locked, files()) as process:
        assert process.stdout.read(100) == b"locked\n"
        (pid,) = (p for p in process.pids if "bwrap" not in Path(f"/proc/{p}/comm").read_text())
        status = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{pid}/status").read_text().replace("\t", " ").splitlines()
        )
        assert process.resident() > 5e6
        if os.geteuid() == 0:
            assert status["Uid"].split() == ["65534"] * 4
            assert status["Gid"].split() == ["65534"] * 4
        capabilities = {which: int(status[f"Cap{which}"], 16) for which in ("Prm", "Eff", "Inh", "Amb")}
        assert not any(capabilities.values()), capabilities
        assert status["NoNewPrivs"].strip() == "1"
        assert status["Seccomp"].strip() == "2"
        assert int(status["Seccomp_filters"]) >= 2
        spaces = {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in ("net", "pid", "ipc", "uts", "mnt")}
        assert not {os.readlink(f"/proc/self/ns/{name}") for name in spaces} & set(spaces.values())
        assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]
        if os.geteuid() == 0:  # another process of the same user may not look into it
            looked = subprocess.run(
                ["/bin/sh", "-c", f"cat /proc/{pid}/mem /proc/{pid}/environ"],
                user=65534,
                group=65534,
                extra_groups=[],
                capture_output=True,
                text=True,
                cwd="/",
            )
            assert (looked.returncode, looked.stdout) == (1, "")
        process.stdin.close()
        assert process.wait(30).reason == "ended"


def test_the_disk_holds_the_files_of_the_list_and_nothing_else(real):
    report, said = run(
        "import os\n"
        "for folder, _, names in os.walk('/'):\n"
        "    for name in names: print(os.path.join(folder, name))\n"
        "for path in ('/etc/passwd', '/proc/self/status', '/sys', '/dev/null', '/tmp', '/bin/sh', '/home'):\n"
        "    try: os.stat(path)\n"
        "    except FileNotFoundError: continue\n"
        "    print('there is', path)\n"
    )
    assert report.reason == "ended", report.said
    assert sorted(said.split("\n")[:-1]) == sorted(files())
    assert not any(name.endswith(".pyc") for name in files())


# -- attacks ----------------------------------------------------------------------------------------------

SYSCALL = "import ctypes; call = ctypes.CDLL(None, use_errno=True).syscall\n"


def number(name):
    try:
        return seccomp.library().seccomp_syscall_resolve_name(name.encode())
    except SecurityError:  # then every test that needs it is skipped
        return -1


DEADLY = [
    "socket",
    "socketpair",
    "connect",
    "bind",
    "ptrace",
    "process_vm_readv",
    "keyctl",
    "add_key",
    "mount",
    "umount2",
    "pivot_root",
    "chroot",
    "bpf",
    "unshare",
    "setns",
    "clone",
    "clone3",
    "fork",
    "vfork",
    "kill",
    "tgkill",
    "perf_event_open",
    "userfaultfd",
    "io_uring_setup",
    "memfd_create",
    "init_module",
    "reboot",
    "sethostname",
    "setuid",
    "personality",
    "mknodat",
    "unlinkat",
    "renameat2",
    "mkdirat",
    "fchmodat",
    "symlinkat",
    "shmget",
    "msgget",
    "name_to_handle_at",
    "open_by_handle_at",
    "pidfd_open",
    "sendfile",
    "splice",
    "prctl",
]


@pytest.mark.parametrize("call", DEADLY)
def test_a_call_that_is_on_no_list_kills_at_once(real, call):
    report, said = run(
        f"print('before', flush=True)\ncall({number(call)}, 0, 0, 0, 0, 0, 0)\nprint('after')", before=SYSCALL
    )
    assert (report.reason, report.status, said) == ("seccomp", 128 + signal.SIGSYS, "before\n")


LOCKED = {
    "exec": "import os; os.execv('/runtime/bin/python3', ['python3', '-c', ''])",
    "open for reading": "open('/runtime/bin/python3', 'rb')",
    "a look at a folder": "import os; os.listdir('/')",
    "memory that can be executed": "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "a late import": "import sqlite3",
    "a socket": "socket.socket()",
    "a thread": "_thread.start_new_thread(print, ())",
    "a fork": "import os; os.fork()",
    "superuser again": "import os; os.setresuid(0, 0, 0)",
    "capabilities": f"call({number('capset')}, 0, 0)",
    "another filter": f"call({number('seccomp')}, 1, 0, 0)",
    "sleep": "import time; time.sleep(0.01)",
    "a handler in its way": "import signal, os; signal.signal(signal.SIGSYS, lambda *_: None); os.fork()",
}


@pytest.mark.parametrize("what", sorted(LOCKED))
def test_what_a_start_needs_is_gone_after_it(real, what):
    report, said = run(
        f"print('before', flush=True)\n{LOCKED[what]}\nprint('after')",
        lock=True,
        before="import mmap, _socket as socket, os, _thread, _signal as signal\n" + SYSCALL,
    )
    assert (report.reason, said) == ("seccomp", "before\n")


def test_too_much_memory_is_killed_and_reported(real):
    code = "a = np.ones(120_000_000, np.uint8)\nprint('there', a.sum())"
    for lock in (False, True):
        report, said = run(code, lock=lock, before="import numpy as np\n")
        assert (report.reason, said) == ("memory", "")
        assert 80e6 < report.peak <= 90e6
    report, said = run(code, limits=Limits(200_000_000), before="import numpy as np\n")
    assert (report.reason, said) == ("ended", "there 120000000\n")
    assert 120e6 < report.peak < 160e6


def test_address_space_alone_is_not_memory(real):
    report, _ = run("import mmap; a = mmap.mmap(-1, 1 << 32); a[0] = 1")
    assert report.reason == "ended"


def test_a_fork_bomb_is_contained_even_without_a_filter(real):
    bomb = (
        "import os\nwhile True:\n"
        "    try: os.fork()\n"
        "    except OSError as error: print(error.errno, flush=True); break\n"
        "os.read(0, 1)\n"
    )
    loose = allowing("clone", "fork", "vfork", "clone3", "rt_sigaction", "wait4")
    for most in (3, 8):
        with sandbox.launch(sandbox.program(bomb), files(), Limits(processes=most), rules=loose) as process:
            assert process.stdout.read(3) == b"11\n"  # EAGAIN
            assert len(process.pids) <= most
            process.stdin.close()
            assert process.wait(30).reason == "processes"
    report, _ = run(bomb)
    assert report.reason == "seccomp"


def test_the_network_leads_nowhere_even_without_a_filter(real):
    code = (
        "import _socket as socket\n"
        "for family, address in ((socket.AF_INET, ('192.0.2.1', 80)), (socket.AF_INET, ('127.0.0.1', 80)),"
        " (socket.AF_INET6, ('2001:db8::1', 80))):\n"
        "    try: socket.socket(family).connect(address)\n"
        "    except OSError as error: print(error.errno)\n"
        "print(socket.if_nameindex())\n"
    )
    rules = allowing("socket", "connect", "ioctl", "bind", "getsockname", "sendto", "recvmsg")
    report, said = run(code, rules=rules)
    assert report.reason == "ended", report.said
    *errors, interfaces = said.splitlines()
    assert set(errors) <= {"101", "111", "99", "97"}  # unreachable, refused by its own loopback, no address
    assert interfaces == "[(1, 'lo')]"


def test_nothing_can_be_written_even_without_a_filter(real):
    code = (
        "import os\n"
        "for path in ('/new', '/runtime/new', '/runtime/lib/libc.so.6', '/tmp/new', '/dev/shm/new'):\n"
        "    for way in (lambda: open(path, 'wb'), lambda: os.mkdir(path + 'd'), lambda: os.unlink(path),"
        " lambda: os.rename(path, path + 'x')):\n"
        "        try: way()\n"
        "        except OSError as error: continue\n"
        "        print('written', path)\n"
        "print('done')\n"
    )
    report, said = run(code, rules=allowing("openat", "open", "mkdir", "unlink", "rename"))
    assert (report.reason, said) == ("ended", "done\n"), report.said
    assert run("open('/new', 'wb')")[0].reason == "seccomp"


def test_a_worker_that_fails_says_so(real):
    report, _ = run("raise SystemExit(3)")
    assert (report.reason, report.status) == ("failed", 3)
    report, _ = run("raise ValueError('no')")
    assert (report.reason, report.said.splitlines()[-1]) == ("failed", "ValueError: no")
    assert "failed (status 1, peak" in str(report)


def test_much_on_stderr_neither_blocks_nor_fills_a_disk(real):
    report, _ = run("while True: sys.stderr.write('x' * 65536)", limits=Limits(30_000_000))
    assert report.reason in ("memory", "failed", "killed")
    assert len(report.said) == sandbox.MOST_STDERR


def test_a_wait_ends_and_leaves_it_running(real):
    with sandbox.launch(sandbox.program(WAITS), files()) as process:
        with pytest.raises(TimeoutError):
            process.wait(0.1)
        assert process.pids
    assert process.wait().reason == "killed"


# -- nothing is left --------------------------------------------------------------------------------------


def test_a_failing_caller_leaves_nothing(real):
    with (
        pytest.raises(ZeroDivisionError),
        sandbox.launch(sandbox.program(WAITS), files()),
    ):
        _ = len(groups_left()) / 0
    nothing_left()
    assert not [child for child in children() if child[1] in ("bwrap", "python3")]


def test_a_killed_launcher_takes_the_worker_with_it(real):
    """Its folders are swept by the next launch: a dead process removes nothing."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom enclave_world import *\n"
        "p = sandbox.launch(sandbox.program('sys.stdin.read()'), files())\n"
        "import time\nwhile len(p.pids) < 3: time.sleep(0.01)\n"
        "print(*p.pids, *p._group.folders, flush=True)\nsys.stdin.read()\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        words = launcher.stdout.readline().decode().split()
    finally:
        launcher.kill()
        launcher.wait()
        launcher.stdin.close()
        launcher.stdout.close()
    pids = [int(word) for word in words if word.isdigit()]
    folders = [Path(word) for word in words if not word.isdigit()]
    assert len(pids) >= 3
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    run("")
    assert not any(folder.exists() for folder in folders)


# -- where a machine forbids it ---------------------------------------------------------------------------


@pytest.fixture
def nothing_starts(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a process was started without a sandbox")

    monkeypatch.setattr(subprocess, "Popen", refused)


def started(**options):
    return sandbox.launch([sandbox.PYTHON, "-c", ""], {}, **options)


def test_without_bubblewrap(monkeypatch, nothing_starts, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SecurityError, match=r"^bubblewrap is not there: .*apt install bubblewrap"):
        started()


def test_without_libseccomp(real, monkeypatch, nothing_starts):
    monkeypatch.setattr(seccomp, "_LIBRARY", "libseccomp.so.999")
    with pytest.raises(SecurityError, match=r"^libseccomp.so.999 is not there .*apt install libseccomp2"):
        started()


def test_with_a_libseccomp_that_knows_too_little(monkeypatch, nothing_starts):
    try:
        seccomp.library()
    except SecurityError as error:
        pytest.skip(str(error))
    with pytest.raises(SecurityError, match="does not know the system call fly"):
        seccomp.program([seccomp.Rule("fly")])


def hide_groups(monkeypatch, root):
    monkeypatch.setattr(sandbox.group, "__defaults__", (root, sandbox._OWN))


def test_without_control_groups(real, monkeypatch, nothing_starts, tmp_path):
    hide_groups(monkeypatch, tmp_path)
    with pytest.raises(SecurityError, match="no control group limits memory and processes here"):
        started()


def test_with_control_groups_that_cannot_be_made(real, monkeypatch, nothing_starts, tmp_path):
    """The kernel refuses at the last moment: what was made is taken away."""
    own = tmp_path / "own"
    own.write_text("4:memory:/\n8:pids:/\n")
    for controller in ("memory", "pids"):
        (tmp_path / controller).mkdir()
        (tmp_path / controller / "cgroup.procs").write_text("")
    monkeypatch.setattr(sandbox.group, "__defaults__", (tmp_path, own))

    def full(self, *_):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SecurityError, match=r"no control group could be made: .*No space left"):
        started()
    assert not list(tmp_path.glob("*/baffle-*"))


def test_where_the_kernel_forbids_namespaces(real, monkeypatch):
    """Bubblewrap says what it could not do, and nothing of the program has run."""
    with (
        sandbox.launch([sandbox.PYTHON], {"/x": Path("/nowhere/at/all")}) as process,
        pytest.raises(SecurityError, match="no sandbox could be made here: bwrap: Can't find source path"),
    ):
        process.wait(30)


def test_limits_that_cannot_be():
    for wrong in ({"memory": 0}, {"processes": 2}):
        with pytest.raises(ConfigError):
            Limits(**wrong)


# -- cgroup v2: its files, in a folder that stands for it (no machine at hand has the real one) ---


class FakeV2:
    def __init__(self, root, own="user.slice/session.scope", handed_down="user.slice"):
        self.root, self.own = root, root / "own"
        (root / own).mkdir(parents=True)
        self.own.write_text(f"0::/{own}\n")
        (root / "cgroup.controllers").write_text("cpu memory pids\n")
        for folder in (root, *(root / own).parents, root / own):
            if folder == root or root in folder.parents:
                (folder / "cgroup.subtree_control").write_text("")
        if handed_down is not None:
            (root / handed_down / "cgroup.subtree_control").write_text("cpu memory pids\n")

    def group(self):
        return sandbox.group(self.root, self.own)


def test_v2_groups_are_made_beside_our_own(tmp_path):
    group = FakeV2(tmp_path).group()
    assert isinstance(group, sandbox.GroupV2)
    assert group.folder.parent == tmp_path / "user.slice"
    group.make(Limits(90_000_000, 4))
    read = {path.name: path.read_text() for path in group.folder.iterdir()}
    assert read == {"memory.max": "90000000", "memory.oom.group": "1", "pids.max": "4"}


def test_v2_groups_lie_below_us_where_we_hand_down(tmp_path):
    group = FakeV2(tmp_path, handed_down="user.slice/session.scope").group()
    assert group.folder.parent == tmp_path / "user.slice/session.scope"


def test_v2_without_memory_is_refused(tmp_path):
    with pytest.raises(SecurityError, match="Delegate=yes"):
        FakeV2(tmp_path, handed_down=None).group()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_groups_that_may_not_be_written(tmp_path):
    (tmp_path / "user.slice").chmod(0o500)
    with pytest.raises(SecurityError, match="cannot be written"):
        FakeV2(tmp_path).group()


def test_what_v2_says_of_the_end(tmp_path):
    group = FakeV2(tmp_path).group()
    (tmp_path / "user.slice" / group.folder.name).mkdir()
    write = {
        "memory.swap.max": "max",
        "memory.events": "low 0\nhigh 0\nmax 4\noom 1\noom_kill 0\noom_group_kill 0\n",
        "pids.events": "max 0\n",
        "cgroup.procs": "12\n13\n",
    }
    for name, text in write.items():
        (group.folder / name).write_text(text)
    assert not group.killed_for_memory()
    assert not group.refused_processes()
    assert group.peak() is None
    assert group.processes() == {12, 13}
    (group.folder / "memory.events").write_text("oom 1\noom_kill 1\n")
    (group.folder / "pids.events").write_text("max 7\n")
    (group.folder / "memory.peak").write_text("80000000\n")
    assert group.killed_for_memory()
    assert group.refused_processes()
    assert group.peak() == 80_000_000


def test_v1_below_our_own_group_or_at_the_root_of_a_container(tmp_path):
    own = tmp_path / "own"
    own.write_text("4:memory:/mine/deep\n8:pids:/elsewhere\n0::/\n")
    for folder in ("memory/mine/deep", "pids"):
        (tmp_path / folder).mkdir(parents=True)
    for controller in ("memory", "pids"):
        (tmp_path / controller / "cgroup.procs").write_text("")
    group = sandbox.group(tmp_path, own)
    assert isinstance(group, sandbox.GroupV1)
    assert group.memory.parent == tmp_path / "memory/mine/deep"
    assert group.pids.parent == tmp_path / "pids"
    (group.memory).mkdir()
    (group.memory / "memory.memsw.limit_in_bytes").write_text("")
    group.memory.rename(tmp_path / "aside")
    group.make(Limits(50_000_000, 3))
    assert (group.memory / "memory.limit_in_bytes").read_text() == "50000000"
    assert (group.memory / "memory.swappiness").read_text() == "0"
    assert (group.pids / "pids.max").read_text() == "3"


def test_groups_of_dead_launchers_are_swept_and_of_living_ones_not(tmp_path):
    fake = FakeV2(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for number in (dead.pid, os.getppid()):
        (tmp_path / "user.slice" / f"baffle-{number}-0").mkdir()
    fake.group()
    assert [path.name for path in tmp_path.glob("user.slice/baffle-*")] == [f"baffle-{os.getppid()}-0"]

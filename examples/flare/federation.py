"""A FLARE federation on one machine: provisioned, certified, started, given a job, and ended.

    python examples/flare/federation.py --config examples/flare/digits.toml --folder /tmp/flare

Everything it starts talks over 127.0.0.1 and is ended with it: after the job, a failure, or Ctrl-C. On many
machines the same steps are a person's, each on the machine that a step is about (docs/deployment.md).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from baffle.flare import prepare, settings_of, write_job
from baffle.runs import RunFolder

ADMIN = "admin@baffle.org"
_OURS = "BAFFLE_FEDERATION"  # in the environment of all that is started here, and of what that starts


class Federation:
    """Server, sites and devices as processes of this machine. A context: it ends what it started.

    ``folder`` must not be there. ``within``: clients live in FLARE's processes, not behind sockets.
    """

    def __init__(self, folder: Path, config: Path, *, within: bool = False) -> None:
        self.folder, self._config, self._within = folder.resolve(), config.resolve(), within
        self.runs, self._logs = self.folder / "runs", self.folder / "logs"
        self._settings = settings_of(self._config)
        self.names = [f"client-{i:03d}" for i in range(self._settings.clients)]
        self._mark = secrets.token_hex(16)
        self._sockets = Path("/tmp") / f"baffle-{self._mark[:8]}"  # a socket's path is short
        self._session: Any = None
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Federation:
        # It kills what is marked once its input ends: when this is over, however it is.
        self._sweeper = subprocess.Popen(
            [sys.executable, __file__, "--sweep", self._mark, str(self._sockets)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._logs.mkdir(parents=True)
            self.port = _free_port()
            provision(self.folder, self.names, self.port)
            self._make_keys()
            self._write_local()
            self.start("server")
            for name in self.names:
                if not self._within:
                    self.start_device(name)
                self.start(name)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    # -- what a person does on each machine -----------------------------------------------------------

    def kit(self, name: str) -> Path:
        return kit(self.folder, name)

    def _make_keys(self) -> None:
        """For secure sums: each device's own key, and the roster of public ones that all pin."""
        self.settings = self.folder / "settings.toml"
        text = self._config.read_text()
        if self._settings.secure:
            lines = [
                self._run([_program("baffle"), "identity", f"{name}.key", "--name", name])
                for name in self.names
            ]
            (self.folder / "roster").write_text("".join(lines))
            text = f'roster = "{self.folder / "roster"}"\n' + text
        self.settings.write_text(text)

    def _write_local(self) -> None:
        prepare(self.kit("server"), {"runs": str(self.runs)})
        for name in self.names:
            own = {"socket": str(self._sockets / f"{name}.sock")}
            if self._within:
                own = {"config": str(self.settings)}
                if self._settings.secure:
                    own |= {key: str(self.folder / f"{name}.{end}") for key, end in _FILES.items()}
            prepare(self.kit(name), own)

    def start(self, name: str, kit: Path | None = None) -> None:
        """The server, or a site: by its kit's own script, which starts it again when it dies."""
        self._start(name, ["bash", str((kit or self.kit(name)) / "startup" / "sub_start.sh")])

    def start_device(self, name: str) -> None:
        listen = self._sockets / f"{name}.sock"
        command = [_program("baffle"), "device", "--config", str(self.settings), "--name", name]
        if self._settings.secure:
            for key, end in _FILES.items():
                command += [f"--{key}", str(self.folder / f"{name}.{end}")]
        self._start(f"device-{name}", [*command, "--listen", str(listen)])

    # -- the job --------------------------------------------------------------------------------------

    def session(self) -> Any:
        """The administrator's, by certificate; waits for the server."""
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        if self._session is None:
            self._session = new_secure_session(ADMIN, str(self.kit(ADMIN)), timeout=60.0)
        return self._session

    def disconnect(self) -> None:
        """Of the session alone: the next is with a server that has started again."""
        if self._session is not None:
            with contextlib.suppress(Exception):
                self._session.close()
            self._session = None

    def submit(self, run: str, timeout: float = 120.0) -> str:
        """Once all sites are there: FLARE gives a job to those, and to none that comes later."""
        job = write_job(self.folder / "jobs" / f"{run}-{secrets.token_hex(3)}", self.settings, run)
        session = self.session()
        self.wait(lambda: self.connected() >= set(self.names), timeout, "all sites to connect")
        return str(session.submit_job(str(job)))

    def connected(self) -> set[str]:
        return {client.name for client in self.session().get_system_info().client_info}

    def finish(self, job: str, timeout: float) -> str:
        """The job's last status, such as FINISHED:COMPLETED."""
        self.wait(lambda: self.status(job).startswith("FINISHED"), timeout, f"job {job} to end")
        return self.status(job)

    def status(self, job: str) -> str:
        return str(self.session().get_job_meta(job)["status"])

    def wait(self, until: Callable[[], bool], timeout: float, what: str) -> None:
        end = time.monotonic() + timeout
        while not until():
            if time.monotonic() > end:
                raise TimeoutError(f"waited {timeout:g} s for {what}")
            time.sleep(0.25)

    # -- processes ------------------------------------------------------------------------------------

    def processes(self, *words: str) -> list[int]:
        """Ids of this federation's processes whose command line has all the words."""
        return [pid for pid, line in _marked(self._mark) if all(word in line for word in words)]

    def kill(self, *words: str) -> int:
        """kill -9 to those processes. How many there were."""
        found = self.processes(*words)
        _kill(found)
        return len(found)

    def end(self) -> None:
        """Until nothing of this federation is left."""
        self.disconnect()
        self._sweeper.communicate(timeout=60)
        for process in self._started:
            process.wait(timeout=10)

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            _OURS: self._mark,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder),  # FLARE writes to it
            "OMP_NUM_THREADS": "1",
            # How long a finished job waits for word from sites that have gone: 15 minutes otherwise.
            "NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "10",
        }

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.txt"

    def _start(self, name: str, command: Sequence[str]) -> None:
        with self.log(name).open("ab") as log:
            self._started.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                    cwd=self.folder,
                    start_new_session=True,
                )
            )

    def _run(self, command: Sequence[str]) -> str:
        return _run(command, self.folder, self._environment())


def provision(folder: Path, names: Sequence[str], port: int) -> None:
    """Certificates and start-up kits, one for each participant. The key of their root stays in ``folder``."""
    sites = "".join(f"  - {{name: {name}, type: client, org: baffle}}\n" for name in names)
    (folder / "project.yml").write_text(
        "api_version: 3\nname: baffle\ndescription: one machine\nparticipants:\n"
        f"  - {{name: localhost, type: server, org: baffle, fed_learn_port: {port}}}\n{sites}"
        f"  - {{name: {ADMIN}, type: admin, org: baffle, role: project_admin}}\n"
        "builders:\n"
        "  - path: nvflare.lighter.impl.workspace.WorkspaceBuilder\n"
        "  - path: nvflare.lighter.impl.static_file.StaticFileBuilder\n"
        "    args: {config_folder: config, scheme: tcp}\n"
        "  - path: nvflare.lighter.impl.cert.CertBuilder\n"
        "  - path: nvflare.lighter.impl.signature.SignatureBuilder\n"
    )
    command = [_program("nvflare"), "provision", "-p", "project.yml", "-w", "kits"]
    _run(command, folder, os.environ | {"HOME": str(folder)})


def kit(folder: Path, name: str) -> Path:
    """Where ``provision`` put a participant's start-up kit."""
    return folder / "kits" / "baffle" / "prod_00" / ("localhost" if name == "server" else name)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _run(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, cwd=folder, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


_FILES = {"identity": "key", "ledger": "ledger"}


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _marked(mark: str) -> Iterator[tuple[int, str]]:
    """Processes with ``mark`` in their environment, and their command lines."""
    wanted = f"{_OURS}={mark}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                yield int(entry.name), line


def _kill(processes: Sequence[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _sweep(mark: str) -> None:
    """Kills until nothing is left: a restart loop may be quicker than one look."""
    for _ in range(200):
        if not (found := [process for process, _ in _marked(mark)]):
            return
        _kill(found)
        time.sleep(0.1)


def main() -> int:
    if sys.argv[1:2] == ["--sweep"]:
        sys.stdin.read()
        _sweep(sys.argv[2])
        shutil.rmtree(sys.argv[3], ignore_errors=True)
        return 0
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--config", type=Path, required=True, help="settings, as of baffle train")
    options.add_argument("--folder", type=Path, required=True, help="where all goes; must not be there")
    options.add_argument("--within", action="store_true", help="clients in FLARE's own processes")
    given = options.parse_args()
    with Federation(given.folder, given.config, within=given.within) as federation:
        print(f"{len(federation.names)} sites; logs in {given.folder / 'logs'}", flush=True)
        job = federation.submit("run")
        print(f"job {job} submitted", flush=True)
        path = federation.runs / "run"
        print(f"watch it: baffle top {path}", flush=True)
        status = federation.finish(job, 24 * 3600.0)
        print(status)
        if not status.endswith("COMPLETED"):
            return 1
        folder = RunFolder.open(path)
        print(f"{folder.rounds_done()} rounds; weights in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A Flower deployment on one machine, as it would stand on many: TLS, node authentication, own processes.

    python examples/flower/local_fleet.py FOLDER --config federation.toml

starts a SuperLink, for each client a SuperNode and a ``baffle device``, and the executors that process
isolation needs; submits the job with ``flwr run``, shows its log, and ends everything it started: at the end
of the job, at Ctrl-C, and when anything fails. Certificates, keys, the SuperLink's database, logs and the run
(FOLDER/run) stay in FOLDER; the same command with ``--resume`` goes on with it. Nothing is sent to anybody:
Flower's telemetry and its look for updates are off.

    127.0.0.1:PORT  SuperLink: Fleet, Control and Runtime API, one port, TLS
        flower-superexec ─ flwr-serverapp      baffle.flower:server_app, the round engine
    per client
        flower-supernode                       its own key; Runtime API on a port of its own, TLS
        flower-superexec ─ flwr-clientapp      a process a message: relays bytes, holds nothing
        baffle device                          data, model, keys and state; Unix domain socket
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import ipaddress
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from baffle.config import TrainConfig, read_toml
from baffle.runs import RunFolder

APP = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
HOST = "127.0.0.1"
LAPSE = 75.0  # seconds until a node that was killed counts as gone: two heartbeats of 30 s, and some
RETRY = 5.0
SUPERLINK = "local"  # the connection's name in Flower's own config file


class FleetError(RuntimeError):
    """Something did not start, or ended before its time."""


class Fleet:
    """All processes of one deployment, under ``folder``. A context: whatever happens in it, then all ends."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder.resolve(), list(names)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports: dict[str, int] = {}  # of SuperNodes' Runtime APIs
        self._started: dict[str, float] = {}  # when SuperNodes were started last, ...
        self._refused: dict[str, float] = {}  # ... and since when they end at once
        for part in ("logs", "keys", "home", "sockets"):
            (self.folder / part).mkdir(parents=True, exist_ok=True, mode=0o700)
        self.port = _free_port()
        self._make_certificates()
        self._make_secret("superexec")

    def __enter__(self) -> Fleet:
        self._before = signal.signal(signal.SIGTERM, _interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        signal.signal(signal.SIGTERM, self._before)

    # -- what runs --------------------------------------------------------------------------------

    def superlink(self, *options: str) -> None:
        """The SuperLink. ``--simulation`` among its options makes it one without nodes."""
        self._start(
            "superlink",
            *("flower-superlink", "--host", HOST, "--port", str(self.port)),
            *self._tls_server(),
            "--enable-supernode-auth",
            *("--isolation", "process", *self._executor_secret()),
            *("--database", str(self.folder / "superlink.db")),
            "--disable-runtime-dependency-installation",
            *options,
        )
        self._await("superlink", lambda: _connects(socket.AF_INET, (HOST, self.port)))

    def superlink_executor(self) -> None:
        """What runs the SuperLink's ServerApps, each in a process of its own."""
        self._executor("superlink", self.port)

    def connect(self) -> None:
        """Tells ``flwr`` where the SuperLink is."""
        home = self._home("flwr")
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{SUPERLINK}"\n\n[superlink.{SUPERLINK}]\n'
            f'address = "{HOST}:{self.port}"\nroot-certificates = "{self._key("ca.crt")}"\n'
        )

    def register(self, names: Sequence[str] | None = None) -> None:
        """Makes each node's key known to the SuperLink; its database remembers it."""
        new = [n for n in names or self.names if not self._key(f"{n}.registered").exists()]
        for name in new:
            self._make_node_key(name)
        public = {name: str(self._key(f"{name}.pub")) for name in new}
        calls = {
            name: self._popen("flwr", f"flwr-register-{name}", "flwr", "supernode", "register", public[name])
            for name in new
        }
        for name, call in calls.items():
            if call.wait(60) != 0:
                raise FleetError(f"{name} could not be registered: {self._tail(f'flwr-register-{name}')}")
            self._key(f"{name}.registered").touch()

    def node(self, name: str) -> None:
        """A SuperNode with its own key, and the executor that runs its ClientApps."""
        self._make_node_key(name)
        self._ports[name] = _free_port()
        self.supernode(name)
        self._executor(f"node-{name}", self._ports[name])

    def supernode(self, name: str) -> None:
        """The SuperNode alone: once more, after its end."""
        self._started[name] = time.monotonic()
        self._start(
            f"node-{name}",
            *("flower-supernode", "--superlink", f"{HOST}:{self.port}"),
            *("--root-certificates", str(self._key("ca.crt"))),
            *("--auth-supernode-private-key", str(self._key(name))),
            *("--node-config", f'device="{self.socket(name)}"'),
            *("--isolation", "process", *self._executor_secret()),
            *("--host", HOST, "--port", str(self._ports[name]), *self._tls_server()),
        )

    def device(self, name: str, config: Path, *options: str) -> None:
        """The process that holds a client's data, keys and state; call ``ready`` before it is asked."""
        listen = self.socket(name)
        command = ("baffle", "device", "--config", str(config), "--name", name, "--listen", str(listen))
        self._start(f"device-{name}", *command, *options)

    def ready(self, name: str, seconds: float = 120) -> None:
        """Waits until a device listens."""
        self._await(f"device-{name}", lambda: _connects(socket.AF_UNIX, str(self.socket(name))), seconds)

    def socket(self, name: str) -> Path:
        return self.folder / "sockets" / f"{name}.sock"

    def identity(self, name: str) -> tuple[str, ...]:
        """A device's options for secure sums; its key is made once, and the roster has a line for it."""
        key = self._key(f"{name}.identity")
        if not key.exists():
            made = subprocess.run(
                [str(BIN / "baffle"), "identity", str(key), "--name", name],
                check=True,
                capture_output=True,
                text=True,
                env=self._environment("flwr"),
            )
            with self.roster.open("a") as file:
                file.write(made.stdout)
        return ("--identity", str(key), "--ledger", str(self._key(f"{name}.ledger")))

    @property
    def roster(self) -> Path:
        return self._key("roster")

    def devices(self, config: TrainConfig) -> None:
        """A device for each client, all by FOLDER/federation.toml: the config, and the roster if need be."""
        options = {name: self.identity(name) if config.secure else () for name in self.names}
        path = self.folder / "federation.toml"
        path.write_text(self._with_roster(config).to_toml())
        for name in self.names:
            self.device(name, path, *options[name])

    def _with_roster(self, config: TrainConfig) -> TrainConfig:
        return replace(config, roster=str(self.roster)) if config.secure else config

    # -- jobs -------------------------------------------------------------------------------------

    def settings(self, config: TrainConfig, run: str = "run", resume: bool = False) -> Path:
        """The run config of a job, as a TOML file for ``flwr run``. Its run folder is FOLDER/``run``."""
        path = self.folder / f"{run}.toml"
        own = f"run = {json.dumps(str(self.folder / run))}\nresume = {json.dumps(resume)}\n"
        path.write_text(self._with_roster(config).to_toml() + own)
        return path

    def submit(self, settings: Path, *options: str) -> str:
        """``flwr run`` with the settings of a TOML file. Returns the run's id."""
        said = self.flwr(
            "run", str(APP), SUPERLINK, "--run-config", str(settings), "--format", "json", *options
        )
        return str(said["run-id"])

    def status(self, run: str) -> tuple[str, str]:
        """A run's status (running, finished:completed, finished:failed) and what is said of it."""
        said = self.flwr("list", SUPERLINK, "--run-id", run, "--format", "json")
        (row,) = said["runs"]
        return row["status"], row["status-details"]

    def wait(self, run: str, seconds: float | None = None, show: bool = False) -> tuple[str, str]:
        """The status once the run has finished; ``show``: its log, to standard output.

        FleetError after ``seconds``, and where a process has ended that should not.
        """
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            log = self._popen("flwr", None if show else "flwr-log", "flwr", "log", run, SUPERLINK, "--stream")
            self.processes["flwr-log"] = log
            while log.poll() is None:
                self.check()
                if until is not None and time.monotonic() > until:
                    raise FleetError(f"run {run} has not finished after {seconds:g} s")
                time.sleep(0.2)
            del self.processes["flwr-log"]
            status, details = self.status(run)
            if status.startswith("finished"):
                return status, details
            time.sleep(1)

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """A call of the command ``flwr`` that answers in JSON."""
        call = subprocess.run(
            [str(BIN / "flwr"), *arguments],
            capture_output=True,
            text=True,
            env=self._environment("flwr"),
            cwd=self.folder,
            timeout=60,
        )
        start = call.stdout.find("{")
        said = json.loads(call.stdout[start:]) if start >= 0 else {}
        if call.returncode or not said.get("success"):
            raise FleetError(f"flwr {arguments[0]}: {(call.stdout + call.stderr).strip()}")
        return said

    def check(self) -> None:
        """FleetError where a process that should run has ended by itself. SuperNodes are started again.

        That is as a supervisor must do it: a node that was killed is taken for connected for a minute, and
        until then Flower refuses whoever comes with its key.
        """
        for who, process in list(self.processes.items()):
            if process.poll() is None:
                continue
            name = who.removeprefix("node-")
            if name == who or not self._key(f"{name}.registered").exists():
                raise FleetError(f"{who} ended with {process.returncode}: {self._tail(who)}")
            now = time.monotonic()
            if now - self._started[name] > LAPSE:  # it ran
                self._refused.pop(name, None)
            if now - self._refused.setdefault(name, now) > LAPSE:
                raise FleetError(f"{who} does not come back: {self._tail(who)}")
            if now - self._started[name] > RETRY:
                self.supernode(name)

    # -- processes --------------------------------------------------------------------------------

    def kill(self, who: str, how: int = signal.SIGKILL) -> None:
        """Ends one process with all that it started: ``superlink``, ``node-NAME``, ``device-NAME``, ..."""
        process = self.processes.pop(who)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        process.wait(20)
        with suppress(ProcessLookupError):  # whom the first of the group did not take along
            os.killpg(process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Ends everything: politely, and after five seconds by force.

        The ServerApp first, which would find its nodes gone; then these, since one that cannot say goodbye to
        the SuperLink is not let in again for a minute.
        """
        server, nodes = (
            {who: process for who, process in self.processes.items() if who.startswith(which)}
            for which in ("executor-superlink", "node-")
        )
        for group in (server, nodes, self.processes):
            for process in group.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
            until = time.monotonic() + 5
            for process in group.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(until - time.monotonic(), 0.01))
            for process in group.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.processes.clear()

    def log(self, who: str) -> Path:
        return self.folder / "logs" / f"{who}.log"

    def _start(self, who: str, *command: str) -> None:
        self.processes[who] = self._popen(who, who, *command)

    def _popen(self, home: str, log: str | None, *command: str) -> subprocess.Popen[bytes]:
        with ExitStack() as stack:
            out = None if log is None else stack.enter_context(self.log(log).open("ab"))
            return subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._environment(home),
                cwd=self.folder,
                start_new_session=True,  # a group of its own, and no Ctrl-C behind our back
                preexec_fn=_die_with_parent,
            )

    def _executor(self, of: str, port: int) -> None:
        self._start(
            f"executor-{of}",
            *("flower-superexec", "--runtime-api-address", f"{HOST}:{port}"),
            *("--root-certificates", str(self._key("ca.crt")), *self._executor_secret()),
        )

    def _environment(self, home: str) -> dict[str, str]:
        path = self._home(home)
        return {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",  # where executors find flwr-clientapp
            "HOME": str(path),
            "FLWR_HOME": str(path),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # of 1 s: an executor's wait for a message
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def _home(self, who: str) -> Path:
        return self.folder / "home" / who.removeprefix("executor-")

    def _tail(self, who: str) -> str:
        lines = self.log(who).read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-5:]) or "it said nothing"

    def _await(self, who: str, there: Callable[[], bool], seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not there():
            self.check()
            if time.monotonic() > until:
                raise FleetError(f"{who} does not listen after {seconds:g} s: {self._tail(who)}")
            time.sleep(0.1)

    # -- keys -------------------------------------------------------------------------------------

    def _key(self, name: str) -> Path:
        return self.folder / "keys" / name

    def _executor_secret(self) -> tuple[str, str]:
        return ("--superexec-auth-secret-file", str(self._key("superexec.secret")))

    def _tls_server(self) -> tuple[str, ...]:
        names = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key"}
        return tuple(x for option, name in names.items() for x in (option, str(self._key(name))))

    def _make_secret(self, name: str) -> None:
        path = self._key(f"{name}.secret")
        if not path.exists():
            _write_private(path, secrets.token_hex(32).encode())

    def _make_node_key(self, name: str) -> None:
        """A P-384 key in OpenSSH's form, as ``ssh-keygen -t ecdsa -b 384`` makes it; made once."""
        if self._key(name).exists():
            return
        key = ec.generate_private_key(ec.SECP384R1())
        _write_private(self._key(name), _private_bytes(key, serialization.PrivateFormat.OpenSSH))
        self._key(f"{name}.pub").write_bytes(
            key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        )

    def _make_certificates(self) -> None:
        """An authority of our own, and a certificate for 127.0.0.1 and localhost signed by it."""
        if self._key("server.crt").exists():
            return
        authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
        issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "baffle local fleet")])
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
        root = (
            _certificate(issuer, issuer, authority.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(authority, hashes.SHA256())
        )
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))]
        signed = (
            _certificate(subject, issuer, server.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(authority, hashes.SHA256())
        )
        _write_private(self._key("server.key"), _private_bytes(server, serialization.PrivateFormat.PKCS8))
        self._key("ca.crt").write_bytes(root.public_bytes(serialization.Encoding.PEM))
        self._key("server.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=365))
    )


def _private_bytes(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write_private(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _connects(family: socket.AddressFamily, address: str | tuple[str, int]) -> bool:
    with socket.socket(family) as probe:
        probe.settimeout(1)
        return probe.connect_ex(address) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _die_with_parent() -> None:
    """On Linux, a process ends with the one that started it, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


# -- the command ------------------------------------------------------------------------------------


def main() -> int:
    options = _parser().parse_args()
    fleet_config = options.folder / "federation.toml"
    if options.resume == (options.config is not None):
        raise SystemExit("either --config FILE, for a new run, or --resume")
    if not options.resume and (options.folder / "run").exists():
        raise SystemExit(f"{options.folder / 'run'} is there already: --resume, or another folder")
    config = TrainConfig.resolve(read_toml(fleet_config if options.resume else options.config))
    if config.partition not in ("iid", "dirichlet"):
        raise SystemExit("this script deals one data set to its devices: partition iid or dirichlet")
    with Fleet(options.folder, [f"client-{i:03d}" for i in range(config.clients)]) as fleet:
        try:
            status, details = job(fleet, config, options.resume)
        except KeyboardInterrupt:
            print("interrupted: ending all processes", file=sys.stderr)
            return 130
        except FleetError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"{status} {details}; logs: {fleet.folder / 'logs'}")
    if status != "finished:completed":
        return 1
    for stage, seconds in stage_seconds(fleet.folder / "run").items():
        print(f"stage {stage:10s} {seconds:6.1f} s (median)")
    return 0


def stage_seconds(run: Path) -> dict[str, float]:
    """The median over a run's rounds of what each stage took."""
    seconds: dict[str, list[float]] = {}
    for row in RunFolder.open(run).metrics():
        for stage, cost in row["stages"].items():
            seconds.setdefault(stage, []).append(cost["seconds"])
    return {stage: statistics.median(values) for stage, values in seconds.items()}


def job(fleet: Fleet, config: TrainConfig, resume: bool = False, show: bool = True) -> tuple[str, str]:
    """A whole deployment and one run on it. Returns the run's status and what is said of it."""
    start(fleet, config)
    return fleet.wait(fleet.submit(fleet.settings(config, resume=resume)), show=show)


def start(fleet: Fleet, config: TrainConfig) -> None:
    """Devices, SuperLink, nodes: everything up and listening."""
    fleet.devices(config)
    fleet.superlink()
    fleet.connect()
    fleet.register()
    fleet.superlink_executor()
    for name in fleet.names:
        fleet.node(name)
    for name in fleet.names:
        fleet.ready(name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Run a job on a Flower deployment of this machine.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="everything that is made stays there")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the job: TOML, as for baffle train")
    parser.add_argument("--resume", action="store_true", help="go on with FOLDER/run")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

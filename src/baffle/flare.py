"""The round engine on NVIDIA FLARE, by its Collab API: fixed sites, certified, a connection each.

The server's half is ``Training``, a site's is ``Site``. Both are part of this package, which every machine
has installed, and a job brings settings alone: sites need not, and by ``prepare`` do not, run code that a
server sends. What a site's device is, its own folder says (``local/baffle.toml``).

FLARE ends a job when one site's process dies, and starts nothing again on a site that comes back. So
``SiteLauncher``, in the site's own resources, starts the job's process again after a kill, its parent's too,
``SiteExecutor`` joins the running job, and the driver leaves out who does not answer and takes back who does.
"""

# FLARE has no types.
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import re
import secrets
import socket
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from baffle import events
from baffle.config import TrainConfig, read_toml
from baffle.device import relay
from baffle.endpoint import Endpoint
from baffle.errors import BaffleError, ConfigError, DataError, DeliveryError, MissingExtraError
from baffle.federation import Outcome, in_order

try:
    from nvflare.apis.event_type import EventType
    from nvflare.apis.fl_constant import FLContextKey
    from nvflare.apis.job_def import JobMetaKey
    from nvflare.apis.job_launcher_spec import JobHandleSpec, JobReturnCode
    from nvflare.apis.shareable import Shareable
    from nvflare.apis.signal import Signal
    from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
    from nvflare.collab import collab
    from nvflare.collab.api.app import ServerApp
    from nvflare.collab.api.exceptions import CollabCallError, RunAborted
    from nvflare.collab.runtime.defs import SETUP_TASK_NAME, SyncKey
    from nvflare.collab.runtime.executor import CollabExecutor
    from nvflare.fuel.f3.cellnet.fqcn import FQCN
except ImportError as error:  # pragma: no cover
    raise MissingExtraError("nvflare", "flare", "baffle.flare") from error

SETTINGS = "baffle.toml"  # in the folder local/ of a kit: what its machine keeps to itself
FEDERATION = "federation.toml"  # in a job: the settings of the training
_MARK = "baffle.running"  # in a job's folder at a site: its process was started, and has not ended by itself
_AGAIN = "BAFFLE_FLARE_AGAIN"  # in that process's environment: the job knows this site already
_MOST_STARTS = 20  # of one job's process at one site
_AS_LONG_AS_IT_TAKES = 1e6  # seconds
_log = logging.getLogger("baffle")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


# -- the server's half ------------------------------------------------------------------------------


class FlareDriver:
    """The sites of a job as clients, each by its name.

    ``sites`` are the proxies of Collab. A client is there once its device is; ``names`` waits up to
    ``patience`` seconds for ``least`` of them. While a reply is waited for, its site is asked every ``pulse``
    seconds whether it is there; where another process answers, or none in ``silence`` seconds, twice, it is
    gone, and left out until it can be asked. ``over`` says whether the job was aborted: what waits then ends
    with RunAborted.

    One thread for each request, and for each site that is looked out for.
    """

    def __init__(
        self,
        sites: Mapping[str, Any],
        *,
        least: int = 1,
        patience: float = 600.0,
        pulse: float = 2.0,
        silence: float = 5.0,
        over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._sites = dict(sorted(sites.items()))
        self._least, self._patience = min(least, len(self._sites)), patience
        self._pulse, self._silence, self._over = pulse, silence, over
        self._present = dict[str, str]()  # name: which of the site's processes
        self._change = threading.Condition()
        for name in self._sites:
            self._look_out(name)

    def names(self) -> Sequence[str]:
        until = time.monotonic() + self._patience
        with self._change:
            while len(self._present) < self._least and time.monotonic() < until:
                self._stop_if_over()
                self._change.wait(self._pulse)
            self._least = 1  # all were there once: from now on whoever is left will do
            return sorted(self._present)

    def ask(
        self, stage: str, requests: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Outcome]]:
        """All at once. Raises RunAborted if the job is."""
        return in_order(requests, self._arrivals(requests, deadline))

    def _arrivals(
        self, requests: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Outcome]]:
        heard: queue.SimpleQueue[tuple[str, Outcome | str]] = queue.SimpleQueue()
        seconds = _AS_LONG_AS_IT_TAKES if deadline is None else deadline
        asked = {name: self._present.get(name, "") for name in requests}
        for name, process in asked.items():
            _thread(self._exchange, name, requests[name], seconds, process, heard)
        silent, felt = dict.fromkeys(requests, 0), set[str]()  # no pulse so many times; being felt
        while silent:
            try:
                name, outcome = heard.get(timeout=self._pulse)
            except queue.Empty:
                self._stop_if_over()
                for name in silent.keys() - felt:
                    felt.add(name)
                    _thread(lambda name=name: heard.put((name, self._which(name))))
                continue
            if isinstance(outcome, str):
                felt.discard(name)
                if name not in silent:
                    continue
                silent[name] = 0 if outcome else silent[name] + 1
                if silent[name] < 2 and outcome in ("", asked[name]):
                    continue
                why = "its process is another now" if outcome else "nothing is heard of it any more"
                outcome = DeliveryError("gone", why)
            if name in silent:
                del silent[name]
                if isinstance(outcome, DeliveryError):
                    self._stop_if_over()  # which ends what waits
                    if outcome.reason == "gone":
                        self._leave_out(name, str(outcome))
                yield name, outcome

    def _exchange(self, name: str, envelope: bytes, seconds: float, process: str, heard: Any) -> None:
        outcome: Outcome
        try:
            reply = self._sites[name](timeout=seconds).exchange(envelope, seconds, process)
            outcome = reply if isinstance(reply, bytes) else DeliveryError("malformed", "a reply is bytes")
        except CollabCallError as error:
            # An error of the site's own comes as the name of its type, and text.
            late = error.cause_type == "TimeoutError"
            outcome = DeliveryError("late" if late else "gone", f"{error.cause_type}: {error.cause}")
        except RunAborted as error:
            outcome = DeliveryError("gone", str(error))
        except Exception as error:
            outcome = DeliveryError("gone", f"{type(error).__name__}: {error}")
        heard.put((name, outcome))

    def _which(self, name: str) -> str:
        """Which of the site's processes answers; none where no device can be asked."""
        try:
            return str(self._sites[name](timeout=self._silence).here())
        except Exception:  # whatever it is
            return ""

    def _leave_out(self, name: str, why: str) -> None:
        with self._change:
            self._present.pop(name, None)
        events.emit("client-gone", why, level="warning", client=name)
        self._look_out(name)

    def _look_out(self, name: str) -> None:
        def until_there() -> None:
            while not self._over():
                if process := self._which(name):
                    with self._change:
                        self._present[name] = process
                        self._change.notify_all()
                    return events.emit("client-came", "its device can be asked", client=name)
                time.sleep(self._pulse / 4)
            return None

        _thread(until_there)

    def _stop_if_over(self) -> None:
        if self._over():
            raise RunAborted("the job was aborted")


def _thread(run: Callable[..., None], *args: object) -> None:
    """Not of a pool, which a job would wait for: a call to a site that died ends with its deadline."""
    threading.Thread(target=run, args=args, daemon=True).start()


class Training:
    """The server's part of a job: trains in the run folder ``run``, or goes on where it is there already.

    Run folders lie where the server's own ``local/baffle.toml`` says (``runs``); the job brings the settings.
    """

    def __init__(self, run: str) -> None:
        if not _RUN.fullmatch(run):
            raise ConfigError(f"run {run!r}: a name of letters, digits, dots and dashes is needed")
        self._run = run

    @collab.main
    def main(self) -> None:
        from baffle import training

        context = collab.context
        workspace, job = collab.workspace, collab.fl_ctx.get_job_id()
        config = settings_of(Path(workspace.get_app_config_dir(job)) / FEDERATION)
        folder = _own_settings(Path(workspace.get_site_config_dir()), {"runs"})["runs"]
        sites = {proxy.name: proxy for proxy in collab.clients}
        driver = FlareDriver(sites, least=len(sites), over=context.is_aborted)
        path = folder / self._run
        if path.exists():
            training.resume(path, _report, driver=driver, stop=context.is_aborted)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            training.train(config, path, _report, driver=driver, stop=context.is_aborted)


def _report(progress: Any) -> None:
    if progress.evaluated:
        accuracy = "" if progress.accuracy is None else f", accuracy {100 * progress.accuracy:.1f} %"
        events.emit("progress", f"round {progress.round} of {progress.rounds}{accuracy}")


def settings_of(path: Path) -> TrainConfig:
    """The settings in a TOML file, with the keys of ``baffle train``. Raises ConfigError."""
    return TrainConfig.resolve(read_toml(path))


# -- a site's half ----------------------------------------------------------------------------------


class Site:
    """A site's part of a job: brings envelopes to its device, and replies back.

    ``local/baffle.toml`` says where that is: the ``socket`` of a ``baffle device`` on this machine, or a
    ``config``, with ``identity`` and ``ledger`` for secure sums, for a client that lives in this process. It
    has the site's name.
    """

    def __init__(self) -> None:
        self._process = secrets.token_hex(8)  # a request is for the process that was there, not for the next
        self._device: Device | None = None
        self._why = "the device is not ready yet"

    @collab.init
    def start(self) -> None:
        _thread(self._build, collab.site_name, Path(collab.workspace.get_site_config_dir()))

    def _build(self, name: str, local: Path) -> None:
        """Beside the job's start, which waits a minute: a data set may take longer."""
        try:
            given = _own_settings(local, {"socket", "config", "identity", "ledger"})
            self._device = _Socket(given["socket"]) if "socket" in given else _Within(name, given)
        except Exception as error:
            self._why = "the device could not be made: the site's log says why"
            events.emit("failed", f"{type(error).__name__}: {error}", level="error", client=name)

    @collab.publish
    def exchange(self, envelope: bytes, seconds: float, process: str) -> bytes:
        """The device's reply. Raises TimeoutError after ``seconds``, ConnectionError where no device is.

        Raises PermissionError for any but the server: Collab lets the sites of a job call each other.
        """
        if collab.caller != "server":
            raise PermissionError("only the server asks a device")
        if self._device is None:
            raise ConnectionError(self._why)
        if process != self._process:
            raise ConnectionError("its process is another now")
        try:
            return self._device.handle(envelope, seconds)
        except DeliveryError as error:
            _log.warning("%s", error)  # it names paths, which are not the server's to know
            kind, text = _TOLD.get(error.reason, (ConnectionError, "no device replies"))
            raise kind(text) from None

    @collab.publish
    def here(self) -> str:
        """This process's mark, where its device could be asked now; it may be busy. No text otherwise."""
        return self._process if self._device is not None and self._device.is_there() else ""


_TOLD = {"late": (TimeoutError, "the device did not reply in time")}


class Device:
    """What a site brings envelopes to: a client that is always there."""

    def handle(self, envelope: bytes, seconds: float) -> bytes:
        raise NotImplementedError

    def is_there(self) -> bool:
        return True


class _Socket(Device):
    """A ``baffle device``: data, keys and state in a process that FLARE has nothing to do with."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def handle(self, envelope: bytes, seconds: float) -> bytes:
        return relay(self._path, envelope, seconds)

    def is_there(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self._path)) == 0


class _Within(Device):
    """A client in this process: what it holds in memory goes when FLARE's process does."""

    def __init__(self, name: str, given: Mapping[str, Path]) -> None:
        from baffle.job import build_client

        if "config" not in given:
            raise ConfigError(f"{SETTINGS}: socket or config is needed")
        config = settings_of(given["config"])
        if config.secure:
            from baffle.identities import read_identity
            from baffle.secure import FileLedger

            if not {"identity", "ledger"} <= given.keys():
                raise ConfigError(f"{SETTINGS}: secure sums need identity and ledger")
            identity, ledger = read_identity(given["identity"]), FileLedger(given["ledger"])
            client = build_client(config, name, identity=identity, ledger=ledger)
        else:
            client = build_client(config, name)
        self._endpoint, self._free = Endpoint(client), threading.Lock()

    def handle(self, envelope: bytes, seconds: float) -> bytes:
        if not self._free.acquire(timeout=seconds):  # one thing at a time
            raise DeliveryError("late", "the device is still at an earlier request")
        try:
            return self._endpoint.handle(envelope)
        finally:
            self._free.release()


def _own_settings(local: Path, known: set[str]) -> dict[str, Path]:
    """The paths of a machine's ``baffle.toml``, relative ones from where it lies."""
    path = local / SETTINGS
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not given or not given.keys() <= known or not all(isinstance(v, str) for v in given.values()):
        raise ConfigError(f"{path}: paths are expected, of {', '.join(sorted(known))}")
    return {name: local / value for name, value in given.items()}


class SiteExecutor(CollabExecutor):
    """Collab's executor, which can also be started while its job runs.

    A job introduces itself to its sites once, when it begins. A process that is started later knows all that
    is in that introduction: this class is at both ends.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_event_handler(EventType.START_RUN, self._join)  # after Collab's own

    def _join(self, event_type: str, context: Any) -> None:
        if os.environ.pop(_AGAIN, None) is None or self.client_app is None:
            return
        clients = context.get_prop(FLContextKey.JOB_META)[JobMetaKey.JOB_CLIENTS.value]
        own = self.client_app.get_collab_interface()
        introduction = Shareable()
        introduction[SyncKey.COLLAB_INTERFACE] = ServerApp(Training("a")).get_collab_interface()
        introduction[SyncKey.CLIENT_INTERFACES] = {client["name"]: own for client in clients}
        introduction[SyncKey.SERVER_FQCN] = FQCN.join([FQCN.ROOT_SERVER, context.get_job_id()])
        self.execute(SETUP_TASK_NAME, introduction, context, Signal())


class SiteLauncher(ClientProcessJobLauncher):
    """Starts a job's process, and starts it again after a kill: its own, or that of the site.

    For the site's own resources, in place of FLARE's. A process that is killed is no failure of the job; one
    that ends by itself, or that FLARE ends, stays ended.
    """

    _starting = threading.Lock()

    def launch_job(self, job_meta: Any, fl_ctx: Any) -> Any:
        job = job_meta[JobMetaKey.JOB_ID.value]
        mark = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_run_dir(job)) / _MARK
        starts = _starts(mark)
        with self._starting:  # the environment is the process's
            if starts:
                os.environ[_AGAIN] = "1"
            try:
                handle = super().launch_job(job_meta, fl_ctx)
            finally:
                os.environ.pop(_AGAIN, None)
        mark.write_text(str(starts + 1))
        return _Kept(handle, mark)

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == EventType.AFTER_CLIENT_HEARTBEAT:
            self._start_again(fl_ctx)

    def _start_again(self, fl_ctx: Any) -> None:
        """What was running and is not. Whether its job still is, the server says at the next heartbeat."""
        engine, workspace = fl_ctx.get_engine(), fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        running = set(engine.get_all_job_ids())
        for mark in Path(workspace.get_root_dir()).glob(f"*/{_MARK}"):
            job = mark.parent.name
            if job not in running and _starts(mark) < _MOST_STARTS:
                self.logger.warning(f"job {job}: its process was killed, and is started again")
                meta = json.loads(Path(workspace.get_job_meta_path(job)).read_text())
                engine.start_app(job, meta)


def _starts(mark: Path) -> int:
    """How often a job's process was started. The file may be cut short: once, then."""
    try:
        return int(mark.read_text() or "1")
    except FileNotFoundError:
        return 0
    except ValueError:
        return 1


class _Kept(JobHandleSpec):
    """A process's handle that tells a kill from an end."""

    def __init__(self, handle: Any, mark: Path) -> None:
        self._handle, self._mark = handle, mark

    def terminate(self, *args: Any, **kwargs: Any) -> None:
        self._mark.unlink(missing_ok=True)
        self._handle.terminate()

    def poll(self) -> Any:
        return JobReturnCode.UNKNOWN if self._was_killed() else self._handle.poll()

    def wait(self) -> None:
        self._handle.wait()
        if not self._was_killed():
            self._mark.unlink(missing_ok=True)

    def _was_killed(self) -> bool:
        code = self._handle.adapter.poll()
        return code is not None and code < 0 and self._mark.exists()


# -- jobs and kits ----------------------------------------------------------------------------------


def write_job(folder: Path, settings: Path, run: str) -> Path:
    """A job for ``nvflare job submit`` in ``folder``, which must not be there. Returns it.

    It holds the settings and the names of this module's classes: no code. ``run`` names the run folder on the
    server; a job whose run is there already goes on with it. Raises ConfigError for settings that cannot be.
    """
    settings_of(settings)
    Training(run)
    server = {
        "format_version": 2,
        "workflows": [
            {
                "id": "controller",
                "path": "nvflare.collab.runtime.controller.CollabController",
                "args": {"server_obj_id": "training"},
            }
        ],
        "components": [{"id": "training", "path": "baffle.flare.Training", "args": {"run": run}}],
    }
    executor = {"path": "baffle.flare.SiteExecutor", "args": {"client_obj_id": "site"}}
    client = {
        "format_version": 2,
        "executors": [{"tasks": ["*"], "executor": executor}],
        "components": [{"id": "site", "path": "baffle.flare.Site", "args": {}}],
    }
    # One site is enough: FLARE ends a job in which fewer are left.
    meta = {"name": run, "min_clients": 1, "resource_spec": {}, "deploy_map": {"app": ["@ALL"]}}
    config = folder / "app" / "config"
    try:
        config.mkdir(parents=True)
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
        (config / "config_fed_server.json").write_text(json.dumps(server, indent=1))
        (config / "config_fed_client.json").write_text(json.dumps(client, indent=1))
        (config / FEDERATION).write_bytes(settings.read_bytes())
    except OSError as error:
        raise DataError(f"cannot write the job {folder}: {error.strerror}") from error
    return folder


def prepare(kit: Path, own: Mapping[str, str]) -> None:
    """Writes ``local/`` of a start-up kit that ``nvflare provision`` made: a server's, or a site's.

    ``own`` goes into ``baffle.toml``. For a job, the kit's machine then runs classes of this module and of
    FLARE's Collab runtime, and no code that comes with it; logs stay where they are, and administrators read
    no files of its; what a server stores is in its kit. Raises DataError for a folder that is no kit.
    """
    local = kit / "local"
    try:
        resources = json.loads((local / "resources.json.default").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{kit} is no start-up kit: {error}") from error
    resources["class_allow_list"] = ["nvflare.collab.runtime.", "baffle.flare."]
    resources["components"] = [
        part for part in resources["components"] if part["id"] not in ("site_log_streamer", "log_receiver")
    ]
    if "client" in resources:
        resources["allow_log_streaming"] = False
        for part in resources["components"]:
            if part["id"] == "process_launcher":
                part["path"] = "baffle.flare.SiteLauncher"
    text = json.dumps(resources, indent=1).replace('"/tmp/nvflare/', f'"{kit.resolve()}/store/')
    rights = json.loads((local / "authorization.json.default").read_text())
    for role, granted in rights["permissions"].items():
        each = dict.fromkeys(_RIGHTS, "any") if granted == "any" else granted
        rights["permissions"][role] = each | dict.fromkeys(_NOBODYS, "none")
    (local / "resources.json").write_text(text)
    (local / "authorization.json").write_text(json.dumps(rights, indent=1))
    (local / SETTINGS).write_text(
        "".join(f"{name} = {json.dumps(path, ensure_ascii=False)}\n" for name, path in own.items()), "utf-8"
    )


_OWN = ("runs", "socket", "config", "identity", "ledger")
_RIGHTS = ("submit_job", "clone_job", "manage_job", "download_job", "view", "operate")
_NOBODYS = ("byoc", "shell_commands", "server-predeployed-flwr")  # code in jobs; ls, cat and the like


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m baffle.flare``: ``prepare`` and ``write_job`` for a shell."""
    top = argparse.ArgumentParser(prog="python -m baffle.flare", description="FLARE kits and jobs")
    commands = top.add_subparsers(dest="command", required=True)
    kit = commands.add_parser(
        "kit", help="make a start-up kit ready for its machine: a server's, or a site's"
    )
    kit.add_argument("kit", type=Path, help="the folder that nvflare provision made")
    kit.add_argument("--runs", help="server: folder of run folders")
    kit.add_argument("--socket", help="site: where baffle device listens")
    kit.add_argument("--config", help="site without one: settings, for a client in FLARE's process")
    kit.add_argument("--identity", help="with --config, for secure sums: its key")
    kit.add_argument("--ledger", help="with --config, for secure sums: what it answered")
    job = commands.add_parser("job", help="write a job for nvflare job submit")
    job.add_argument("folder", type=Path, help="where; must not be there")
    job.add_argument("--config", type=Path, required=True, help="TOML file of settings, as of baffle train")
    job.add_argument("--run", required=True, help="name of the run folder on the server")
    given = top.parse_args(arguments)
    try:
        if given.command == "job":
            print(write_job(given.folder, given.config, given.run))
        else:
            own = {key: str(Path(path).resolve()) for key in _OWN if (path := getattr(given, key))}
            prepare(given.kit, own)
            print(given.kit / "local" / SETTINGS)
    except BaffleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

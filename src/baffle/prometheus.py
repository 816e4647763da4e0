"""A run's figures for Prometheus, over HTTP, from what its folder says."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from baffle.errors import ConfigError, MissingExtraError
from baffle.watch import View, Watch

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_LOOPBACK = "127.0.0.1"


def address(text: str) -> tuple[str, int]:
    """HOST:PORT, [IPV6]:PORT, :PORT or PORT; without a host, this machine alone. Raises ConfigError."""
    found = re.fullmatch(r"(?:(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]]*)):)?([0-9]{1,5})", text, re.ASCII)
    if found is None or int(found[3]) > 65535:
        raise ConfigError(f"serve = {text!r}: HOST:PORT is needed, as 127.0.0.1:9464, or a port alone")
    return found[1] or found[2] or _LOOPBACK, int(found[3])


@contextlib.contextmanager
def serving(watch: Watch, host: str, port: int) -> Iterator[str]:
    """Answers scrapes meanwhile, on threads of its own, and yields the address; port 0 is one that is free.

    A scrape reads what was added to the folder since the last. Nobody is asked who they are: whoever reaches
    the port sees the figures, which hold no name of a client. Raises MissingExtraError without the package,
    ConfigError where the address cannot be listened at.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise MissingExtraError("prometheus_client", "prometheus", "--serve") from error

    class Collector:
        def collect(self) -> Iterator[Metric]:
            return metrics(watch.look())

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror}") from error
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def metrics(view: View) -> Iterator[Metric]:
    """What a scrape gets. A figure that the run does not have is left out."""
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        SummaryMetricFamily,
    )

    gauges: list[tuple[str, str, float | None]] = [
        ("baffle_round", "Rounds done.", view.done),
        ("baffle_rounds", "Rounds asked for.", view.rounds),
        ("baffle_epsilon", "Privacy spent so far, at the delta of the run.", view.epsilon),
        ("baffle_last_round_timestamp_seconds", "When the last round was written.", view.written),
    ]
    if view.last is not None:
        gauges += [
            ("baffle_participants", "Clients asked in the last round.", view.last.asked),
            ("baffle_answered", "Clients in the sum of the last round.", view.last.answered),
            ("baffle_loss", "Mean loss of the clients in the last round.", view.last.loss),
        ]
    if view.looks:
        gauges += [
            ("baffle_accuracy", "Test accuracy at the last look.", view.looks[-1].accuracy),
            ("baffle_ema_accuracy", "The same of the averaged weights.", view.looks[-1].ema_accuracy),
        ]
    for name, text, value in gauges:
        if value is not None and not math.isnan(value):
            yield GaugeMetricFamily(name, text, value=value)
    yield CounterMetricFamily("baffle_aborted", "Rounds that ended without a sum.", value=view.aborted)
    traffic = CounterMetricFamily("baffle_bytes", "Bytes of all messages.", labels=["direction"])
    traffic.add_metric(["down"], view.bytes_down)
    traffic.add_metric(["up"], view.bytes_up)
    yield traffic
    text = "Clients that did not answer a stage."
    dropouts = CounterMetricFamily("baffle_dropouts", text, labels=["stage", "reason"])
    for (stage, reason), count in sorted(view.dropouts.items()):
        dropouts.add_metric([stage, reason], count)
    yield dropouts
    stages = SummaryMetricFamily("baffle_stage_seconds", "Duration of each exchange.", labels=["stage"])
    for stage, (count, seconds) in view.stage_seconds.items():
        stages.add_metric([stage], count_value=count, sum_value=seconds)
    yield stages

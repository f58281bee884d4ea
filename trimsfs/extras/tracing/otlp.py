"""Sends traces to an OpenTelemetry receiver by OTLP over HTTP. The only home of opentelemetry, which is an extra."""

import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from trimsfs import __version__
from trimsfs.errors import ConfigurationError, TrimsError

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExportResult
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags
except ModuleNotFoundError as error:
    raise ConfigurationError(
        f"--otlp: the package of {error.name} is missing: pip install 'trimsfs[otel]'; beside the Debian package, "
        "into a virtual environment of its own, whose trimsfs traces the same mounts"
    ) from None

TRACES_PATH = "/v1/traces"
_REFUSED = "Connection refused"
_SCOPE = InstrumentationScope("trimsfs", __version__)


class Sender:
    """Sends to an endpoint, as ``http://127.0.0.1:4318``; OTEL_EXPORTER_OTLP_* variables give headers, certificates and
    timeouts. Raises ConfigurationError for an endpoint that is none."""

    def __init__(self, endpoint: str) -> None:
        url = urlsplit(endpoint)
        if url.scheme not in {"http", "https"} or not url.netloc:
            raise ConfigurationError(f"--otlp {endpoint}: not a URL, as http://127.0.0.1:4318")
        self._endpoint = endpoint.rstrip("/") + ("" if url.path.strip("/") else TRACES_PATH)
        self._exporter = OTLPSpanExporter(endpoint=self._endpoint)
        self._problems = _Problems()
        logging.getLogger("opentelemetry").addHandler(self._problems)

    def send(self, traces: Sequence[dict[str, Any]]) -> None:
        """Send traces, as `.trims/traces` has them, with the ``mountpoint`` of each. Raises TrimsError."""
        self._problems.first = None
        spans = [span for trace in traces for span in _spans(trace)]
        if spans and self._exporter.export(spans) is not SpanExportResult.SUCCESS:
            raise TrimsError(f"{self._endpoint}: {len(traces)} traces not sent: {self._problems.first}")


class _Problems(logging.Handler):
    """Remembers the first message of the exporter, which logs why it fails and does not tell its caller."""

    first: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self.first = self.first or (f"{_REFUSED}: does a receiver listen there?" if _REFUSED in message else message)


def _spans(trace: dict[str, Any]) -> Iterator[ReadableSpan]:
    """The spans of a trace: the open, below it what it waited for, and below requests their parts."""
    resource = Resource({"service.name": "trimsfs", "trimsfs.mountpoint": trace["mountpoint"]})

    def span(parent: SpanContext | None, record: dict[str, Any], error: str | None = None) -> ReadableSpan:
        began_ns = int((trace["began"] + record["start"]) * 1e9)
        return ReadableSpan(
            record["name"],
            context=SpanContext(
                trace_id=int(trace["id"], 16),
                span_id=random.getrandbits(64) or 1,
                is_remote=False,
                trace_flags=TraceFlags(TraceFlags.SAMPLED),
            ),
            parent=parent,
            resource=resource,
            attributes={f"trimsfs.{name}": value for name, value in record.get("facts", {}).items()},
            start_time=began_ns,
            end_time=began_ns + int(record["duration"] * 1e9),
            status=Status(StatusCode.ERROR, error) if error else Status(StatusCode.UNSET),
            instrumentation_scope=_SCOPE,
        )

    facts = {name: trace[name] for name in ("path", "why", "size", "thread")}
    opened = {"name": "cold open", "start": 0.0, "duration": trace["duration"], "facts": facts}
    whole = span(None, opened, trace["error"])
    yield whole
    for record in trace["spans"]:
        child = span(whole.context, record, record.get("facts", {}).get("error"))
        yield child
        for part in record.get("parts", ()):
            yield span(child.context, part)

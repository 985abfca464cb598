"""What Prometheus reads of the gateway."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The counters of one gateway. Labels hold only what the gateway itself names: routes, codes of
    errors, outputs of the server.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "gateway_requests", "Requests answered.", ("route", "status"), registry=registry
        )
        self.errors = Counter(
            "gateway_errors",
            "Requests answered with an error, by its code; `client_gone`: nobody waited.",
            ("code",),
            registry=registry,
        )
        self.seconds = Histogram(
            "gateway_request_seconds",
            "From a request's headers to the end of its answer.",
            ("route",),
            registry=registry,
            buckets=_SECONDS,
        )
        self.server_seconds = Histogram(
            "gateway_server_seconds",
            "What the server behind the gateway took of it.",
            registry=registry,
            buckets=_SECONDS,
        )
        self.inputs = Counter(
            "gateway_inputs", "Embedded inputs.", ("model", "kind"), registry=registry
        )
        self.in_hand = Gauge("gateway_requests_in_hand", "Requests under way.", registry=registry)
        self.bytes = Gauge(
            "gateway_bytes_in_hand", "Bytes reserved for their bodies.", registry=registry
        )
        self.ready = Gauge(
            "gateway_server_ready", "1 while the server behind answers.", registry=registry
        )

    def exposed(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type: OpenMetrics, or the older text format for readers that
        take only that.
        """
        if "text/plain" in accept and "openmetrics" not in accept:
            return generate_latest(self.registry), "text/plain; version=0.0.4; charset=utf-8"
        return openmetrics.generate_latest(self.registry), openmetrics.CONTENT_TYPE_LATEST

"""`python -m serve.status`: requests, latencies and failures of every model of a running server,
from Triton's statistics and metrics.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status, first_line, printable
from contract.tables import print_table
from serve.client.served import FRONT_DOOR
from serve.errors import ServerError
from serve.server.rest import Refused, Rest

if TYPE_CHECKING:
    from serve.repository.state import GoldenState

EPILOG = """\
examples:
  python -m serve.status
  python -m serve.status --repository repository
  python -m serve.status --url 10.0.0.5:8000 --metrics 10.0.0.5:8002
  watch -n 2 python -m serve.status

--repository also shows restarts, versions that did not load, and how the
bundle's golden pictures were answered at the last start.

Where one model holds a student's graphs, rows features/GRAPH show how often
each was executed.

Columns, counted since a version was loaded and including the supervisor's own
test requests:
  requests        answered requests; those of an ensemble's steps have rows
                  of their own
  batch           pictures per execution
  queue, compute  milliseconds: median of the last minute, or with ~ the mean
                  since the version was loaded
  failed          a request that a step refused counts for the ensemble; Triton
                  does not count those that a python model refused, nor requests
                  of a wrong type or shape

Exit status: 0 the server is ready, 1 it is not, 2 usage error.
"""

GRAPHS = "student_graph_executions"
"""Metric of the executions of graphs that one model holds (triton_models/student)."""
_SAMPLE = re.compile(r"^(?P<name>\w+)\{(?P<labels>[^}]*)\} (?P<value>\S+)")
LABEL = re.compile(r'(\w+)="([^"]*)"')
COLUMNS = (
    "model",
    "version",
    "state",
    "instances",
    "requests",
    "executions",
    "batch",
    "queue",
    "compute",
    "failed",
    "cached",
    "restarts",
)

_Metrics = dict[tuple[str, str, str, str], float]
"""Value by metric, model, version and quantile or graph ("" if it has none)."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandLine(
        prog="python -m serve.status",
        description="Show requests, latencies and failures of a running server's models.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--url", metavar="HOST:PORT", help="HTTP, not gRPC (default: 127.0.0.1:8000)"
    )
    parser.add_argument(
        "--metrics", metavar="HOST:PORT", help="metrics (default: the same host, port 8002)"
    )
    parser.add_argument(
        "--repository",
        type=Path,
        metavar="DIR",
        help="of serve.run: holds the server's address and key",
    )
    parser.add_argument(
        "--json", dest="as_json", action="store_true", help="print JSON instead of a table"
    )
    args = parser.parse_args(arguments)
    return exit_status(lambda: _run(**vars(args)))


def _run(url: str | None, metrics: str | None, repository: Path | None, as_json: bool) -> int:
    from serve.repository.state import read_state

    state = None
    if repository:
        if url or metrics:
            raise UserError("--repository already names the server: leave out --url and --metrics")
        state = read_state(repository)
        if state is None:
            raise UserError(
                f"--repository {repository}: no server runs on it (start one: python -m serve.run)"
            )
    url = state.http if state else address(url or "127.0.0.1:8000", "--url")
    metrics = metrics or f"{url.rpartition(':')[0]}:8002"
    source = Rest(state.metrics if state else address(metrics, "--metrics"))
    rest = Rest(url, state.admin_key if state else "")
    try:
        rows = _collect(rest, _read_metrics(source), dict(state.restarts) if state else None)
    except (OSError, Refused) as error:
        raise ServerError(
            f"no Triton answers over HTTP at {url} ({error}): start one with python "
            "-m serve.run, or name another with --url"
        ) from error
    if as_json:
        golden = state.golden.model_dump(mode="json") if state and state.golden else None
        print(json.dumps({"ready": rest.ready(), "golden": golden, "models": rows}, indent=1))
    else:
        _show(rows)
        if state and state.golden:
            _show_golden(state.golden, rows)
        if state and state.server_restarts:
            print(f"tritonserver was restarted {state.server_restarts} times")
    return 0 if rest.ready() and all(row["state"] == "READY" for row in rows) else 1


def address(text: str, option: str) -> str:
    """HOST:PORT of an address; raises UserError for anything else."""
    result = text.removeprefix("http://").rstrip("/").removesuffix("/metrics")
    host, _, port = result.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{option} {text}: write HOST:PORT (127.0.0.1:8000)")
    return result


def _collect(
    rest: Rest, metrics: _Metrics, restarts: dict[str, int] | None
) -> list[dict[str, Any]]:
    """A row for every version; `restarts` None: not known. With the key, versions that are not
    loaded have rows too.
    """
    rows = []
    for entry in rest.statistics():
        model, version, counts = entry["name"], entry["version"], entry["inference_stats"]
        config = rest.config(model, version)
        groups = config.get("instance_group", ())
        number = {name: int(counts[name]["count"]) for name in ("success", "fail", "cache_hit")}
        executions = int(entry.get("execution_count", 0))
        rows.append(
            {
                "model": model,
                "version": version,
                "state": "READY" if rest.model_ready(model, version) else "NOT READY",
                "instances": sum(group["count"] * max(1, len(group["gpus"])) for group in groups),
                "requests": number["success"],
                "executions": executions,
                "batch": int(entry.get("inference_count", 0)) / executions if executions else None,
                "queue": latency(
                    counts["queue"],
                    metrics.get(("nv_inference_queue_summary_us", model, version, "0.5")),
                ),
                "compute": latency(
                    counts["compute_infer"],
                    metrics.get(("nv_inference_compute_infer_summary_us", model, version, "0.5")),
                ),
                "failed": number["fail"],
                "cached": number["cache_hit"],
                "restarts": None if restarts is None else restarts.get(model, 0),
            }
        )
        if view := _view(config):
            rows[-1]["view"] = view
        for (metric, *of, graph), count in sorted(metrics.items()):
            if metric == GRAPHS and of == [model, version]:
                row = {"model": f"{model}/{graph}", "version": version, "executions": int(count)}
                rows.append(dict.fromkeys(COLUMNS) | {"state": rows[-1]["state"]} | row)
    return rows + (_not_loaded(rest, rows) if rest.key else [])


def _view(config: dict[str, Any]) -> str:
    """How the bundle behind the front door is shown pictures (contract/views.py); "" for others."""
    try:
        about = json.loads(config["parameters"]["about"]["string_value"])
        return str(about["view"]) if config["name"] == FRONT_DOOR else ""
    except (KeyError, TypeError, ValueError):
        return ""


def _not_loaded(rest: Rest, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for versions that failed to load; versions that were unloaded normally are left out."""
    known, result = {(row["model"], row["version"]) for row in rows}, []
    for entry in rest.index():
        key, reason = (entry["name"], entry.get("version", "")), entry.get("reason", "")
        if (
            key not in known
            and entry.get("state") == "UNAVAILABLE"
            and reason not in ("", "unloaded")
        ):
            row = dict.fromkeys(COLUMNS) | {
                "model": key[0],
                "version": key[1],
                "state": "UNAVAILABLE",
                "reason": reason,
            }
            result.append(row)
    return result


def latency(duration: dict[str, Any], median_us: float | None) -> dict[str, Any] | None:
    """Milliseconds: Triton's median where it has one (it forgets after a minute), else the mean of
    all requests.
    """
    if median_us is not None and median_us == median_us:  # NaN: nothing in the last minute
        return {"milliseconds": median_us / 1e3, "is": "median"}
    count = int(duration.get("count", 0))
    return (
        {"milliseconds": int(duration.get("ns", 0)) / count / 1e6, "is": "mean"} if count else None
    )


def _read_metrics(metrics: Rest) -> _Metrics:
    """Prometheus' text as numbers; empty where the port is not reachable, since the
    statistics suffice.
    """
    try:
        text = metrics.call("GET", "/metrics").decode()
    except (OSError, Refused):
        return {}
    result: _Metrics = {}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample:
            labels = dict(LABEL.findall(sample["labels"]))
            key = (
                sample["name"],
                labels.get("model", ""),
                labels.get("version", ""),
                labels.get("quantile") or labels.get("graph", ""),
            )
            result[key] = float(sample["value"])
    return result


def _show(rows: list[dict[str, Any]]) -> None:
    """Print a row for each model and version, then why some are not loaded."""
    print_table(COLUMNS, [[shown(row[name]) for name in COLUMNS] for row in rows], left=("state",))
    for row in rows:
        if row.get("view"):
            print(f"view of {row['model']} version {row['version']}: {row['view']}")
        if row.get("reason"):
            print(
                f"{row['model']} version {row['version']} did not load: "
                f"{printable(first_line(row['reason']))}"
            )


_OUTCOMES = {
    "passed": "answered within their bounds",
    "conspicuous": "answered within their bounds, but conspicuous",
    "outside": "OUTSIDE THEIR BOUNDS, served all the same (--golden warn)",
    "skipped": "not asked (--golden skip)",
    "missing": "there are none in this repository",
}


def _show_golden(golden: "GoldenState", rows: Iterable[dict[str, Any]]) -> None:
    """Print how the golden pictures were answered at the last start, and by what."""
    runtime = f" ({printable(golden.runtime)})" if golden.runtime else ""
    print(f"golden pictures: {_OUTCOMES[golden.outcome]}{runtime}")
    for message in golden.messages:
        print(f"  {printable(message)}")
    versions = [row["version"] for row in rows if row["model"] == "features"]
    serving = max((int(version) for version in versions if version.isdecimal()), default=0)
    if golden.version and serving and serving != golden.version:
        print(f"  of version {golden.version}; version {serving} was checked by its rollout")


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{'~' if value['is'] == 'mean' else ''}{value['milliseconds']:.2f}"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())

"""Where embeddings come from: a bundle's graphs in this process, or a running server."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from contract.errors import Failure, UserError, first_line, one_line
from contract.manifest import GraphRecord
from contract.signature import IMAGE
from contract.views import SQUASH, ViewPolicy
from serve.bundle import Bundle
from serve.errors import NotAllowed, NotFinite, Unavailable, with_remedy

Arrays = dict[str, np.ndarray]
"""Outputs by name, a row a picture."""


@dataclass(frozen=True)
class Source:
    """How features are made; either of `bundle` and `url` is set."""

    outputs: tuple[str, ...]
    bundle: Path | None = None
    trust: tuple[Path, ...] = ()
    """Public keys of which one must have signed the bundle, where any are given."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    runtime: str = "auto"
    threads: int = 1
    """CPU threads of the graphs."""
    url: str | None = None
    client: tuple[tuple[str, object], ...] = ()
    """Keyword arguments of the client."""
    concurrency: int = 4
    """Batches at a server at once."""
    batch: int | None = None
    size: tuple[int, int] | None = None
    view: str | None = None
    """In place of the bundle's."""


class Features(Protocol):
    """A source of features that is open: for pictures of one `size` (height, width)."""

    bundle: str
    """Version of the bundle, the same of its folder and of a server."""
    size: tuple[int, int]
    view: ViewPolicy
    """How pictures are brought to that size."""
    batch: int
    at_once: int
    """Batches that may be submitted before the first is awaited."""
    shapes: dict[str, tuple[int, ...]]
    """Of each output, of one picture."""
    about: str

    def submit(self, pixels: np.ndarray) -> Future[Arrays]:
        """Outputs of pictures uint8 [B, height, width, 3]."""
        ...

    def check(self) -> None:
        """Raise Failure if the bundle is another by now."""
        ...

    def close(self) -> None: ...


def open_features(source: Source) -> Features:
    """Open a source and run it once; raises UserError for what does not fit it."""
    return BundleFeatures(source) if source.bundle else ServerFeatures(source)


_BATCH = 32


class BundleFeatures:
    """A bundle's graphs in OpenVINO or onnxruntime, only those that the outputs need."""

    def __init__(self, source: Source) -> None:
        from contract.signing import PublicKey
        from serve.bundle import read_bundle

        bundle = read_bundle(source.bundle, [PublicKey(path) for path in source.trust])
        if bundle.problem:
            raise UserError(
                f"{bundle.path} is not what its manifest says: {bundle.problem[:500]} (export "
                "again, or get it from where it was exported)"
            )
        self.bundle, self.at_once = bundle.version, 2
        self._outputs = source.outputs
        _check_outputs(source.outputs, [tensor.name for tensor in bundle.outputs], bundle.path)
        self.size = _bundle_size(bundle, source.size)
        mean = bundle.manifest.preprocessing.mean
        self.view = _one_view(source.view or bundle.manifest.view).on(mean)
        most = bundle.manifest.max_batch
        if source.batch and source.batch > most:
            raise UserError(
                f"--batch {source.batch}: the bundle was checked up to {most} (export with "
                f"--max-batch {source.batch})"
            )
        self.batch = source.batch or min(most, _BATCH)
        self._graphs, self.about = _open_graphs(
            bundle, needed_graphs(bundle, source.outputs), source
        )
        self._pool = ThreadPoolExecutor(1, "graph")
        self.shapes = _shapes(self, source.outputs)

    def submit(self, pixels: np.ndarray) -> Future[Arrays]:
        return self._pool.submit(self._run, pixels)

    def _run(self, pixels: np.ndarray) -> Arrays:
        values = {IMAGE: pixels}
        for graph, call in self._graphs:
            try:
                results = call([values[tensor.name] for tensor in graph.inputs])
            except Exception as error:  # runtimes' errors have no common class
                if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
                    raise
                reason = one_line([first_line(error)])
                raise Failure(f"graph '{graph.name}' failed: {reason}") from error
            names = (tensor.name for tensor in graph.outputs)
            values |= zip(names, results, strict=True)
        return {name: values[name] for name in self._outputs}

    def check(self) -> None:
        """The graphs that are open stay what they are."""

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def needed_graphs(bundle: Bundle, outputs: Sequence[str]) -> list[GraphRecord]:
    """The graphs that must run for some outputs, in order; `fused` is never among them."""
    wanted, result = set(outputs), []
    for graph in reversed(bundle.parts):
        if wanted & {tensor.name for tensor in graph.outputs}:
            result.insert(0, graph)
            wanted |= {tensor.name for tensor in graph.inputs}
    return result


def _open_graphs(bundle: Bundle, graphs: Sequence[GraphRecord], source: Source) -> tuple[list, str]:
    """Graphs with what calls each, and where they run, in words."""
    from contract.graph_call import open_graph, used_runtime
    from serve.repository.graph_files import graph_files
    from serve.repository.settings import choose_runtime

    gpu = source.device == "gpu" or (source.device == "auto" and _has_cuda())
    kind = "gpu" if gpu else "cpu"
    if source.runtime == "openvino" and source.device == "auto":
        gpu, kind = False, "cpu"
    runtime = bundle.manifest.runtime(choose_runtime(source.runtime, kind))
    opened = []
    for graph in graphs:
        files = [bundle.file(name) for name in graph_files(bundle, graph).values()]
        try:
            opened.append(
                (graph, open_graph(files[0], runtime, source.threads, 0 if gpu else None))
            )
        except Exception as error:
            raise UserError(
                f"{bundle.path}: graph '{graph.name}' does not load in {runtime}: "
                f"{one_line([first_line(error)])} (choose another --runtime or --device)"
            ) from error
    used = used_runtime(runtime)
    return opened, f"{used} on the GPU" if gpu else f"{used}, {source.threads} threads"


def _has_cuda() -> bool:
    """Whether there is a GPU and an onnxruntime that can use it."""
    import importlib.util

    from contract.gpu import compute_capabilities

    if not compute_capabilities() or importlib.util.find_spec("onnxruntime") is None:
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _bundle_size(bundle: Bundle, size: tuple[int, int] | None) -> tuple[int, int]:
    """The (height, width) of pictures: the server's rules, for a bundle."""
    resolution = bundle.manifest.resolution
    usual = resolution.height, resolution.width
    if size is None or size == usual:
        return usual
    if not resolution.dynamic:
        raise UserError(f"--size {_by(size)}: the bundle takes {_by(usual)} only, leave it out")
    least = resolution.min_height, resolution.min_width
    fits = all(a <= b <= c for a, b, c in zip(least, size, usual, strict=True))
    if not fits or any(side % resolution.stride for side in size):
        raise UserError(
            f"--size {_by(size)}: the bundle takes multiples of {resolution.stride}, from "
            f"{_by(least)} to {_by(usual)}"
        )
    return size


def _one_view(text: str) -> ViewPolicy:
    """A view policy that makes one view of a picture; raises UserError for another."""
    try:
        view = ViewPolicy.parse(text)
    except ValueError as error:
        raise UserError(f"--view: {error}") from error
    if view.kind == "tiles":
        raise UserError(
            f"view {view}: an embedding is of one view of a picture: add --view letterbox or "
            "centre-crop:0.875"
        )
    return view


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _check_outputs(outputs: Sequence[str], known: Sequence[str], where: object) -> None:
    for name in outputs:
        if name not in known:
            raise UserError(
                f"--outputs {name}: {where} has no such output; it has {', '.join(known)}"
            )


def _shapes(features: Features, outputs: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of outputs, seen in an answer about a black picture."""
    answer = features.submit(np.zeros((1, *features.size, 3), np.uint8)).result()
    for name in outputs:
        if answer[name].dtype.kind != "f":
            raise UserError(f"--outputs {name} is {answer[name].dtype}: choose outputs of floats")
    return {name: answer[name].shape[1:] for name in outputs}


class ServerFeatures:
    """A running server, through the asyncio client in a thread of its own: retries, deadlines and
    checks of answers are the client's.
    """

    def __init__(self, source: Source) -> None:
        from serve.client.aio import AsyncFeatureClient
        from serve.client.options import RequestOptions

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="client", daemon=True)
        self._thread.start()
        options = dict(source.client)
        self._client = AsyncFeatureClient(source.url, concurrency=source.concurrency, **options)
        self._url, self._outputs = source.url, source.outputs
        self.shapes: dict[str, tuple[int, ...]] = {}
        try:
            served = self._describe()
            _check_outputs(source.outputs, list(served.outputs), f"the server at {source.url}")
            self.bundle = self._version(served)
            self.size = served.inputs["image"].dims[-3:-1]
            if min(self.size) < 1:
                self.size = source.size or served.size()
            about = served.facts("about") or {}
            view = _one_view(source.view or about.get("view") or str(SQUASH))
            self.view = view.on(about["mean"]) if about.get("mean") else view
            if source.size not in (None, self.size) or not served.takes(self.size):
                size = source.size or self.size
                raise UserError(
                    f"--size {_by(size)}: the server does not take pictures of that size"
                )
            if source.batch and source.batch > served.max_batch:
                raise UserError(
                    f"--batch {source.batch}: the server takes at most {served.max_batch}"
                )
            self.batch = source.batch or min(served.max_batch, _BATCH)
            self.at_once = source.concurrency
            self.about = f"server {source.url}, {source.concurrency} requests at once"
            self._request = RequestOptions(size=self.size)
            self.shapes = _shapes(self, source.outputs)
        except (Unavailable, NotAllowed) as error:
            self.close()
            raise with_remedy(error, source.url) from error
        except BaseException:
            self.close()
            raise

    def submit(self, pixels: np.ndarray) -> Future[Arrays]:
        return asyncio.run_coroutine_threadsafe(self._ask(pixels), self._loop)

    async def _ask(self, pixels: np.ndarray) -> Arrays:
        try:
            return dict(await self._client.features(pixels, self._outputs, self._request))
        except NotFinite as error:
            if len(pixels) > 1:  # one of them makes an error of the whole batch
                singly = [await self._ask(pixels[n : n + 1]) for n in range(len(pixels))]
                return {name: np.concatenate([one[name] for one in singly]) for name in singly[0]}
            if not self.shapes:
                raise
            return {
                name: np.full((1, *shape), np.nan if name == error.output else 0, np.float32)
                for name, shape in self.shapes.items()
            }

    def _describe(self):
        steps = self._client.calls.describe("features", fresh=True)
        return asyncio.run_coroutine_threadsafe(self._client.run(steps), self._loop).result()

    def _version(self, served) -> str:
        about = served.facts("about") or {}
        if not isinstance(about.get("bundle"), str):
            raise UserError(
                f"--url {self._url}: the server does not say which bundle it serves: start one "
                "with `python -m serve.run BUNDLE`"
            )
        return about["bundle"]

    def check(self) -> None:
        """A rollout may have put another bundle in place while pictures were sent."""
        now = self._version(self._describe())
        if now != self.bundle:
            raise Failure(
                f"the server at {self._url} serves bundle {now} now, not {self.bundle}: what it "
                "answered since the last finished part is left out; roll back, or start a new "
                "--output"
            )

    def close(self) -> None:
        closing = asyncio.run_coroutine_threadsafe(self._client.close(), self._loop)
        try:
            closing.result(timeout=10)
        except Exception:  # the connection is given up in any case
            pass
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()

"""TensorRT's Python bindings: what this machine can build, flags by version, log and progress."""

import importlib
import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from contract.errors import UserError, one_line, suggest
from contract.gpu import compute_capabilities

if TYPE_CHECKING:
    from contract.engine_record import EngineOptions

FLAVOURS = ("tensorrt", "tensorrt-rtx")
_ANYWHERE = "--formats tensorrt-rtx --compute-capability 8.9"
"""Options that build on a machine without a GPU."""

_MEMORY = re.compile(
    r"out of memory|OutOfMemory|bad_alloc|insufficient memory|workspace limit", re.IGNORECASE
)
_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
"""numpy's names of TensorRT's types; the others (INT8, BOOL, …) differ in case only."""


def load_bindings(flavour: str) -> ModuleType:
    """Return the module `tensorrt` or `tensorrt_rtx`, ready to build here.

    Raises UserError: unknown flavour, module absent, its libraries absent, or full TensorRT without
    a GPU.
    """
    if flavour not in FLAVOURS:
        raise UserError(f"TensorRT flavour '{flavour}': {suggest(flavour, FLAVOURS)}")
    module, full = flavour.replace("-", "_"), flavour == "tensorrt"
    blind = full and not compute_capabilities()
    remedy = f"pip install {flavour}" + (
        ", or work in NVIDIA's container nvcr.io/nvidia/tensorrt" if full else ""
    )
    if blind:
        remedy += f", on a machine with the GPU it is for; without one: {_ANYWHERE}"
    try:
        trt = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{flavour}: Python module '{error.name}' is not installed ({remedy})"
        ) from error
    except (ImportError, OSError) as error:
        message = one_line([str(error)])
        raise UserError(
            f"{flavour}: its bindings are installed, but not its libraries: {message} ({remedy})"
        ) from error
    if blind:
        raise UserError(
            f"{flavour}: engines of full TensorRT are built on the GPU they run on: this machine "
            f"shows none (build there, or {_ANYWHERE})"
        )
    return trt


def targets(trt: ModuleType, flavour: str, requested: tuple[str, ...]) -> tuple[str, ...]:
    """The compute capabilities to build for: `requested`, or this GPU's.

    Raises UserError if `flavour` cannot build for them here.
    """
    current = next(iter(compute_capabilities()), None)
    requested = requested or ((current,) if current else ())
    if flavour == "tensorrt":
        if requested != (current,):
            raise UserError(
                f"tensorrt: cannot build for {', '.join(requested)}: engines of full TensorRT run "
                f"on the GPU they are built on, here {current} (leave the compute capability out, "
                f"build there, or {_ANYWHERE})"
            )
        return requested
    known = [
        f"{name[2:-1]}.{name[-1]}"
        for name in trt.ComputeCapability.__members__
        if name.startswith("SM")
    ]
    if not requested:
        raise UserError(f"tensorrt-rtx: no GPU here and no compute capability named ({_ANYWHERE})")
    for capability in requested:
        if capability not in known:
            why = (
                "Hopper needs full TensorRT"
                if capability == "9.0"
                else "other GPUs need full TensorRT"
            )
            raise UserError(
                f"tensorrt-rtx {trt.__version__}: cannot build for compute capability {capability} "
                f"(known: {', '.join(known)}; {why}: --formats tensorrt on such a GPU)"
            )
    return requested


def flags(trt: ModuleType, options: "EngineOptions") -> list[str]:
    """Names of the builder's flags for these options; raises UserError for those that are not
    supported here.
    """
    if options.flavour == "tensorrt-rtx":
        for name in ("strip_weights", "refit", "version_compatible"):
            if getattr(options, name) and not compute_capabilities():
                raise UserError(
                    f"tensorrt-rtx: {name} cannot be built without a GPU (leave it out, or build "
                    "on a GPU)"
                )
    wanted = {
        "VERSION_COMPATIBLE": options.version_compatible,
        "REFIT": options.refit,
        "STRIP_PLAN": options.strip_weights,
        "REFIT_IDENTICAL": options.strip_weights
        and not options.refit,  # one of them is needed to put stripped weights back
    }
    names = [name for name, requested in wanted.items() if requested]
    for name in names:
        if not hasattr(trt.BuilderFlag, name):
            raise UserError(
                f"{options.flavour} {trt.__version__} does not support {name} (requires TensorRT "
                "10.0+)"
            )
    return names


def configure(
    trt: ModuleType, config: Any, capabilities: tuple[str, ...], options: "EngineOptions"
) -> None:
    """Set the options in the builder's config; raises UserError for a flag that this TensorRT
    lacks.
    """
    wanted = flags(trt, options)
    if options.flavour == "tensorrt-rtx":
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(
                getattr(trt.ComputeCapability, "SM" + capability.replace(".", "")), index
            )
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace_gib is not None:
        config.set_memory_pool_limit(
            trt.MemoryPoolType.WORKSPACE, int(options.workspace_gib * 2**30)
        )
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    for name in wanted:
        config.set_flag(getattr(trt.BuilderFlag, name))
    if options.timing_cache:
        path = options.timing_cache
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if cache is None or not config.set_timing_cache(
            cache, False
        ):  # False: refuse another GPU's or version's
            raise UserError(
                f"{path} is not a timing cache of this GPU and TensorRT {trt.__version__} (name "
                "another file)"
            )


def failure(what: str, errors: list[str]) -> UserError:
    """The builder's messages as a one-line UserError; lack of memory is named as such."""
    # without a GPU every message is followed by one about the driver, which is not the reason
    message = (
        one_line([e for e in errors if "CUDA driver version is insufficient" not in e] or errors)
        or "no reason given"
    )
    if _MEMORY.search(message):
        return UserError(
            f"{what}: not enough memory (smaller max shapes, another workspace_gib, a bigger "
            f"machine): {message}"
        )
    return UserError(f"{what}: {message}")


def collecting_logger(trt: ModuleType) -> Any:
    """A TensorRT logger that collects `errors`: parser and builder only return False or None."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into an event: an exception inside TensorRT's callbacks would end the
    process.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield stopped
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in numbers}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress_bars() -> Progress:
    """Bars on standard error while it is a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def progress_monitor(trt: ModuleType, bars: Progress, stopped: threading.Event) -> Any:
    """TensorRT's progress as one bar per phase; once `stopped` is set, the builder gives up."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.tasks: dict = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.tasks[phase_name] = bars.add_task(phase_name, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.tasks:
                bars.update(self.tasks[phase_name], completed=step + 1)
            return not stopped.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.tasks:
                bars.remove_task(self.tasks.pop(phase_name))

    return Monitor()


def dtype_name(dtype: Any) -> str:
    return _NAMES.get(dtype.name, dtype.name.lower())


def load_engine(
    trt: ModuleType, engine: Path, built: str, host_code: bool, logger: Any
) -> tuple[Any, Any]:
    """Load an engine on the GPU; returns it and the runtime, which must live as long.

    `built` (by which TensorRT, for which GPUs) is for the UserError of an engine that cannot load;
    `host_code` lets a version-compatible engine run the runtime it brings along. Never call it
    without a GPU.
    """
    runtime = trt.Runtime(logger)
    if host_code and hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = True
    loaded = runtime.deserialize_cuda_engine(engine.read_bytes())
    if loaded is None:
        here = (
            f"{trt.__version__} on a GPU of "
            f"{next(iter(compute_capabilities()), 'unknown capability')}"
        )
        raise failure(
            f"{engine}: built by {built}, cannot be loaded by {here} (build it here)", logger.errors
        )
    return loaded, runtime


def open_engine(
    trt: ModuleType, engine: Path, built: str, host_code: bool
) -> tuple[dict[str, list[tuple]], dict]:
    """An engine's "input"s and "output"s (name, dtype, shape) and EngineInspector's JSON; see
    `load_engine`.
    """
    loaded, _runtime = load_engine(trt, engine, built, host_code, collecting_logger(trt))
    tensors: dict[str, list[tuple]] = {"input": [], "output": []}
    for name in map(loaded.get_tensor_name, range(loaded.num_io_tensors)):
        kind = "input" if loaded.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output"
        dtype = dtype_name(loaded.get_tensor_dtype(name))
        tensors[kind].append((name, dtype, tuple(loaded.get_tensor_shape(name))))
    inspector = loaded.create_engine_inspector()
    return tensors, json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

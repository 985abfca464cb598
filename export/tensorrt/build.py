"""ONNX graph to engine, by TensorRT 10 or 11 on the GPU it will run on, or by TensorRT-RTX on any
machine.

Precision lives in the graph (casts, Q/DQ): networks are strongly typed, which 10 needs a flag for
and 11 always is. An engine cannot be opened without a GPU, so beside it lies `<engine>.json`,
written from the network it was built of.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from pydantic import ValidationError

from contract.engine_record import (
    EngineOptions,
    EngineRecord,
    EngineTensor,
    Profile,
    Record,
    first_problem,
)
from contract.errors import UserError, first_line, one_line, suggest
from contract.files import file_sha256, write_all_atomically, write_atomically
from contract.gpu import compute_capabilities
from contract.untrusted import parse_json, read_file
from export.tensorrt import bindings as gpu
from export.tensorrt.bindings import load_bindings

_MOST_BYTES = 2**20
"""Of an engine's record."""


class Inspection(Record):
    """Result of `inspect_engine`; `deserialised`: the engine was opened on a GPU and agrees with
    its record.
    """

    record: EngineRecord
    deserialised: bool
    information: dict
    """EngineInspector's JSON; empty without a GPU."""
    note: str


def build_engine(
    graph: Path, engine: Path, profiles: Sequence[Profile], options: EngineOptions
) -> EngineRecord:
    """Build `engine` from an ONNX file and write its sidecar; both appear by rename, the sidecar
    last.

    Shows a progress bar on a terminal. With TensorRT-RTX, engines of one fixed size are the same to
    the byte each time; with dynamic sizes a few bytes vary: compare graph hashes, not engines.
    Raises UserError in one line: no such graph, a graph TensorRT refuses (with its reason),
    profiles that do not fit the inputs, unknown GPUs, options this machine cannot build, no memory.
    """
    trt = load_bindings(options.flavour)
    if options.flavour == "tensorrt-rtx":
        options = options.model_copy(update={"timing_cache": None})
    capabilities = gpu.targets(trt, options.flavour, options.compute_capabilities)
    for path in filter(None, (engine, options.timing_cache)):
        if not path.parent.is_dir() or path.is_dir():
            raise UserError(f"{path} cannot be written (name a file in a folder that exists)")
    hashes = _graph_hashes(graph)
    logger = gpu.collecting_logger(trt)
    what = f"{graph}: {options.flavour} {trt.__version__}"

    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    # the parser owns the weights: it must live until the engine is built
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        reasons = [parser.get_error(index) for index in range(parser.num_errors)]
        why = one_line(
            [
                f"node {e.node()} '{e.node_name()}' ({e.node_operator()}): {e.desc()}"
                for e in reasons
            ]
        )
        raise UserError(
            f"{what} refuses the graph: {why or one_line(logger.errors)} (export it without that "
            "operation)"
        )
    kinds = {network.get_layer(index).type for index in range(network.num_layers)}
    if trt.LayerType.GRID_SAMPLE in kinds:
        # engines with it build and run, and give other numbers (NVIDIA/TensorRT issue 4813)
        raise UserError(
            f"{graph}: {options.flavour} computes GridSample wrongly: export it as gathers (see "
            "distill.models.deformable)"
        )
    inputs = tuple(_tensor(network.get_input(index)) for index in range(network.num_inputs))
    config = builder.create_builder_config()
    for number, profile in enumerate(profiles):
        _check_profile(f"{graph}: profile {number}", profile, inputs)
        shapes = builder.create_optimization_profile()
        for name, (smallest, favoured, largest) in profile.shapes.items():
            shapes.set_shape(name, smallest, favoured, largest)
        if config.add_optimization_profile(shapes) < 0:
            raise gpu.failure(f"{what} refuses profile {number}", logger.errors)
    if not profiles:
        _check_profile(f"{graph}: an empty list of profiles", Profile(shapes={}), inputs)
    gpu.configure(trt, config, capabilities, options)

    with gpu.stop_on_interrupt() as stopped, gpu.progress_bars() as bars:
        if hasattr(trt, "IProgressMonitor"):
            config.progress_monitor = gpu.progress_monitor(trt, bars, stopped)
        try:
            plan = builder.build_serialized_network(network, config)
        except MemoryError:
            plan = None
            logger.errors.append("out of memory")
    if stopped.is_set():
        raise KeyboardInterrupt
    if plan is None:
        raise gpu.failure(f"{what} cannot build an engine", logger.errors)
    if options.timing_cache:
        timings = memoryview(config.get_timing_cache().serialize())
        write_atomically(options.timing_cache, lambda temporary: temporary.write_bytes(timings))
        # records hold no paths
        options = options.model_copy(update={"timing_cache": Path(options.timing_cache.name)})
    layers = (network.get_layer(index) for index in range(network.num_layers))
    computed = {
        gpu.dtype_name(layer.get_output(index).dtype)
        for layer in layers
        for index in range(layer.num_outputs)
    }
    record = EngineRecord(
        inputs=inputs,
        outputs=tuple(_tensor(network.get_output(index)) for index in range(network.num_outputs)),
        profiles=tuple(profiles),
        dtypes=tuple(sorted(computed | {tensor.dtype for tensor in inputs})),
        compute_capabilities=capabilities,
        flavour=options.flavour,
        tensorrt_version=trt.__version__,
        graph_sha256=hashes,
        engine_sha256=hashlib.sha256(memoryview(plan)).hexdigest(),
        options=options,
    )
    sidecar = record.model_dump_json(indent=2) + "\n"
    write_all_atomically(
        {
            engine: lambda temporary: temporary.write_bytes(memoryview(plan)),
            record_path(engine): lambda temporary: temporary.write_text(sidecar, encoding="utf-8"),
        }
    )
    return record


def _check_profile(what: str, profile: Profile, inputs: Sequence[EngineTensor]) -> None:
    # TensorRT would report these in its own words, some of them after minutes
    declared = {tensor.name: tensor.shape for tensor in inputs}
    for name, shapes in profile.shapes.items():
        if name not in declared:
            raise UserError(f"{what}: the graph has no input '{name}' ({suggest(name, declared)})")
        fits = all(len(given) == len(declared[name]) for given in shapes) and all(
            1 <= low <= favoured <= high and (fixed == -1 or low == high == fixed)
            for fixed, low, favoured, high in zip(declared[name], *shapes, strict=True)
        )
        if not fits:
            given = ", ".join(f"{word} {list(shape)}" for word, shape in shapes._asdict().items())
            raise UserError(
                f"{what}: {given} do not fit input '{name}' {list(declared[name])} "
                "(for each -1: 1 ≤ min ≤ opt ≤ max; the other dimensions are fixed)"
            )
    for name, shape in declared.items():
        if -1 in shape and name not in profile.shapes:
            raise UserError(
                f"{what} gives no shapes for input '{name}' {list(shape)} (give it min, opt and "
                "max)"
            )


def _tensor(tensor: Any) -> EngineTensor:
    return EngineTensor(
        name=tensor.name, dtype=gpu.dtype_name(tensor.dtype), shape=tuple(tensor.shape)
    )


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(
            f"{path}: no such file (check the path; files of one graph or engine stay together)"
        ) from error


def _graph_hashes(graph: Path) -> dict[str, str]:
    """sha256 of the ONNX file and of each file its initialisers lie in, by name."""
    hashes = {graph.name: _sha256(graph)}
    try:
        initializers = onnx.load(graph, load_external_data=False).graph.initializer
    except DecodeError as error:
        raise UserError(f"{graph} is not an ONNX graph, or is damaged (export it again)") from error
    outside = {
        ExternalDataInfo(tensor).location for tensor in initializers if uses_external_data(tensor)
    }
    return hashes | {name: _sha256(graph.parent / name) for name in sorted(outside)}


def record_path(engine: Path) -> Path:
    """Where the sidecar of an engine lies: `model.engine.json` beside `model.engine`."""
    return engine.with_name(engine.name + ".json")


def read_record(path: Path) -> EngineRecord:
    """Read a sidecar; raises UserError if it is missing, damaged or of another layout."""
    if not os.path.lexists(path):
        raise UserError(f"{path}: an engine's record is missing (build the engine again)")
    data = read_file(path, _MOST_BYTES, "build the engine again", links=True)
    try:
        return EngineRecord.model_validate(parse_json(data))
    except ValidationError as error:
        raise UserError(
            f"{path}: a damaged engine record: {first_problem(error)} (build the engine again)"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path}: a damaged engine record: {first_line(error)} (build the engine again)"
        ) from error


def verify_engine(engine: Path) -> EngineRecord:
    """Return the record of an engine whose bytes are those it was written with; raises UserError
    otherwise.
    """
    record = read_record(record_path(engine))
    result = _sha256(engine)
    if result != record.engine_sha256:
        raise UserError(
            f"{engine}: sha256 is {result[:12]}…, its record says {record.engine_sha256[:12]}… "
            "(damaged or exchanged: build it again)"
        )
    return record


def inspect_engine(engine: Path) -> Inspection:
    """Open a verified engine where there is a GPU and compare it with its record; elsewhere return
    the record alone.

    Raises UserError: damaged files, an engine this GPU or TensorRT cannot load, inputs or outputs
    not as recorded.
    """
    record = verify_engine(engine)
    if not compute_capabilities():
        note = (
            f"no GPU here: these are the contents of {record_path(engine).name}, the engine itself "
            "was not opened"
        )
        return Inspection(record=record, deserialised=False, information={}, note=note)
    trt = load_bindings(record.flavour)
    tensors, information = gpu.open_engine(
        trt, engine, record.built, record.options.version_compatible
    )
    for kind, recorded in (("input", record.inputs), ("output", record.outputs)):
        result = [
            EngineTensor(name=name, dtype=dtype, shape=shape)
            for name, dtype, shape in tensors[kind]
        ]
        if sorted(result, key=str) != sorted(recorded, key=str):
            raise UserError(
                f"{engine}: its {kind}s are not those of its record (build the engine again)"
            )
    note = f"opened on a GPU: inputs and outputs agree with {record_path(engine).name}"
    return Inspection(record=record, deserialised=True, information=information, note=note)

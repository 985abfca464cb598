"""What torch.onnx does for every graph although once a process is enough: half of the CPU time of a
small student's export (benchmarks/export_time.py).

Both tables are torch's own and depend on the opset alone. Where another torch has them elsewhere,
it makes them for every graph, as before.
"""

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.onnx._internal.exporter import _decomp, _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

_NEEDED = (
    (ONNXRegistry, "from_torchlib"),
    (_fx_passes, "decompose_with_registry"),
    (_decomp, "get_onnx_implemented_overloads"),
    (_decomp, "create_onnx_friendly_decomposition_table"),
)


aten = torch.ops.aten

_make_registry = ONNXRegistry.from_torchlib


@functools.cache
def registry(opset_version: int) -> ONNXRegistry:
    """ONNX for every operator: the sources of 500 functions, parsed."""
    return _make_registry(opset_version=opset_version)


@functools.cache
def decompositions(operators: ONNXRegistry) -> dict[Any, Callable]:
    """What becomes of operators that ONNX does not have."""
    known = set(_decomp.get_onnx_implemented_overloads(operators))
    return _decomp.create_onnx_friendly_decomposition_table(known)


@functools.cache
def _operators(known: ONNXRegistry) -> frozenset[Any]:
    return frozenset(metas[0].fx_target for metas in known.functions.values())


def _decompose(program: ExportedProgram, known: ONNXRegistry) -> ExportedProgram:
    """A program of operators that ONNX has: torch's own decomposition traces everything once more,
    which is done only where there are others than changes of type.
    """
    if _only_casts_are_unknown(program, _operators(known)):
        for node in _casts(program):
            # in place: the program's outputs are known by the names of nodes
            node.args, node.kwargs = node.args[:1], {"dtype": node.args[1]}
            node.target = aten._to_copy.default
        program.graph_module.recompile()
        return program
    # torch takes entries out of the table
    return program.run_decompositions(dict(decompositions(known)))


def _only_casts_are_unknown(program: ExportedProgram, known: frozenset[Any]) -> bool:
    casts = set(_casts(program))
    for node in program.graph.nodes:
        if node.op == "get_attr":  # the body of a loop or a condition
            return False
        if node.op == "call_function" and node not in casts:
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                return False
            # torch removes these after decomposition
            if node.target not in known and not str(node.target).startswith("aten._assert_"):
                return False
    return True


def _casts(program: ExportedProgram) -> list[Node]:
    """Nodes that change a type and nothing else."""
    return [
        node
        for node in program.graph.nodes
        if node.op == "call_function"
        and node.target is aten.to.dtype
        and len(node.args) == 2
        and not node.kwargs
    ]


@contextmanager
def tables_kept() -> Iterator[None]:
    """While entered, torch.onnx.export makes its tables once a process."""
    if not all(hasattr(place, name) for place, name in _NEEDED):
        yield
        return
    before = [place.__dict__[name] for place, name in _NEEDED[:2]]
    ONNXRegistry.from_torchlib = staticmethod(registry)
    _fx_passes.decompose_with_registry = _decompose
    try:
        yield
    finally:
        for (place, name), value in zip(_NEEDED, before, strict=False):
            setattr(place, name, value)


@contextmanager
def uncollected() -> Iterator[None]:
    """While entered, nobody looks for garbage among the millions of objects of a trace, which live
    until its end.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

"""What a manifest says of graphs and teachers."""

from pathlib import Path

import onnx

from contract.bundle_check import weight_dtypes
from contract.manifest import GraphRecord, Precision, TeacherRecord, TensorRecord
from distill.config import TeacherConfig
from distill.teachers import weights_source
from export.graph import Student
from export.modules import Part
from export.to_onnx import OPSET


def describe_graph(part: Part, paths: dict[str, Path], precision: Precision) -> GraphRecord:
    """The record of a graph that was written to `paths`, by the graph's name."""
    signature = part.signature
    inputs, outputs = (
        tuple(
            TensorRecord(name=p.name, dtype=p.dtype, shape=p.axes, meaning=p.meaning) for p in ports
        )
        for ports in (signature.inputs, signature.outputs)
    )
    about = {
        key: list(value) if isinstance(value, tuple) else value for key, value in part.about.items()
    }
    return GraphRecord(
        name=signature.graph,
        file=paths[signature.graph].name,
        inputs=inputs,
        outputs=outputs,
        precision=precision,
        dtypes=weight_dtypes(onnx.load(paths[signature.graph], load_external_data=False)),
        opset=OPSET[precision],
        about=about,
    )


def describe_teacher(config: TeacherConfig, student: Student) -> TeacherRecord:
    """The record of a teacher of the student's run."""
    dims, head = student.run.dims[config.label], student.deployment.shipped.get(config.label)
    return TeacherRecord(
        label=config.label,
        network=config.name,
        role=config.role,
        token_dim=dims.summary if head and head.has_token else None,
        patch_dim=dims.patches,
        weights=weights_source(config),
        licence=licence_of(config.label, student) or "unknown",
    )


def licence_of(label: str, student: Student) -> str | None:
    """The licence of a teacher's weights as the run recorded it; None where it is unknown."""
    return next((r.licence for r in student.run.licences if r.label == label), None)

"""A bundle of a few kilobytes that holds every kind of file there is, and graphs made to fit any
manifest: nothing in it computes anything, but all of it is valid.
"""

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from contract.detection import _TOKENS
from contract.engine_record import EngineOptions, EngineRecord, EngineTensor
from contract.golden import GOLDEN, Golden
from contract.manifest import (
    MANIFEST,
    BundledEngine,
    DetectorRecord,
    GraphRecord,
    Manifest,
    ParityRecord,
    Preprocessing,
    Resolution,
    StudentRecord,
    TeacherRecord,
)
from contract.text_encoder import TEXT_ENCODER
from serve.repository.zero_shot import EMBEDDINGS

SIDE, WIDTH, OPSET = 28, 4, 20
KINDS = {
    "uint8": TensorProto.UINT8,
    "int64": TensorProto.INT64,
    "float32": TensorProto.FLOAT,
    "bool": TensorProto.BOOL,
}


def tensor(name: str, *shape: int | str, dtype: str = "float32") -> dict:
    return {"name": name, "dtype": dtype, "shape": list(shape), "meaning": ""}


def graph_bytes(record: dict, opset: int = OPSET) -> bytes:
    """A graph with the inputs and outputs of a record; no shape of an output follows from its
    nodes.
    """
    inputs, outputs = (
        [
            helper.make_tensor_value_info(port["name"], KINDS[port["dtype"]], port["shape"])
            for port in record[key]
        ]
        for key in ("inputs", "outputs")
    )
    nodes = [
        helper.make_node("Reshape", [record["inputs"][0]["name"], "flat"], ["values"]),
        helper.make_node("Cast", ["values"], ["shape"], to=TensorProto.INT64),
    ]
    for number, port in enumerate(record["outputs"]):
        nodes.append(
            helper.make_node("Cast", ["values"], [f"cast_{number}"], to=KINDS[port["dtype"]])
        )
        nodes.append(helper.make_node("Reshape", [f"cast_{number}", "shape"], [port["name"]]))
    constants = [
        numpy_helper.from_array(np.array([-1]), "flat"),
        numpy_helper.from_array(np.ones(3, np.float32), "unused"),
    ]
    graph = helper.make_graph(nodes, "made", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return model.SerializeToString()


def record(name: str, inputs: list[dict], outputs: list[dict], **about: object) -> dict:
    return {
        "name": name,
        "file": f"{name}.onnx",
        "inputs": inputs,
        "outputs": outputs,
        "precision": "fp32",
        "dtypes": ["float32", "int64"],
        "opset": OPSET,
        "about": about,
    }


def records() -> tuple[list[dict], list[dict]]:
    """Graphs of a student of two teachers with two tasks, and those of a detector."""
    image = tensor("image", "batch", SIDE, SIDE, 3, dtype="uint8")
    features = [
        tensor("features", "batch", 2, 2, WIDTH),
        tensor("features_global", "batch", 1, WIDTH),
    ]
    clip = [tensor("clip_token", "batch", WIDTH), tensor("clip_patches", "batch", 4, WIDTH)]
    maps = [tensor("boxes_s8", "batch", 16, WIDTH), tensor("boxes_s16", "batch", 4, WIDTH)]
    classes, depth = tensor("segmentation_logits", "batch", 4, 2), tensor("depth", "batch", 4)
    backbone = [tensor("backbone_global", "batch", WIDTH)]
    graphs = [
        record("backbone", [image], [*backbone, *features]),
        record("head_clip", features, clip),
        record("head_boxes", features, maps),
        record("segmentation", features[:1], [classes], classes=["a", "b"], stride=14),
        record("depth", features[:1], [depth], unit="metre", stride=14),
        record("fused", [image], [*backbone, *clip, *maps, classes, depth]),
    ]
    tokens = ("batch", "text_tokens")
    masks = [
        tensor("self_mask", *tokens, "text_tokens", dtype="bool"),
        tensor("position_ids", *tokens, dtype="int64"),
    ]
    text, text_mask = tensor("text", *tokens, WIDTH), tensor("text_mask", *tokens, dtype="bool")
    detector = [
        record("text_detector", [tensor("ids", *tokens, dtype="int64"), *masks], [text]),
        record(
            "detector",
            [*maps, text, text_mask, *masks],
            [tensor("logits", "batch", 5, 256), tensor("boxes", "batch", 5, 4)],
        ),
    ]
    return graphs, detector


def encoder(files: dict[str, bytes]) -> dict:
    """text_encoder.json; its graph and vocabulary are added to the files."""
    ids = tensor("token_ids", "batch", 8, dtype="int64")
    answer = tensor("text_embedding", "batch", WIDTH)
    files["text_encoder.onnx"] = graph_bytes({"inputs": [ids], "outputs": [answer]})
    files["bpe.txt.gz"] = gzip.compress(b"#version\na b\n", mtime=0)
    sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return {
        "format": 1,
        "text_weights_sha256": "0" * 64,
        "graph": {
            "file": "text_encoder.onnx",
            "sha256": sha256["text_encoder.onnx"],
            "opset": OPSET,
        },
        "input": ids,
        "output": answer,
        "tokenizer": {
            "kind": "clip-bpe",
            "vocabulary": {"file": "bpe.txt.gz", "sha256": sha256["bpe.txt.gz"]},
            "vocabulary_size": 515,
            "context_length": 8,
            "pattern": "",
            "clean": "lower",
            "pad_id": 0,
            "start": {"token": "<start_of_text>", "id": 513},
            "end": {"token": "<end_of_text>", "id": 514},
        },
    }


def embeddings(about: dict) -> bytes:
    """class_embeddings.safetensors with this metadata."""
    rows = np.eye(2, WIDTH, dtype=np.float32)
    return save({"embeddings": rows}, about)


EMBEDDED = {
    "format": "1",
    "classes": '["cat", "dog"]',
    "templates": '["a {}."]',
    "teacher": "clip",
    "text_weights_sha256": "0" * 64,
    "logit_scale": "10.0",
}


def make_bundle(folder: Path) -> Path:
    """Write it; returns the folder."""
    graphs, detector = records()
    files = {graph["file"]: graph_bytes(graph) for graph in (*graphs, *detector)}
    files[TEXT_ENCODER] = json.dumps(encoder(files)).encode()
    lines = [_TOKENS.get(number, f"w{number}") for number in range(1100)]
    files["vocab.txt"] = "\n".join(lines).encode()
    files[EMBEDDINGS] = embeddings(EMBEDDED)
    fused = graphs[-1]
    outputs = {
        port["name"]: np.ones((1, *port["shape"][1:]), np.float32) for port in fused["outputs"]
    }
    image = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    golden = Golden(image, outputs, (0.99, 0.1), ("cat.jpg",), precision="fp32")
    files[GOLDEN] = golden.to_bytes()
    engine = b"engine"
    sidecar = EngineRecord(
        inputs=(EngineTensor(name="image", dtype="uint8", shape=(-1, SIDE, SIDE, 3)),),
        outputs=(EngineTensor(name="backbone_global", dtype="float32", shape=(-1, WIDTH)),),
        profiles=(),
        dtypes=("float32",),
        compute_capabilities=("9.0",),
        flavour="tensorrt",
        tensorrt_version="10",
        graph_sha256={},
        engine_sha256=hashlib.sha256(engine).hexdigest(),
        options=EngineOptions(flavour="tensorrt"),
    )
    files["backbone.tensorrt.engine"] = engine
    files["backbone.tensorrt.engine.json"] = sidecar.model_dump_json().encode()
    text, boxes = (GraphRecord.model_validate(graph) for graph in detector)
    row = dict.fromkeys(("cosine", "max_abs", "relative", "centred", "deviation"), 1.0)
    parity = ParityRecord(
        graph="backbone",
        output="backbone_global",
        runtime="onnxruntime",
        batch=1,
        height=SIDE,
        width=SIDE,
        pictures=1,
        position_cosine=None,
        worst_image="cat.jpg",
        passed=True,
        problem="",
        **row,
    )
    about = {"network": "vit", "weights": "", "licence": "", "patch_dim": WIDTH}
    manifest = Manifest(
        student=StudentRecord(
            network="vit",
            method="umt",
            width=WIDTH,
            stride=14,
            image_size=SIDE,
            sha256="0" * 64,
            trained_steps=None,
        ),
        teachers=(
            TeacherRecord(label="clip", role="clip", token_dim=WIDTH, **about),
            TeacherRecord(label="boxes", role="detector", token_dim=None, **about),
        ),
        precision="fp32",
        preprocessing=Preprocessing(mean=(0, 0, 0), std=(1, 1, 1)),
        resolution=Resolution(
            dynamic=False,
            height=SIDE,
            width=SIDE,
            min_height=SIDE,
            min_width=SIDE,
            stride=14,
            checked=((SIDE, SIDE),),
        ),
        max_batch=2,
        graphs=tuple(GraphRecord.model_validate(graph) for graph in graphs),
        engines=(
            BundledEngine(graph="backbone", file="backbone.tensorrt.engine", **dict(sidecar)),
        ),
        parity=(parity,),
        detector=DetectorRecord(
            teacher="boxes",
            source="made",
            sha256="0" * 64,
            maps=("boxes_s8", "boxes_s16"),
            vocabulary="vocab.txt",
            text=text,
            boxes=boxes,
        ),
        files={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        made={},
    )
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / MANIFEST).write_bytes(manifest.sealed().to_bytes())
    return folder

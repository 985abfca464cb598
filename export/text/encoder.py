"""The CLIP text tower as an ONNX graph that agrees with torch, and the file that describes it."""

import hashlib
import json
from pathlib import Path

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contract.errors import UserError
from contract.text_encoder import FORMAT, TEXT_ENCODER
from export.text.tower import TextTower, quiet

_GRAPH = "text_encoder.onnx"
_INPUT, _OUTPUT, _OPSET = "token_ids", "text_embedding", 20
_MIN_COSINE = 0.99999
"""Between the graph's and torch's embedding of one text, in float32."""


def encoder_files(tower: TextTower, tokens: Tensor) -> dict[str, bytes]:
    """Contents by file name: the text tower as ONNX, its vocabulary, and a description from which a
    client uses both without torch.

    The graph maps `token_ids` int64 [B, context] to `text_embedding` float32 [B, d], normalised; it
    is checked, and compared with torch through onnxruntime on rows of `tokens` [N, context] at
    batch 1 and 3. Raises UserError where the tower exceeds the 2 GB of an ONNX file or the graph
    computes something else.
    """
    from open_clip.tokenizer import default_bpe

    size = sum(tensor.nbytes for tensor in tower.model.state_dict().values())
    if size > 2**31 - 2**24:
        raise UserError(
            f"--with-encoder: the text tower is {size / 1e9:.1f} GB, an ONNX file holds at most 2 "
            "(leave the option out)"
        )
    print("encoder   tracing and comparing the text tower …", flush=True)
    graph = _text_graph(tower)
    parity = _compare(tower, graph, tokens)
    vocabulary = Path(default_bpe())
    contents = {vocabulary.name: vocabulary.read_bytes(), _GRAPH: graph}
    sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    tokenizer = tower.tokenizer
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    sidecar = {
        "format": FORMAT,
        **tower.about,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "parity": parity,
        "graph": {"file": _GRAPH, "sha256": sha256[_GRAPH], "opset": _OPSET},
        "input": {"name": _INPUT, "dtype": "int64", "shape": ["batch", tower.context]},
        "output": {
            "name": _OUTPUT,
            "dtype": "float32",
            "shape": ["batch", parity.pop("dim")],
            "normalized": True,
        },
        "tokenizer": {
            "kind": "clip-bpe",
            "vocabulary": {"file": vocabulary.name, "sha256": sha256[vocabulary.name]},
            "vocabulary_size": tokenizer.vocab_size,
            "context_length": tower.context,
            "pattern": tokenizer.pat.pattern,
            "clean": tokenizer.clean_fn.__name__.removeprefix("_clean_"),
            "pad_id": 0,
            "start": {"token": tokenizer.decoder[start], "id": start},
            "end": {"token": tokenizer.decoder[end], "id": end},
        },
    }
    return contents | {TEXT_ENCODER: json.dumps(sidecar, indent=2).encode()}


def _text_graph(tower: TextTower) -> bytes:
    """A checked ONNX graph of dynamic batch, without the exporter's stack traces and local
    paths.
    """

    class Normalised(torch.nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, token_ids: Tensor) -> Tensor:
            return F.normalize(self.model.encode_text(token_ids), dim=-1)

    example = tower.tokenizer(["two", "sentences"], context_length=tower.context)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            Normalised(tower.model).eval(),
            (example,),
            dynamo=True,
            opset_version=_OPSET,
            verbose=False,
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    proto = program.model_proto
    graph = proto.graph
    for part in (
        proto,
        graph,
        *graph.node,
        *graph.initializer,
        *graph.value_info,
        *graph.input,
        *graph.output,
    ):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    opsets = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    if opsets != [_OPSET]:  # the exporter may silently write another
        raise RuntimeError(f"torch exported opset {opsets}, but {_OPSET} was requested")
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(deterministic=True)


def _compare(tower: TextTower, graph: bytes, tokens: Tensor) -> dict[str, float | int]:
    """Least cosine and largest difference of the graph from torch, and the embeddings' dim; raises
    UserError past tolerance.
    """
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    cosine, error, dim = 1.0, 0.0, 0
    # rows of different lengths, as far as labels differ
    for rows in (tokens[:1], tokens[[0, len(tokens) // 2, -1]]):
        with torch.inference_mode():
            expected = F.normalize(tower.model.encode_text(rows).float(), dim=-1)
        result = torch.from_numpy(session.run([_OUTPUT], {_INPUT: rows.numpy()})[0])
        cosine = min(cosine, F.cosine_similarity(result, expected).min().item())
        error, dim = max(error, (result - expected).abs().max().item()), expected.shape[1]
    if not cosine >= _MIN_COSINE:  # NaN fails too
        raise UserError(
            f"--with-encoder: the ONNX text tower differs from torch (cosine {cosine:.6f}, at "
            f"least {_MIN_COSINE} is required): leave the option out, or try other versions of "
            "torch and onnxruntime"
        )
    return {"cosine": cosine, "max_abs_error": error, "dim": dim}

"""`python -m export.text` against open_clip's own text tower, tokenizer and zero-shot classifier,
without a hub.
"""

import contextlib
import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from contract.manifest import TeacherRecord, read_manifest
from distill.config import TeacherConfig, TeacherRuntime
from distill.evaluate.zero_shot import read_classes
from distill.models.weights import tensors_sha256
from distill.teachers import Teacher, build_teacher
from export.text.__main__ import main
from export.text.embeddings import _compare_activations
from export.text.tower import DEFAULT_TEMPLATES

open_clip = pytest.importorskip("open_clip", reason="the optional extra [text] is not installed")
onnxruntime = pytest.importorskip("onnxruntime")

LABELS = ("cat", "golden retriever", "steam engine")
TEMPLATES = ("a photo of a {}.", "art of the {}, by {{nobody}}")
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
PARTS = {"class_embeddings.safetensors", "text_encoder.onnx", "text_encoder.json", VOCABULARY}


def configuration(**text: int) -> dict:
    """open_clip's description of a CLIP small enough for a test, with CLIP's own vocabulary."""
    return {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 2,
        }
        | text,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "test-clip.json"
    path.write_text(json.dumps(configuration()))
    open_clip.add_model_config(path)
    return path


@pytest.fixture(scope="module")
def clip(model: Path) -> torch.nn.Module:
    """The model with its own weights (not the seed of `random`), large enough for templates to tell
    labels apart.
    """
    torch.manual_seed(5)
    clip = open_clip.create_model("test-clip").eval()
    with torch.no_grad():
        clip.token_embedding.weight.mul_(20)
    return clip


@pytest.fixture(scope="module")
def weights(clip: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "clip.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, path)
    return path


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.txt"
    path.write_text("\n".join(LABELS) + "\n")
    return path


def call(*arguments: object) -> subprocess.CompletedProcess:
    """Run the command in this process."""
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        status = main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, status, output.getvalue(), error.getvalue())


def refused(done: subprocess.CompletedProcess, *says: str) -> None:
    """Assert that a command stopped with one line that says what it must."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for words in says:
        assert words in done.stderr


def opened(path: Path) -> tuple[torch.Tensor, dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["embeddings"]
        return file.get_tensor("embeddings"), file.metadata()


@pytest.fixture(scope="module")
def bundle(
    model: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A folder with embeddings and encoder, and what the command printed."""
    folder = tmp_path_factory.mktemp("out")
    (folder / "labels.txt").write_text("\n".join(LABELS))
    (folder / "templates.txt").write_text("\n".join(TEMPLATES))
    done = call(
        "--output",
        folder / "bundle",
        "--model",
        model,
        "--pretrained",
        weights,
        "--labels",
        folder / "labels.txt",
        "--templates",
        folder / "templates.txt",
        "--with-encoder",
    )
    assert done.returncode == 0, done.stderr
    return folder / "bundle", done.stdout


def test_embeddings_are_those_of_open_clips_zero_shot_classifier(bundle, clip):
    found, _ = opened(bundle[0] / "class_embeddings.safetensors")
    ask = [lambda label, template=template: template.replace("{}", label) for template in TEMPLATES]
    expected = open_clip.build_zero_shot_classifier(
        clip, open_clip.get_tokenizer("test-clip"), LABELS, ask
    ).T
    assert found.dtype == torch.float32 and found.shape == (3, 24)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found @ found.T).triu(1).max() < 0.999, (
        "labels must differ, or the comparison shows nothing"
    )


def test_metadata_say_what_the_embeddings_are_of(bundle, clip, weights):
    folder, _ = bundle
    found, metadata = opened(folder / "class_embeddings.safetensors")
    assert json.loads(metadata["classes"]) == json.loads(metadata["labels"]) == list(LABELS)
    assert json.loads(metadata["templates"]) == list(TEMPLATES)
    assert metadata["sha256"] == tensors_sha256({"embeddings": found})
    assert (metadata["format"], metadata["model"], metadata["pretrained"]) == (
        "1",
        "test-clip",
        weights.name,
    )
    assert float(metadata["logit_scale"]) == pytest.approx(clip.logit_scale.exp().item(), abs=1e-3)
    assert metadata["open_clip"] == open_clip.__version__
    sidecar = json.loads((folder / "text_encoder.json").read_text())
    assert sidecar["text_weights_sha256"] == metadata["text_weights_sha256"]


def test_evaluation_reads_the_embeddings_in_its_own_order_of_classes(bundle):
    path = bundle[0] / "class_embeddings.safetensors"
    found, _ = opened(path)
    read = read_classes(path, (LABELS[2], LABELS[0]))
    assert torch.equal(read.embeddings, found[[2, 0]]) and read.norms is None and read.bias is None


def test_files_and_the_next_command_are_printed_and_nothing_else_is_written(bundle):
    folder, printed = bundle
    assert {path.name for path in folder.iterdir()} == PARTS
    assert all(f"wrote     {folder / name}" in printed for name in PARTS)
    embeddings = folder / "class_embeddings.safetensors"
    assert (
        f"distill.evaluate RUN --tasks zero-shot zero_shot.embeddings={embeddings} --features clip "
        "--data ROOT" in printed
    )
    assert (
        embeddings.stat().st_mode & 0o044 == (folder / "text_encoder.json").stat().st_mode & 0o044
    )


def test_onnx_encoder_equals_open_clip_at_any_batch(bundle, clip):
    session = onnxruntime.InferenceSession(
        bundle[0] / "text_encoder.onnx", providers=["CPUExecutionProvider"]
    )
    assert session.get_inputs()[0].shape == ["batch", 77] and session.get_outputs()[0].shape == [
        "batch",
        24,
    ]
    for batch in (1, 2, 5):
        tokens = open_clip.tokenize(["long " * 20 * row + "words" for row in range(batch)])
        with torch.inference_mode():
            expected = clip.encode_text(tokens, normalize=True)
        found = torch.from_numpy(session.run(["text_embedding"], {"token_ids": tokens.numpy()})[0])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_onnx_encoder_is_opset_20_and_carries_no_paths(bundle):
    data = (bundle[0] / "text_encoder.onnx").read_bytes()
    graph = onnx.load_from_string(data)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 20)]
    assert not graph.metadata_props and not any(
        node.metadata_props or node.doc_string for node in graph.graph.node
    )
    assert (
        b"site-packages" not in data and b".py" not in data and str(Path.cwd()).encode() not in data
    )


def test_sidecar_names_files_by_hash_and_tokens_can_be_made_from_them(bundle):
    folder, _ = bundle
    sidecar = json.loads((folder / "text_encoder.json").read_text())
    tokenizer = sidecar["tokenizer"]
    for entry in (sidecar["graph"], tokenizer["vocabulary"]):
        assert hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    assert (tokenizer["context_length"], tokenizer["vocabulary_size"], tokenizer["clean"]) == (
        77,
        49408,
        "lower",
    )
    made = open_clip.SimpleTokenizer(str(folder / VOCABULARY), context_length=77)("A photo")[
        0
    ].tolist()
    assert (made[0], made[3], made[4]) == (
        tokenizer["start"]["id"],
        tokenizer["end"]["id"],
        tokenizer["pad_id"],
    )
    assert sidecar["parity"]["cosine"] > 0.99999 and sidecar["output"]["shape"] == ["batch", 24]


def test_random_weights_are_seeded_and_said_aloud_and_an_old_file_is_replaced(
    model, labels, tmp_path
):
    path = tmp_path / "new" / "folder" / "class_embeddings.safetensors"
    seen = []
    for size in (1, 7):
        torch.manual_seed(size)
        done = call(
            "--output",
            path.parent,
            "--model",
            model,
            "--pretrained",
            "random",
            "--labels",
            labels,
            "--batch-size",
            size,
        )
        assert done.returncode == 0, done.stderr
        assert "RANDOM" in done.stdout
        seen.append(opened(path))
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=0, atol=1e-6)
    assert json.loads(seen[0][1]["templates"]) == list(DEFAULT_TEMPLATES)
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_words_after_a_tab_stand_for_a_class_in_its_prompts(model, weights, tmp_path):
    (tmp_path / "labels.txt").write_text("n01\tgolden retriever\r\n\r\ncat\r\n", newline="")
    (tmp_path / "plain.txt").write_text("golden retriever\ncat")
    for name in ("labels", "plain"):
        done = call(
            "--output",
            tmp_path / name,
            "--model",
            model,
            "--pretrained",
            weights,
            "--labels",
            tmp_path / f"{name}.txt",
        )
        assert done.returncode == 0, done.stderr
    named, metadata = opened(tmp_path / "labels" / "class_embeddings.safetensors")
    assert json.loads(metadata["classes"]) == ["n01", "cat"]
    assert torch.equal(named, opened(tmp_path / "plain" / "class_embeddings.safetensors")[0])


@pytest.mark.parametrize("form", ["half.pt", "training.pt", "custom-text"])
def test_weights_of_other_files_and_layouts_give_the_same_embeddings(
    form, bundle, model, weights, clip, labels, tmp_path
):
    path, named = tmp_path / "clip.pt", model
    state = clip.state_dict()
    if form == "half.pt":
        torch.save({name: tensor.half() for name, tensor in state.items()}, path)
    elif form == "training.pt":
        torch.save(
            {
                "epoch": 3,
                "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
            },
            path,
        )
    else:  # CustomTextCLIP keeps its text tower under `text.`, files of plain CLIP do not
        path, named = weights, tmp_path / "custom-clip.json"
        named.write_text(json.dumps(configuration() | {"custom_text": True}))
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    done = call(
        "--output",
        tmp_path / "out",
        "--model",
        named,
        "--pretrained",
        path,
        "--labels",
        labels,
        "--templates",
        tmp_path / "templates.txt",
    )
    assert done.returncode == 0, done.stderr
    found, _ = opened(tmp_path / "out" / "class_embeddings.safetensors")
    expected, _ = opened(bundle[0] / "class_embeddings.safetensors")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 if form == "half.pt" else 1e-6)


def test_a_tags_quickgelu_is_used_even_where_the_models_name_does_not_say_so(
    model, weights, labels, tmp_path, monkeypatch
):
    tags = {"trial": {"file": str(weights), "quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "test-clip", tags)
    done = call(
        "--output",
        tmp_path / "out",
        "--model",
        "test-clip",
        "--pretrained",
        "trial",
        "--labels",
        labels,
    )
    assert done.returncode == 0, done.stderr
    found, metadata = opened(tmp_path / "out" / "class_embeddings.safetensors")
    assert metadata["quick_gelu"] == "true"
    quick = open_clip.create_model("test-clip", str(weights), force_quick_gelu=True).eval()
    tokens = open_clip.tokenize([template.format(LABELS[0]) for template in DEFAULT_TEMPLATES])
    with torch.inference_mode():
        expected = F.normalize(quick.encode_text(tokens, normalize=True).mean(dim=0), dim=0)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)


BAD_FILES = {
    "empty labels": ("labels", "\n \n", ("is empty",)),
    "a duplicate label": (
        "labels",
        "cat\ndog\ncat\n",
        (":3: label 'cat' is a duplicate of line 1",),
    ),
    "a label too long": (
        "labels",
        "cat\n" + "very " * 90 + "tall\n",
        (":2: label 'very very", "tokens and the model reads 77"),
    ),
    "a tab without words": ("labels", "cat\t\n", (":1: 'cat' has a tab with nothing",)),
    "a tab without a name": ("labels", "\tcat\n", (":1: 'cat' has a tab with nothing",)),
    "a label that rings": ("labels", "dog\nc\aat\n", (":2: a text with control characters",)),
    "an endless template": (
        "templates",
        "a {}" + 2000 * "!",
        (
            ":1: ",
            "more than 2,000",
        ),
    ),
    "templates without end": ("templates", 1001 * "a {}\n", ("has 1001 templates",)),
    "no UTF-8": ("labels", b"caf\xe9\n", ("not UTF-8",)),
    "a template without a place": (
        "templates",
        "a {}\na photo\n",
        (":2: template 'a photo' has no {}",),
    ),
    "empty templates": ("templates", "", ("is empty",)),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_text_files_are_one_line_and_leave_nothing(case, model, labels, tmp_path):
    kind, content, says = BAD_FILES[case]
    path = tmp_path / f"{kind}.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    given = [
        "--output",
        tmp_path / "out",
        "--model",
        model,
        "--pretrained",
        "random",
        "--labels",
        labels,
    ]
    refused(call(*given, *(["--templates", path] if kind == "templates" else [])), str(path), *says)
    assert not (tmp_path / "out").exists()


BAD_ARGUMENTS = {
    "unknown model": ({"--model": "ViT-B-61"}, ("did you mean 'ViT-B-16'?",)),
    "Hugging Face tokenizer": ({"--model": "ViT-B-16-SigLIP"}, ("Hugging Face", "ViT-B-16")),
    "missing configuration": ({"--model": "none.json"}, ("none.json", "No such file")),
    "unknown tag": ({"--model": "ViT-B-16", "--pretrained": "openia"}, ("did you mean 'openai'?",)),
    "missing weights": ({"--pretrained": "none.safetensors"}, ("none.safetensors: no such file",)),
    "missing labels": ({"--labels": "none.txt"}, ("none.txt: no such file",)),
    "batch 0": ({"--batch-size": "0"}, ("--batch-size 0",)),
    "output is a file": ({"--output": __file__}, ("is not a folder",)),
    "output below a file": ({"--output": f"{__file__}/out"}, ("is not a folder",)),
    "no labels": ({"--labels": None}, ("--labels is required",)),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_one_line_and_leave_nothing(case, model, labels, tmp_path):
    changes, says = BAD_ARGUMENTS[case]
    given = {
        "--output": tmp_path / "out",
        "--model": model,
        "--pretrained": "random",
        "--labels": labels,
    } | changes
    refused(
        call(*(part for option in given.items() if option[1] is not None for part in option)), *says
    )
    assert not (tmp_path / "out").exists()


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "case", ["code", "raw code", "torchscript", "damaged", "larger", "deeper", "narrower", "NaN"]
)
def test_bad_weights_are_one_line_and_leave_nothing(case, model, weights, clip, labels, tmp_path):
    path, trap = tmp_path / "clip.pt", tmp_path / "trap"
    state, said = clip.state_dict(), "does not fit"
    if case == "code":
        torch.save({"state_dict": state, "args": Touch(trap)}, path)
        said = "contains code"
    elif case == "raw code":
        path.write_bytes(pickle.dumps(Touch(trap)))
        said = "contains code"
    elif case == "torchscript":
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)
        said = "TorchScript"
    elif case == "damaged":
        path = tmp_path / "clip.safetensors"
        path.write_bytes(weights.read_bytes()[:-100])
        said = "damaged"
    elif (
        case == "larger"
    ):  # the image tower of another model of the family, whose text towers are alike
        torch.save(state | {"visual.conv1.weight": torch.zeros(32, 3, 8, 8)}, path)
    elif case == "deeper":
        torch.save(state | {"transformer.resblocks.2.ln_1.weight": torch.zeros(32)}, path)
    elif case == "narrower":
        torch.save(
            {name: tensor for name, tensor in state.items() if "resblocks.1." not in name}, path
        )
    else:
        torch.save(state | {"text_projection": state["text_projection"] * torch.nan}, path)
        said = "NaN"
    refused(
        call(
            "--output", tmp_path / "out", "--model", model, "--pretrained", path, "--labels", labels
        ),
        said,
    )
    assert not trap.exists() and not (tmp_path / "out").exists()


def test_an_older_file_survives_a_failure(bundle, model, tmp_path):
    path = bundle[0] / "class_embeddings.safetensors"
    before = path.read_bytes()
    (tmp_path / "labels.txt").write_text("cat\n" + "very " * 90)
    refused(
        call(
            "--output",
            bundle[0],
            "--model",
            model,
            "--pretrained",
            "random",
            "--labels",
            tmp_path / "labels.txt",
        ),
        "too long",
    )
    assert path.read_bytes() == before and {item.name for item in path.parent.iterdir()} == PARTS


def test_without_open_clip_the_remedy_is_named(model, labels, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    done = call(
        "--output",
        tmp_path / "out",
        "--model",
        "ViT-B-16",
        "--pretrained",
        "random",
        "--labels",
        labels,
    )
    refused(done, "pip install 'vfm-distill[text]'")


def test_an_unreachable_hub_is_one_line_with_the_remedy(labels, tmp_path, monkeypatch):
    # huggingface_hub reads HF_HUB_OFFLINE and HF_HOME when it is imported
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    wanted = ("--model", "ViT-B-16", "--pretrained", "openai", "--labels", labels)
    done = call("--output", tmp_path / "out", *wanted)
    refused(done, "cannot be downloaded", "--pretrained FILE and --model ViT-B-16-quickgelu")
    assert not (tmp_path / "out").exists()


def test_help_answers_without_loading_torch():
    code = (
        "import sys, export.text.__main__ as t\ntry: t.main(['--help'])\nfinally: print('torch' in "
        "sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (
        done.returncode == 0 and "--with-encoder" in done.stdout and done.stdout.endswith("False\n")
    ), done.stderr


def test_a_clip_that_was_not_the_teacher_is_refused_before_anything_changes(
    small_bundle, model, labels, tmp_path
):
    bundle = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    before = {path: path.read_bytes() for path in bundle.iterdir()}
    given = ("--output", bundle, "--model", model, "--pretrained", "random", "--labels", labels)
    width = next(t.token_dim for t in read_manifest(bundle).teachers if t.label == "dino")
    refused(
        call(*given, "--teacher", "dino"),
        f"its embeddings are 24-d, the bundle's 'dino' tokens {width}-d",
    )
    assert {path: path.read_bytes() for path in bundle.iterdir()} == before


def test_a_text_tower_with_another_activation_than_the_teacher_is_said(capsys):
    def said(network: str, quick: bool) -> str:
        record = TeacherRecord(
            label="clip",
            network=network,
            role="clip",
            token_dim=512,
            patch_dim=768,
            weights="x",
            licence="unknown",
        )
        _compare_activations(record, quick)
        return capsys.readouterr().out

    gelu, quickgelu = "vit_base_patch16_clip_224.openai", "vit_base_patch16_clip_quickgelu_224"
    assert "computes QuickGELU, but the teacher 'clip'" in said(gelu, True)
    assert "computes GELU, but the teacher 'clip'" in said(quickgelu, False)
    assert said(gelu, False) == said(quickgelu, True) == ""
    assert said("vit_base_patch16_siglip_224", True) == ""
    assert "that of the teacher 'clip' (resnet50x4_clip.openai) QuickGELU" in said(
        "resnet50x4_clip.openai", False
    )
    assert said("resnet50x4_clip.openai", True) == said("resnet50.a1_in1k", False) == ""


@pytest.mark.parametrize("numbers", [True, False])
def test_image_and_text_tower_of_an_openai_clip_agree(tmp_path, numbers, caplog):
    """A teacher from a file in OpenAI's layout gives open_clip's own image embedding."""
    path = tmp_path / "tiny-quick.json"
    path.write_text(json.dumps(configuration() | {"quick_gelu": True}))
    open_clip.add_model_config(path)
    torch.manual_seed(3)
    source = open_clip.create_model("tiny-quick").eval()
    state = dict(source.state_dict())
    if numbers:  # OpenAI's own files have them, open_clip's do not
        state |= {name: torch.tensor(1) for name in ("input_resolution", "context_length")}
        state["vocab_size"] = torch.tensor(49408)
    torch.save({"state_dict": state}, tmp_path / "clip.pth")
    shape = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 24}

    def teacher(name: str) -> Teacher:
        config = TeacherConfig(
            name=name,
            role="clip",
            image_size=32,
            kwargs=shape,
            checkpoint=str(tmp_path / "clip.pth"),
        )
        return build_teacher(config, TeacherRuntime(), 0)

    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    right = teacher("vit_base_patch16_clip_quickgelu_224")
    with torch.no_grad():
        expected = source.encode_image(right.preprocess(images))
        torch.testing.assert_close(right(images).summary, expected, rtol=1e-4, atol=1e-5)
        assert "QuickGELU" not in caplog.text
        wrong = teacher("vit_base_patch16_clip_224")(images).summary
    assert not torch.allclose(wrong, expected, rtol=1e-4, atol=1e-5)
    words = "trained with QuickGELU: use" if numbers else "does not say what it was trained with"
    assert words in caplog.text

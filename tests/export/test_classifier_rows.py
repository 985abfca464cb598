"""`export.text --classifier`: the classes of a teacher's own classifier, scored as that classifier
scores them.
"""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from yaml import safe_dump

from contract.errors import UserError
from distill.attach import main as attach
from distill.config import TeacherRuntime
from distill.evaluate.zero_shot import class_scores, read_classes
from distill.heads import load_head
from distill.models.weights import tensors_sha256
from distill.runs import load_run
from distill.teachers import build_teacher
from export.text.__main__ import main
from export.text.classifier_rows import find_classes
from export.text.tower import Label
from tests.conftest import run_here, small_recipe

LABELS = ("tabby cat", "Egyptian cat", "espresso", "missile", "n02012849")
NUMBERS = [281, 285, 967, 657, 134]


@pytest.fixture(scope="module")
def run(photo_folder, tmp_path_factory) -> Path:
    """A run of teachers with and without a classifier whose weights came from somewhere."""
    folder = tmp_path_factory.mktemp("rows")
    torch.manual_seed(3)
    names = {"cls": "resnet10t", "vit": "vit_tiny_patch16_224"}
    kwargs = {"cls": {}, "vit": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64}}
    teachers = []
    for label, name in names.items():
        net = timm.create_model(name, **kwargs[label])
        torch.nn.init.normal_(net.get_classifier().bias)
        state = {key: value.contiguous() for key, value in net.state_dict().items()}
        save_file(state, folder / f"{label}.safetensors")
        given = {key: value for key, value in kwargs[label].items() if key != "img_size"}
        teachers.append(
            {
                "name": name,
                "alias": label,
                "role": "classification",
                "image_size": 64,
                "kwargs": given,
                "checkpoint": str(folder / f"{label}.safetensors"),
            }
        )
    headless = {key: value for key, value in state.items() if not key.startswith("head.")}
    save_file(headless, folder / "headless.safetensors")
    teachers += [
        teachers[1] | {"alias": "block", "block": 0},
        teachers[1] | {"alias": "headless", "checkpoint": str(folder / "headless.safetensors")},
        {
            "name": "resnet10t",
            "alias": "random",
            "role": "dino",
            "pretrained": False,
            "image_size": 64,
        },
    ]
    recipe = small_recipe(photo_folder, method="plain", train={"steps": 1}) | {"teachers": teachers}
    (folder / "recipe.yaml").write_text(safe_dump(recipe))
    done = run_here(folder / "recipe.yaml", "--output", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def ask(run: Path, output: Path, *labels: str, classifier: str = "cls", more: tuple = ()):
    """Run the command on labels, a line each."""
    file = output.parent / "labels.txt"
    file.write_text("\n".join(labels) + "\n")
    given = ("--output", output, "--classifier", classifier, "--run", run, "--labels", file, *more)
    return run_here(*given, command=main)


def refused(done, *says: str) -> None:
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    ), done.stderr
    for words in says:
        assert words in done.stderr


@pytest.mark.parametrize("teacher", ["cls", "vit"])
def test_scores_are_the_teachers_own_logits(run, teacher, tmp_path):
    done = ask(run, tmp_path / "out", *LABELS, classifier=teacher)
    assert done.returncode == 0, done.stderr
    with safe_open(tmp_path / "out" / "class_embeddings.safetensors", framework="pt") as file:
        tensors, said = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    recipe = load_run(run).recipe
    index = next(n for n, config in enumerate(recipe.teachers) if config.label == teacher)
    net = build_teacher(recipe.teachers[index], TeacherRuntime(precision="fp32"), index)
    pixels = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        token, logits = net.encode(pixels).summary, net.net(pixels)[:, NUMBERS]
    scores = token @ tensors["embeddings"].T * tensors["norms"] + tensors["bias"]
    torch.testing.assert_close(scores, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tensors["embeddings"].norm(dim=1), torch.ones(len(LABELS)))
    assert (said["teacher"], said["source"], said["score"]) == (teacher, "classifier", "linear")
    assert json.loads(said["classes"]) == list(LABELS) and said["sha256"] == tensors_sha256(tensors)
    read = read_classes(tmp_path / "out" / "class_embeddings.safetensors", (LABELS[2], LABELS[0]))
    assert torch.equal(read.embeddings, tensors["embeddings"][[2, 0]])
    torch.testing.assert_close(class_scores(token, read), logits[:, [2, 0]], rtol=1e-4, atol=1e-4)


def test_a_teacher_s_classifier_can_be_a_head_of_the_student(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    words = ("--teacher", "vit", "--task", "classification", "--decoder", "classifier")
    done = run_here(copied, *words, command=attach)
    assert done.returncode == 0, done.stderr
    head = load_head(copied / "heads" / "classification.safetensors")
    recipe = load_run(run).recipe
    index = next(n for n, config in enumerate(recipe.teachers) if config.label == "vit")
    net = build_teacher(recipe.teachers[index], TeacherRuntime(precision="fp32"), index)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(head.module(net.encode(pixels).summary), net.net(pixels))
    assert (head.about["reads"], len(set(head.about["classes"]))) == ("vit", 1000)
    assert head.about["classes"][281] == "tabby"


def test_a_class_is_found_by_any_of_its_names_and_answers_by_the_users(run, tmp_path):
    done = ask(
        run,
        tmp_path / "out",
        "kitty\tTABBY",
        "n02124075",
        "projectile",
        "missile",
        "crane\tn03126707",
    )
    assert done.returncode == 0, done.stderr
    with safe_open(tmp_path / "out" / "class_embeddings.safetensors", framework="pt") as file:
        said = file.metadata()
    assert json.loads(said["classes"]) == ["kitty", "n02124075", "projectile", "missile", "crane"]
    labels = [
        Label(name, name, 1)
        for name in ("tabby", "n02124075", "projectile", "missile", "n03126707")
    ]
    assert find_classes(labels, 1000, Path("labels.txt")) == [281, 285, 744, 657, 517]


BAD = {
    "unknown label": (
        ("tabby kat",),
        "cls",
        (),
        ("labels.txt:1: 'tabby kat' is not a class", "did you mean 'tabby cat'?"),
    ),
    "a name of two": (
        ("espresso", "crane"),
        "cls",
        (),
        (":2: 'crane' names 2 classes", "n02012849 or n03126707"),
    ),
    "unknown teacher": (("espresso",), "clss", (), ("--classifier clss", "did you mean 'cls'?")),
    "random weights": (("espresso",), "random", (), ("no trained classifier",)),
    "weights without a head": (("espresso",), "headless", (), ("no trained classifier",)),
    "another block": (("espresso",), "block", (), ("reads something else",)),
    "CLIP's option": (("espresso",), "cls", ("--model", "ViT-B-16"), ("--model is for a CLIP",)),
    "no text": (("espresso",), "cls", ("--with-encoder",), ("--with-encoder is for a CLIP",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, run, tmp_path):
    labels, teacher, more, says = BAD[case]
    refused(ask(run, tmp_path / "out", *labels, classifier=teacher, more=more), *says)
    assert not (tmp_path / "out").exists()


def test_both_of_its_options_are_needed(tmp_path):
    refused(
        run_here("--output", tmp_path / "out", "--classifier", "cls", command=main),
        "--run is required",
    )
    refused(
        run_here("--output", tmp_path / "out", "--run", tmp_path, command=main),
        "--classifier is required",
    )


def test_classifiers_of_other_sizes_are_named_by_imagenets_larger_sets_or_refused():
    assert find_classes([Label("espresso", "espresso", 1)], 11821, Path("labels.txt"))
    with pytest.raises(UserError, match="needs an ImageNet head.*this one has 10"):
        find_classes([Label("espresso", "espresso", 1)], 10, Path("labels.txt"))

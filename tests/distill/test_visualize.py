"""Feature pictures: the components behind them, and the command."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from distill.figures import cosine_map, pca_figure, pca_rgb
from distill.methods.deployment import Deployment
from distill.runs import load_run
from distill.visualize import main
from tests.conftest import run_here


def test_pca_colours_are_the_leading_components_of_scikit_learn():
    from sklearn.decomposition import PCA

    maps = torch.randn(2, 8, 8, 16) * torch.logspace(0, -2, 16)
    rows = maps.reshape(-1, 16).double().numpy()
    scores = PCA(3, svd_solver="full").fit_transform(rows)
    colours = np.concatenate([part.reshape(-1, 3) for part in pca_rgb(list(maps))])
    inside = (colours > 0.02) & (colours < 0.98)
    for channel in range(3):
        kept = inside[:, channel]
        assert abs(np.corrcoef(colours[kept, channel], scores[kept, channel])[0, 1]) > 0.9999


def test_pca_colours_are_the_same_every_time_and_lie_in_range():
    maps = [torch.randn(4, 5, 8), torch.randn(2, 2, 8)]
    first, second = pca_rgb(maps), pca_rgb([m.clone() for m in maps])
    assert [part.shape for part in first] == [(4, 5, 3), (2, 2, 3)]
    assert all(
        np.array_equal(a, b) and a.min() >= 0 and a.max() <= 1
        for a, b in zip(first, second, strict=True)
    )


def test_constant_and_tiny_maps_have_colours_too():
    assert np.isfinite(pca_rgb([torch.ones(2, 2, 4)])[0]).all()
    assert pca_rgb([torch.randn(1, 2, 4)])[0].shape == (1, 2, 3)


def test_the_cosine_map_compares_every_patch_with_the_summary():
    patches, summary = torch.randn(3, 4, 5), torch.randn(5)
    expected = float(patches[1, 2] @ summary / (patches[1, 2].norm() * summary.norm()))
    found = cosine_map(summary, patches)
    assert found.shape == (3, 4) and found[1, 2] == pytest.approx(expected, rel=1e-4)


def test_a_figure_has_a_row_a_photograph_and_a_column_a_model(tmp_path):
    photos = [np.zeros((20, 20, 3), np.uint8)] * 2
    groups = [{"x": torch.randn(2, 4, 4, 8)}, {"y": torch.randn(2, 6, 6, 9)}]
    path = pca_figure(tmp_path / "plots" / "a.png", photos, groups)
    with Image.open(path) as image:
        assert image.width > image.height * 1.3


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, photo_folder):
    import yaml

    from tests.conftest import small_recipe

    folder = tmp_path_factory.mktemp("visualize")
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(small_recipe(photo_folder, train={"steps": 1}))
    )
    assert run_here(folder / "recipe.yaml", "--output", folder / "run").returncode == 0
    return folder / "run"


def test_the_command_draws_every_image_at_every_size(run_folder, photo_folder, tmp_path, capsys):
    photo = next(photo_folder.rglob("*.jpg"))
    assert (
        main([str(run_folder), str(photo), "--sizes", "64", "128", "--output", str(tmp_path)]) == 0
    )
    path = tmp_path / f"{photo.stem}_features.png"
    assert str(path) in capsys.readouterr().out
    with Image.open(path) as image:
        assert image.width > 1000 and image.height > 1000  # five columns, two pairs of rows


def test_wrong_arguments_are_one_line_and_status_two(run_folder, photo_folder, tmp_path, capsys):
    photo = str(next(photo_folder.rglob("*.jpg")))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    cases = {
        "no such file": [str(run_folder), "gone.jpg"],
        "cannot be read": [str(run_folder), str(tmp_path / "broken.jpg")],
        "it is not a run folder": [str(tmp_path), photo],
        "use 64 or 80": [str(run_folder), photo, "--sizes", "70"],
        "choose from backbone, cls, mae, dino": [str(run_folder), photo, "--outputs", "clip"],
    }
    for expected, arguments in cases.items():
        assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert expected in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_attention_is_drawn_by_networks_that_have_it(run_folder, photo_folder, tmp_path, capsys):
    photo = next(photo_folder.rglob("*.jpg"))
    arguments = [str(run_folder), str(photo), "--kind", "attention", "--output", str(tmp_path)]
    assert main(arguments) == 0
    path = tmp_path / f"{photo.stem}_attention.png"
    with Image.open(path) as image:
        alone = image.size
    assert "left out" not in capsys.readouterr().out
    assert main([*arguments, "--with-teachers", "--sizes", "64", "128"]) == 0
    said = capsys.readouterr().out
    assert "teacher cls is left out: it is no plain ViT" in said and str(path) in said
    with Image.open(path) as image:
        assert image.width == alone[0] and image.height == 6 * alone[1]  # three ViTs, two sizes


def test_a_cnn_students_attention_is_refused(photo_folder, tmp_path, capsys):
    import yaml

    from tests.conftest import small_recipe

    changes = {"student": {"name": "resnet10t", "kwargs": {}, "drop_path": 0.0}}
    changes["umt"] = {"token_dim": 64}
    recipe = small_recipe(photo_folder, train={"steps": 1}, **changes)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run_here(tmp_path / "recipe.yaml", "--output", tmp_path / "run").returncode == 0
    photo = str(next(photo_folder.rglob("*.jpg")))
    arguments = [str(tmp_path / "run"), photo, "--kind", "attention"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "has no global attention in its last block: choose a plain ViT" in error
    assert len(error.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_feature_space_of_student_and_teachers(run_folder, class_folders, tmp_path, capsys):
    arguments = [str(run_folder), "--kind", "tsne", "--with-teachers"]
    pictures = []
    for name in ("a", "b"):
        place = ["--data", str(class_folders), "--output", str(tmp_path / name)]
        assert main([*arguments, *place]) == 0
        pictures.append((tmp_path / name / "tsne.png").read_bytes())
    assert pictures[0] == pictures[1]
    with Image.open(tmp_path / "a" / "tsne.png") as image:
        assert image.width > 3 * image.height  # four networks
    # a folder of classes without splits, and one of pictures alone
    for data, points in ((class_folders / "train", "8"), (class_folders / "train" / "coins", "5")):
        place = ["--data", str(data), "--points", points, "--output", str(tmp_path / points)]
        assert main([*arguments[:3], *place]) == 0
        assert (tmp_path / points / "tsne.png").is_file()


def test_a_student_without_heads_and_teachers_is_drawn_alone(
    run_folder, class_folders, tmp_path, monkeypatch, capsys
):
    whole = load_run(run_folder)
    deployed = whole.method.deploy()
    bare = Deployment(deployed.preprocess, deployed.student, torch.nn.Identity(), {})
    monkeypatch.setattr(whole.method, "deploy", lambda: bare)
    recipe = whole.recipe.model_copy(update={"teachers": []})
    alone = dataclasses.replace(whole, recipe=recipe)
    for module in ("distill.visualize", "distill.evaluate.cast"):
        monkeypatch.setattr(f"{module}.load_run", lambda *_, **__: alone)
    photo = str(next(class_folders.rglob("*.png")))
    for arguments in (
        [photo, "--sizes", "64"],
        [photo, "--kind", "attention", "--with-teachers"],
        ["--kind", "tsne", "--with-teachers", "--data", str(class_folders)],
    ):
        assert main([str(run_folder), *arguments, "--output", str(tmp_path)]) == 0
    stem = photo.rpartition("/")[2].removesuffix(".png")
    names = {f"{stem}_features.png", f"{stem}_attention.png", "tsne.png"}
    assert names <= {path.name for path in tmp_path.iterdir()}


def test_kinds_take_their_own_arguments(run_folder, photo_folder, class_folders, tmp_path, capsys):
    run, photo = str(run_folder), str(next(photo_folder.rglob("*.jpg")))
    (tmp_path / "empty").mkdir()
    data = ["--data", str(class_folders)]
    cases = {
        "name at least one IMAGE": [run],
        "draws photographs: name at least one": [run, "--kind", "attention"],
        "--with-teachers goes with --kind attention or tsne": [run, photo, "--with-teachers"],
        "--data goes with --kind tsne, not attention": [run, photo, "--kind", "attention", *data],
        "--outputs goes with --kind features": [run, "--kind", "tsne", "--outputs", "cls", *data],
        "IMAGE goes with --kind features or attention": [run, photo, "--kind", "tsne", *data],
        "--kind tsne needs pictures: add --data ROOT": [run, "--kind", "tsne"],
        "--points 3 is too few": [run, "--kind", "tsne", *data, "--points", "3"],
        "--data nowhere: no such folder": [run, "--kind", "tsne", "--data", "nowhere"],
        "empty has no pictures": [run, "--kind", "tsne", "--data", str(tmp_path / "empty")],
        "gone: no such run folder": ["gone", "--kind", "tsne", *data],
        "use 64 or 80": [run, photo, "--kind", "attention", "--sizes", "70"],
    }
    for expected, arguments in cases.items():
        assert main([*arguments, "--output", str(tmp_path / "out")]) == 2, expected
        error = capsys.readouterr().err
        assert expected in error and len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


def test_a_damaged_student_file_is_refused_by_its_hash(run_folder, photo_folder, tmp_path, capsys):
    data = bytearray((run_folder / "student.safetensors").read_bytes())
    data[-100] ^= 1
    (tmp_path / "student.safetensors").write_bytes(data)
    assert main([str(tmp_path), str(next(photo_folder.rglob("*.jpg")))]) == 2
    assert "does not match its recorded sha256" in capsys.readouterr().err
    (tmp_path / "student.safetensors").write_bytes(data[: len(data) // 2])
    assert main([str(tmp_path), str(next(photo_folder.rglob("*.jpg")))]) == 2
    assert "damaged or half-written" in capsys.readouterr().err

"""Small real encoders for the evaluation tests."""

from pathlib import Path

import pytest

from distill.evaluate.encoder import Encoder, parse_model, teacher_encoder
from distill.pictures import PackagedPhotos
from distill.scenes import write


@pytest.fixture(scope="session")
def tiny_vit() -> Encoder:
    """A random ViT of stride 16 at 64 px, 48 channels, two blocks."""
    config = parse_model("vit_tiny_patch16_224@random")
    kwargs = {"embed_dim": 48, "depth": 2, "num_heads": 2}
    return teacher_encoder(config.model_copy(update={"kwargs": kwargs}), size=64, name="tiny-vit")


@pytest.fixture(scope="session")
def tiny_cnn() -> Encoder:
    """A random ResNet of stride 32 at 64 px."""
    return teacher_encoder(parse_model("resnet10t@random"), size=64, name="tiny-cnn")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes of 64 px: 24 to learn from, 8 to score on."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write(folder, train=24, val=8, size=64, seed=0)
    return folder


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of two real photographs, a class each: 12 to learn from, 6 to score on, easily told apart."""
    root = tmp_path_factory.mktemp("classes")
    photos = PackagedPhotos()
    names = {"chelsea": "chelsea.png", "coins": "coins.png"}
    numbers = {photos.name(number): number for number in range(len(photos))}
    for label, file in names.items():
        photo = photos.load(numbers[file])
        for index in range(9):
            left, top = 12 * index, 8 * index
            crop = photo.crop((left, top, left + 160, top + 160)).resize((80, 80))
            path = root / ("train" if index < 6 else "val") / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            crop.save(path)
    return root

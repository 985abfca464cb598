"""Data sets as their authors pack them: what is read, picture by picture, and what is refused."""

import pickle
import shutil

import numpy as np
import pytest
import scipy.io
from PIL import Image

from contract.errors import UserError
from distill.evaluate.archives import archive_of, open_labelled
from distill.evaluate.plain_pickle import read_pickle
from tests.distill.evaluate.published import (
    FLOWERS,
    picture,
    python2_pickle,
    write_cifar10,
    write_cifar100,
    write_class_folders,
    write_flowers,
    write_pets,
)


def test_the_pickles_of_these_tests_are_what_python_reads():
    values = {"a": "text", "n": 70000, "l": [1, 300], "x": np.arange(6, dtype=np.uint8)[None]}
    found = pickle.loads(python2_pickle(values), encoding="latin1")
    assert found.pop("x").tolist() == values.pop("x").tolist() and found == values


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_stay_arrays(tmp_path, protocol):
    path = tmp_path / "batch"
    array = np.arange(12, dtype=np.int16).reshape(3, 4)
    path.write_bytes(pickle.dumps({"x": array, "f": np.asfortranarray(array)}, protocol=protocol))
    found = read_pickle(path, arrays=True)
    assert all(value.dtype == np.int16 and (value == array).all() for value in found.values())


def test_cifar10_is_five_batches_against_one(tmp_path):
    root = write_cifar10(tmp_path / "anything")
    train, val = open_labelled(root, "train"), open_labelled(root, "val")
    assert archive_of(root) == "CIFAR-10"
    assert (len(train), len(val)) == (30, 6) and train.classes == ("class_0", "class_1", "class_2")
    for split, first in ((train, 0), (val, 30)):
        for number in range(len(split)):
            label = number % 3
            assert split.labels[number] == label
            assert (np.array(split.picture(number)) == picture(label, first + number, 32)).all()
    assert train.fingerprint() != val.fingerprint()


def test_cifar100_has_fine_labels(tmp_path):
    root = write_cifar100(tmp_path / "cifar-100-python")
    train, val = open_labelled(root, "train"), open_labelled(root, "val")
    assert train.classes == ("fine_0", "fine_1", "fine_2", "fine_3")
    assert train.labels.tolist() == val.labels.tolist() == [0, 1, 2, 3] * 3
    assert (np.array(val.picture(5)) == picture(1, 12 + 5, 32)).all()


def test_newer_pickles_of_cifar_are_read_too(tmp_path):
    root = write_cifar100(tmp_path / "cifar")
    for name in ("train", "test", "meta"):
        content = pickle.loads((root / name).read_bytes(), encoding="latin1")
        as_bytes = {key.encode(): value for key, value in content.items()}
        (root / name).write_bytes(pickle.dumps(as_bytes))
    again = open_labelled(root, "val")
    assert again.classes[1] == "fine_1"
    assert (np.array(again.picture(5)) == picture(1, 12 + 5, 32)).all()


def test_flowers_learns_from_two_lists_and_is_scored_on_the_third(tmp_path):
    root = write_flowers(tmp_path / "flowers-102")
    train, val = open_labelled(root, "train"), open_labelled(root, "val")
    assert train.classes == val.classes == ("1", "2", "3")
    for split, parts in ((train, ("trnid", "valid")), (val, ("tstid",))):
        numbers = sorted(number for part in parts for number in FLOWERS[part])
        assert split.labels.tolist() == [(number - 1) // 4 for number in numbers]
        for place, number in enumerate(numbers):
            with Image.open(root / "jpg" / f"image_{number:05d}.jpg") as truth:
                assert (np.array(split.picture(place)) == np.array(truth)).all()


def test_pets_are_called_what_their_pictures_are(tmp_path):
    root = write_pets(tmp_path / "oxford-iiit-pet")
    train, val = open_labelled(root, "train"), open_labelled(root, "val")
    assert train.classes == val.classes == ("Abyssinian", "american_bulldog", "Bengal")
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert val.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert val.files[2].endswith("images/american_bulldog_5.jpg")


def test_class_folders_are_what_they_were(tmp_path):
    root = write_class_folders(tmp_path / "flowers-102")  # whatever the folder is called
    assert archive_of(root) is None and open_labelled(root, "val").classes == ("dark", "red")


def spoil_cifar(name: str, **changes):
    def spoil(root) -> None:
        content = pickle.loads((root / name).read_bytes(), encoding="latin1")
        for key, value in changes.items():
            content[key] = value(content[key])
        (root / name).write_bytes(python2_pickle(content))

    return spoil


def remove(*names: str):
    def spoil(root) -> None:
        for name in names:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def write(name: str, content: bytes):
    return lambda root: (root / name).write_bytes(content)


def mat(name: str, **values):
    return lambda root: scipy.io.savemat(root / name, values)


MISTAKES = {
    "no batch": (
        write_cifar10,
        remove("data_batch_2", "data_batch_4"),
        "lacks data_batch_2, data_batch_4: unpack cifar-10-python.tar.gz again",
    ),
    "no meta": (write_cifar100, remove("meta"), "lacks meta: unpack cifar-100-python"),
    "torn batch": (
        write_cifar10,
        write("data_batch_3", b"\x80\x02}("),
        "data_batch_3 is not a readable pickle .*: download it again",
    ),
    "hostile": (
        write_cifar10,
        write("data_batch_1", b"\x80\x02cposix\nsystem\nU\x02id\x85R."),
        "refers to posix.system, which plain data do not need: use the official file",
    ),
    "few pixels": (
        write_cifar10,
        spoil_cifar("data_batch_1", data=lambda data: data[:, :3000].copy()),
        "data_batch_1 does not hold 6 pictures of 32x32 pixels",
    ),
    "few pictures": (
        write_cifar100,
        spoil_cifar("train", data=lambda data: data[:-1].copy()),
        "train does not hold 12 pictures",
    ),
    "odd label": (
        write_cifar100,
        spoil_cifar("train", fine_labels=lambda labels: [*labels[:-1], 4]),
        "train has label 4, but meta names 4 classes",
    ),
    "no labels": (
        write_cifar100,
        write("train", python2_pickle({"data": np.zeros((1, 3072), np.uint8)})),
        "train has no fine_labels",
    ),
    "no setid": (write_flowers, remove("setid.mat"), "lacks setid.mat: unpack 102flowers.tgz"),
    "no jpg": (write_flowers, remove("jpg"), "lacks jpg: unpack 102flowers.tgz"),
    "no flower": (
        write_flowers,
        remove("jpg/image_00006.jpg", "jpg/image_00009.jpg"),
        "image_00006.jpg is missing, one of 2: unpack 102flowers.tgz",
    ),
    "torn mat": (write_flowers, write("setid.mat", b"MATLAB 5.0"), "setid.mat is not a MATLAB"),
    "other mat": (write_flowers, mat("setid.mat", trnid=[1]), "setid.mat has no numbers valid"),
    "far picture": (
        write_flowers,
        mat("setid.mat", trnid=[1, 13], valid=[2], tstid=[3]),
        "setid.mat has picture 13, but imagelabels.mat has labels of 12",
    ),
    "label 0": (write_flowers, mat("imagelabels.mat", labels=[0] * 12), "has label 0"),
    "no images": (write_pets, remove("images"), "lacks images: unpack images.tar.gz and annot"),
    "no list": (
        write_pets,
        remove("annotations/trainval.txt"),
        "lacks annotations/trainval.txt: unpack",
    ),
    "no pet": (write_pets, remove("images/Bengal_2.jpg"), "Bengal_2.jpg is missing, one of 1"),
    "odd line": (
        write_pets,
        write("annotations/trainval.txt", b"Bengal_2 x 1 1\n"),
        "trainval.txt: 'Bengal_2 x 1 1' is not a line of NAME CLASS SPECIES BREED",
    ),
    "empty list": (write_pets, write("annotations/test.txt", b"\n"), "test.txt lists no picture"),
    "other class": (
        write_pets,
        write("annotations/test.txt", b"Bengal_5 1 1 1\n"),
        "Bengal_5 has class 1, which in trainval.txt is Abyssinian",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(tmp_path, case):
    make, spoil, words = MISTAKES[case]
    root = make(tmp_path / "data")
    spoil(root)
    with pytest.raises(UserError, match=words) as caught:
        open_labelled(root, "train"), open_labelled(root, "val")
    assert "\n" not in str(caught.value)


def test_a_folder_of_the_usual_name_says_what_it_lacks(tmp_path):
    (tmp_path / "oxford-iiit-pet" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match="lacks annotations/trainval.txt, annotations/test.txt"):
        open_labelled(tmp_path / "oxford-iiit-pet", "train")

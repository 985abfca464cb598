"""What counts as a picture: in folders of real machines, and in tar shards of samples."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contract.errors import UserError
from contract.members import choose
from contract.picture_files import Names, picture_files
from contract.tars import CACHE_VARIABLE
from distill.data.pictures import FolderPictures, WebDatasetPictures
from distill.evaluate.datasets import open_classes

APPLE_DOUBLE = b"\0\5\x16\7Mac OS X" + bytes(90)


def encoded(shade: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 12), (shade, 90, 90)).save(file, kind)
    return file.getvalue()


def shades(pictures: WebDatasetPictures) -> list[int]:
    """The red of every picture: which ones they are, whatever they are called."""
    reds = (np.asarray(pictures.load(n))[..., 0].mean() for n in range(len(pictures)))
    return [10 * round(red / 10) for red in reds]  # JPEG rounds


def pictures_in(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(90))
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]], **options) -> str:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def test_what_systems_leave_in_a_folder_is_not_data(tmp_path, caplog):
    real = ("a.jpg", "b.JPG", "sub/c.jfif", "sub/d.Png")
    left = ("._a.jpg", ".ipynb_checkpoints/a.jpg", "__MACOSX/sub/._c.jpg", "@eaDir/a.jpg")
    pictures_in(
        tmp_path, *real, *left, ".hidden/a.jpg", "sub/Thumbs.db", "sub/e.heic", "desktop.ini"
    )
    pictures = FolderPictures(tmp_path)
    assert [os.path.relpath(pictures.name(n), tmp_path) for n in range(len(pictures))] == sorted(
        real
    )
    assert "left out, as they cannot be read here: 1 .heic" in caplog.text


def test_links_are_followed_but_no_folder_is_read_twice(tmp_path):
    root = pictures_in(tmp_path / "root", "a/1.jpg", "a/2.jpg", "b/3.jpg")
    outside = pictures_in(tmp_path / "store", "4.jpg", "deep/5.jpg")
    for place, target in (
        ("a/up", ".."),
        ("b/loop", "../a"),
        ("a/self", "."),
        ("a/above", str(tmp_path)),
        ("b/more", str(outside)),
    ):
        (root / place).symlink_to(target, target_is_directory=True)
    names = sorted(Path(path).name for path in picture_files(root))
    assert names == ["1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"]


def test_evaluation_reads_the_pictures_of_training_and_needs_every_one(tmp_path):
    for name in "ab":
        pictures_in(tmp_path / "train" / name, "1.jpg", ".ipynb_checkpoints/1.jpg", "._1.jpg")
        pictures_in(tmp_path / "store" / name, "2.jpg", "3.JPEG")
        (tmp_path / "train" / name / "more").symlink_to(tmp_path / "store" / name)
    (tmp_path / "train" / "a" / "up").symlink_to(tmp_path / "train")
    split = open_classes(tmp_path, "train")
    assert split.labels.tolist() == [0] * 3 + [1] * 3 and split.classes == ("a", "b")
    assert sorted(split.files) == sorted(FolderPictures(tmp_path / "train").files)
    (tmp_path / "train" / "b" / "gone.jpg").symlink_to("/nonexistent")
    pictures = FolderPictures(tmp_path / "train")
    assert len(pictures) == 7 and len(pictures.fingerprint()) == 64
    with pytest.raises(UserError, match="gone.jpg is a link to nothing"):
        open_classes(tmp_path, "train")


def test_names_are_those_of_a_list_in_a_buffer(tmp_path):
    plain = ["a/b.jpg", "", "ü ß.png", "bad\udcff.jpg"]
    names = Names(plain)
    assert list(names) == plain and names[-1] == plain[3] and names[1:3] == plain[1:3]
    assert len(Names([])) == 0 and names.nbytes < 100
    with pytest.raises(IndexError):
        names[4]


def test_one_picture_of_a_sample_is_trained_on(tmp_path, caplog):
    mask = encoded(0, "PNG")
    members = [("readme", b"x"), ("./._0.jpg", APPLE_DOUBLE), (".hidden/9.jpg", encoded(9))]
    for number in range(3):
        key = f"./part.1/{number:03d}"
        members += [(f"{key}.seg.png", mask), (f"{key}.JPG", encoded(100 + 10 * number))]
        members += [(f"{key}.depth.png", mask), (f"{key}.png", mask), (f"{key}.cls", b"3")]
        members += [(f"{key}_mask.png", mask), (f"{key}.json", b"{}"), (f"{key}.txt", b"a cat")]
    members += [("s.rgb.png", encoded(130, "PNG")), ("s.depth.png", mask), ("s.b.png", mask)]
    members += [("my.cat.1.jpg", encoded(140)), ("my.cat.2.jpg", encoded(150))]  # only dots
    with caplog.at_level("INFO"):
        pictures = WebDatasetPictures(write_tar(tmp_path / "a.tar", members))
    assert shades(pictures) == [100, 110, 120, 130, 140, 150]
    assert "left out beside it: 1 .b.png, 4 .depth.png, 6 .png, 3 .seg.png" in caplog.text


@pytest.mark.parametrize(
    "kept",
    [
        [f"2023.05.01_img_{number}.jpg" for number in range(8)],
        [f"J.Smith_photo_{number}.png" for number in range(8)],
        [f"cell.label{number}.png" for number in range(8)],
        [f"cell.mask.{number}.png" for number in range(8)],
        ["photo.2023-1.img.jpg", "photo.2023-2.img.jpg"],
        ["mask/1.png", "cat/1.png", "dog/1.png", "normal/2.png", "ill/2.png", "mask/3.jpg"],
    ],
)
def test_pictures_whose_names_have_dots_or_words_of_maps_are_all_trained_on(kept):
    assert choose(kept) == (kept, {}, {})


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        ("images/1.jpg", ["masks/1.png", "labels/1.png", "annotations/1.png"]),
        ("train/raw/1.jpg", ["train/masks/1.png", "train/depth/1_depth.png"]),
        ("1.jpg", ["masks/1.png", "1_mask_0.png", "mask_1.png", "1_depth_map.png"]),
        ("1.orig.jpg", ["1.depthmap.png", "1.semseg.png", "1.instance_mask.png", "1.seg.0.png"]),
        ("d.2023.05.01.jpg", ["d.2023.05.01_mask.png"]),
        ("s/rgb_7.jpg", ["s/sync_depth_7.png"]),
        ("s/rgb.png", ["s/depth.png", "s/labels.png"]),
        (
            "leftImg8bit/val/a/a_0_leftImg8bit.png",
            ["gtFine/val/a/a_0_gtFine_color.png", "gtFine/val/a/a_0_gtFine_labelIds.png"],
        ),
    ],
)
def test_maps_of_a_picture_are_not_trained_on_wherever_their_names_say_so(kept, left):
    names, counts, crowded = choose([*left, kept])
    assert names == [kept] and counts.total() == len(left) and not crowded


def test_a_sample_of_many_pictures_and_a_shard_listed_twice_are_said(tmp_path, caplog):
    members = [(f"{n}.seg.png", b"") for n in range(2)] + [("a.jpg", encoded(50))]
    members += [(f"a.{n:02d}.jpg", encoded(60)) for n in range(40)]
    path = write_tar(tmp_path / "a.tar", members)
    (tmp_path / "b.tar").symlink_to(path)
    with caplog.at_level("INFO"):
        pictures = WebDatasetPictures([str(tmp_path / "*.tar"), path])
    assert shades(pictures) == [50]
    assert "2 tar files of data.path are listed more than once" in caplog.text
    assert "40 pictures of sample 'a' are left out" in caplog.text
    assert "2 .seg.png, 33 of 33 other kinds" in caplog.text
    before = pictures.fingerprint()
    os.utime(path, (1, 1))
    assert pictures.fingerprint() != before


def test_links_duplicates_and_long_names_inside_a_tar_file(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "ü"}) as tar:

        def add(name: str, content: bytes = b"", **about) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in about.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content))

        add("d.jpg", type=tarfile.DIRTYPE)
        add("d.jpg/1.jpg", encoded(10))
        add("d.jpg/1.jpg", encoded(20))  # of two members of one name tar -x leaves the last
        add("x" * 150 + "ü.jpg", encoded(30))
        add("hard.jpg", type=tarfile.LNKTYPE, linkname="d.jpg/1.jpg")
        add("d.jpg/soft.jpg", type=tarfile.SYMTYPE, linkname="../hard.jpg")
        add("gone.jpg", type=tarfile.SYMTYPE, linkname="/nonexistent.jpg")
    assert sorted(shades(WebDatasetPictures(str(path)))) == [20, 20, 20, 30]


def test_a_tar_file_that_is_not_whole_is_an_error_wherever_it_ends(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [(f"{n}.jpg", encoded(n)) for n in range(4)])
    content = Path(whole).read_bytes()
    end = len(content.rstrip(b"\0"))
    part = tmp_path / "part.tar"
    boundary = -(-end // 512) * 512
    for cut in (*range(600, end, 311), *range(512, boundary + 1, 512)):
        part.write_bytes(content[:cut])
        with pytest.raises(UserError, match="part.tar.*copy it again"):
            WebDatasetPictures(str(part))
    header = content.index(b"2.jpg")
    spoilt = bytearray(content)
    spoilt[header : header + 512] = bytes([1]) * 512
    for name, bad, words in (
        ("header", bytes(spoilt), "damaged at byte"),
        ("joined", content + content, "goes on after its end marker.*tar -A"),
        ("zeros", content[: content.index(b"2.jpg")] + bytes(1 << 21), "are zero: its copy was"),
        ("packed", gzip.compress(content), "compressed with gzip, unpack it with `gunzip`"),
    ):
        (tmp_path / f"{name}.tar").write_bytes(bad)
        with pytest.raises(UserError, match=words):
            WebDatasetPictures(str(tmp_path / f"{name}.tar"))


def test_an_index_is_kept_until_its_tar_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    path = write_tar(tmp_path / "a.tar", [("1.jpg", encoded(50)), ("1.seg.png", encoded(0, "PNG"))])
    first = WebDatasetPictures(path)
    (kept,) = (tmp_path / "cache" / "tars").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # not read again
        again = WebDatasetPictures(path)
    assert again.fingerprint() == first.fingerprint() and shades(again) == [50]
    kept.write_bytes(b"torn")
    assert shades(WebDatasetPictures(path)) == [50]
    write_tar(tmp_path / "a.tar", [("1.jpg", encoded(60)), ("2.jpg", encoded(70))])
    assert shades(WebDatasetPictures(path)) == [60, 70]
    monkeypatch.setenv(CACHE_VARIABLE, "/proc/nowhere")  # a cache that cannot be written
    assert shades(WebDatasetPictures(path)) == [60, 70]

"""More shards than a process may have files open, and machines in trouble."""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from contract.errors import UserError, exit_status, machine_trouble
from contract.views import EVALUATED
from distill.data.batches import prefetch_factor
from distill.data.crops import IMAGE, MAIN, View
from distill.data.open_files import Pool
from distill.data.pictures import FolderPictures, WebDatasetPictures
from distill.evaluate import dense, finetune, robustness
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.datasets import open_classes
from distill.evaluate.extract import Extracted, whole
from distill.evaluate.reading import read_picture
from distill.models.weight_files import read_state_dict
from distill.teachers.cache import Spec, TeacherCache
from distill.training.checkpoint import load_checkpoint
from tests.distill.data.test_files import encoded, shades, write_tar

SHARDS = 120


class _Sized:
    """Samples of a head: 32 x 32 pixels and as many labels."""

    keep = False

    def __len__(self) -> int:
        return 4

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        return (torch.zeros(3, 32, 32, dtype=torch.uint8), 0), torch.zeros(32, 32)


@pytest.fixture
def few_files() -> Iterator[int]:
    """Let this process open some 80 files more than it has; half as many as the tests have
    shards.
    """
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 80
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_any_number_of_tar_shards_is_read(tmp_path, few_files):
    for number in range(SHARDS):
        write_tar(tmp_path / f"{number:03d}.tar", [("1.jpg", encoded(10 * (number % 20)))])
    pictures = WebDatasetPictures(str(tmp_path / "*.tar"))
    expected = [10 * (number % 20) for number in range(SHARDS)]
    assert shades(pictures) == expected and shades(pictures) == expected


def test_any_number_of_shards_of_features_is_read(tmp_path, few_files):
    view = View(IMAGE, 8, scale=(0.3, 1.0))
    cache = TeacherCache(tmp_path, 1, SHARDS, 1, {"a": Spec(view, {"summary": (2,)})})
    for shard in range(SHARDS):
        row = np.full((1, 2), shard, np.float16)
        np.save(tmp_path / f"shard_{shard:06d}.a.summary.npy", row)
        np.save(tmp_path / f"shard_{shard:06d}.patches.npy", row)
    for _ in range(2):
        rows = [cache.rows(MAIN, n, 0).view(torch.float16)[0].item() for n in range(SHARDS)]
        assert rows == list(range(SHARDS))
    del cache  # each keeps half of the files that may be open here
    extracted = Extracted(tmp_path, SHARDS, 1)
    for _ in range(2):
        assert extracted.patches(range(SHARDS))[:, 1].tolist() == list(range(SHARDS))


def test_a_pool_closes_what_was_used_longest_ago(tmp_path):
    pool: Pool[int] = Pool(most=2)
    first, _ = (pool.get(n, lambda: os.open(tmp_path, os.O_RDONLY)) for n in "ab")
    assert pool.get("a", lambda: pytest.fail("it is open")) == first
    third = pool.get("c", lambda: os.open(tmp_path, os.O_RDONLY))  # takes the number of b
    assert len(pool) == 2 and os.fstat(first) and os.fstat(third)
    del pool
    with pytest.raises(OSError):
        os.fstat(third)


def test_good_files_are_not_called_damaged_where_no_more_can_be_opened(tmp_path, few_files, capsys):
    tar = write_tar(tmp_path / "a.tar", [("1.jpg", encoded(50))])
    (tmp_path / "1.jpg").write_bytes(encoded(50))
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    (tmp_path / "step_00000001.json").write_text(json.dumps({"sha256": "0"}))
    (tmp_path / "shard_000000.json").write_text(json.dumps({"summary": "0"}))
    np.save(tmp_path / "shard_000000.a.summary.npy", np.zeros((1, 2), np.float16))
    folder, tars = FolderPictures(tmp_path), WebDatasetPictures(tar)
    view = View(IMAGE, 8, scale=(0.3, 1.0))
    cache = TeacherCache(tmp_path, 1, 1, 1, {"a": Spec(view, {"summary": (2,)})})
    held = []
    with pytest.raises(OSError):
        while True:
            held.append(os.open(tmp_path, os.O_RDONLY))
    ways = [
        lambda: folder.load(0),
        lambda: tars.load(0),
        lambda: WebDatasetPictures(tar),
        lambda: cache.rows(MAIN, 0, 0),
        lambda: load_checkpoint(tmp_path),
        lambda: whole(tmp_path, 0, ("summary",)),
        lambda: read_picture(tmp_path / "1.jpg"),
        lambda: read_state_dict(tmp_path / "w.pth"),
    ]
    try:
        statuses = [exit_status(way) for way in ways]
    finally:
        for file in held:
            os.close(file)
    messages = capsys.readouterr().err.splitlines()
    assert statuses == [2] * len(messages) == [2] * len(ways)
    for message in messages:
        assert "Too many open files (raise `ulimit -n`" in message
        assert not any(word in message for word in ("delete", "damaged", "remove", "again"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EIO, "x"), "its disk or the connection to it fails"),
        (OSError(errno.ESTALE, "x"), "mount the network folder again"),
        (OSError(errno.EACCES, "x"), "check its permissions"),
        (RuntimeError("unable to mmap 5 bytes: Cannot allocate memory (12)"), "free some memory"),
        (ValueError("header: No space left on device (os error 28)"), "free some space"),
        (MemoryError(), "free some memory"),
        (OSError("out of memory when reading image file"), "free some memory"),
        (RuntimeError("a\n[Errno 28] No space left on device: 'x'"), "free some space"),
        (OSError(errno.ENOENT, "x"), None),
        (OSError("broken data stream: Something (5)"), None),
        (ValueError("chunk (12) is damaged: Bad marker (5), [Errno 5] of 7"), None),
        (ValueError("mmap length is greater than file size"), None),
    ],
)
def test_what_says_nothing_about_a_file_is_told_apart(error, words):
    reason = machine_trouble(error)
    assert reason is None if words is None else words in reason


def test_as_many_batches_are_prepared_as_shared_memory_holds():
    about = os.statvfs("/dev/shm")
    free = about.f_bavail * about.f_frsize
    assert prefetch_factor(10, 0) is None and prefetch_factor(10, 2) == 4
    assert prefetch_factor(free // 7, 2) in (2, 3)
    with pytest.raises(UserError, match="/dev/shm has .* MB free, but 2 workers need .*shm-size"):
        prefetch_factor(free // 2, 2)


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda encoder, data, config: finetune.evaluate(encoder, data, config, data),
        lambda encoder, data, config: finetune._predict(
            encoder.net, encoder, open_classes(data, "val"), config
        ),
        lambda encoder, data, config: robustness.live(encoder.net, config)(
            robustness.Pictures(data, sorted(data.rglob("*.jpg")), 32, EVALUATED, "x")
        ),
        lambda encoder, data, config: dense.train_head(
            torch.nn.Linear(1, 1), None, _Sized(), None, config, encoder.device
        ),
    ],
    ids=["finetune", "predict", "robustness", "dense"],
)
def test_every_loader_of_evaluation_keeps_to_shared_memory(
    tiny_vit, tmp_path, monkeypatch, evaluate
):
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "1.jpg").write_bytes(encoded(50))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # a share that holds no batch
        monkeypatch.setenv(name, "99999999")
    config = EvaluationConfig(extract={"workers": 2, "batch_size": 8})
    with pytest.raises(UserError, match=r"/dev/shm has 0 MB free .* but \d workers? needs?"):
        evaluate(tiny_vit, tmp_path, config)


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    about = os.statvfs("/dev/shm")
    batch = about.f_bavail * about.f_frsize // 13
    assert prefetch_factor(batch, 2) == 4
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    with pytest.raises(UserError, match="MB free for each of 6 processes, but 2 workers need"):
        prefetch_factor(batch, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert prefetch_factor(batch, 2) == 2


@pytest.mark.slow
def test_workers_run_in_a_shared_memory_of_48_mb(tmp_path):
    """Batches of 6 MB from two workers, eight of which would not fit."""
    script = f"""
import numpy as np, torch
from PIL import Image
from distill.config import DataConfig
from distill.data.batches import StreamBatches, batch_bytes, make_loader
from distill.data.crops import IMAGE, MAIN, CropDataset, View
from distill.data.pictures import FolderPictures
Image.new("RGB", (64, 64)).save({str(tmp_path / "1.png")!r})
views, sizes = [View(IMAGE, 512, scale=(0.3, 1.0))], {{MAIN: 8}}
pictures = FolderPictures({str(tmp_path)!r})
dataset = CropDataset(pictures, DataConfig(path={str(tmp_path)!r}), views, 0)
batches = StreamBatches(1, 8, sizes, 9)
loader = make_loader(dataset, batches, 2, False, batch_bytes(views, sizes))
print(loader.prefetch_factor, sum(len(batch.views[IMAGE]) for batch in loader))
"""
    path = Path(tmp_path, "script.py")
    path.write_text(script)
    mount = 'mount -t tmpfs -o size=48m tmpfs /dev/shm && exec "$@"'
    command = ("unshare", "--mount", "/bin/sh", "-c", mount, "sh", sys.executable, str(path))
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip("this user may not mount file systems")
    assert done.stdout == "3 72\n", done.stderr

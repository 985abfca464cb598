"""10,000 changed manifests and JSON files of a bundle, read by everything that reads bundles:
nothing is written but the repository, nothing is opened but the bundle, and nothing is run.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic_core import to_json
from safetensors.numpy import load, save

from contract.bundle_check import encoder_problem
from contract.errors import UserError
from contract.files import file_sha256
from contract.golden import GOLDEN, compare, read_golden
from contract.manifest import MANIFEST, _seal, read_manifest
from contract.text_encoder import TEXT_ENCODER
from export.check import check
from export.tensorrt.build import record_path, verify_engine
from serve.bundle import Bundle, read_bundle
from serve.repository.build import make_repository
from serve.repository.contents import MADE_WITH, MadeWith, foreign_file, read_made_with
from serve.repository.models import build_models
from serve.repository.settings import Settings
from serve.repository.zero_shot import EMBEDDINGS, zero_shot_parts
from tests.conftest import long_case
from tests.serve.made_bundle import EMBEDDED, embeddings, graph_bytes, make_bundle

ROOT = Path(__file__).resolve().parents[2]
OURS = {path for folder in ("triton_models", "contract") for path in (ROOT / folder).rglob("*.py")}
"""Of all code that a repository may hold."""

NAMES = (
    "../../outside",
    "/tmp/outside",
    "head_/../../outside",
    "model.py",
    "graph_model.py",
    "config.pbtxt",
    "1/model.py",
    "a\x00b",
    "a\nb",
    ".",
    "..",
    "",
    "é",
    "features",
    "decode",
    "zero_shot",
    "CON",
    "x" * 5000,
    MANIFEST,
    "backbone",
    "fused",
)
VALUES = (*NAMES, -1, 0, 1, 2**40, 2**70, 1.5, float("inf"), None, True, [], {}, ["a"], {"a": "b"})
RUNS = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "pickle.find_class",
    "socket.connect",
    "socket.bind",
}
"""What Python tells its auditors of before it is done: other programs, pickles' code, networks."""
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod"}


class Watch:
    """Keeps what happens to files and processes while it is on: hooks cannot be taken away."""

    def __init__(self) -> None:
        self.place, self.seen, self.on = Path(), [], False
        sys.addaudithook(self.hear)

    def hear(self, event: str, values: tuple) -> None:
        if not self.on:
            return
        if event in RUNS or event.startswith("ctypes.dlopen") and values[0] is not None:
            self.seen.append((event, values))
        elif event in ("exec", "compile"):
            name = str(getattr(values[0], "co_filename", values[-1]))
            if name.startswith(str(self.place)):
                self.seen.append((event, name))
        elif event == "open" and isinstance(values[0], str | bytes):
            path, _, flags = values
            path = Path(path.decode() if isinstance(path, bytes) else path)
            self.judge(path, "read" if not flags & 0o103 else "written")
        elif event in CHANGES:
            for value in values:
                if isinstance(value, str) and value:
                    self.judge(Path(value), event)

    def judge(self, path: Path, what: str) -> None:
        """Keep what is done outside the bundle and the output; reading our own code is no sin."""
        inside = [self.place / "bundle", self.place / "out"]
        if what == "read" and not path.is_relative_to(self.place):
            inside += [ROOT, Path(sys.prefix), Path(sys.base_prefix), Path("/proc"), Path("/etc")]
        elif what != "read":
            inside = [self.place / "out"]
        if path.is_absolute() and not any(path.is_relative_to(folder) for folder in inside):
            self.seen.append((what, str(path)))

    @contextmanager
    def watching(self, place: Path) -> Iterator[None]:
        self.place, self.seen, self.on = place, [], True
        try:
            yield
        finally:
            self.on = False
        assert not self.seen


WATCH = Watch()


def places(node: object, path: tuple = ()) -> list[tuple]:
    """Where in a JSON value something is, itself left out."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = []
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += places(value, (*path, key))
    return found


def mutate(content: dict, where: list[tuple], chosen: random.Random) -> dict:
    """A copy with one to three values or keys replaced, or removed."""
    content = json.loads(json.dumps(content))
    for _ in range(chosen.randint(1, 3)):
        *path, last = chosen.choice(where)
        node = content
        try:
            for key in path:
                node = node[key]
            how = chosen.randrange(4)
            if how == 0 and isinstance(node, dict):
                node[chosen.choice(NAMES)] = node.pop(last)
            elif how == 1:
                del node[last]
            else:
                node[last] = chosen.choice(VALUES)
        except (KeyError, IndexError, TypeError):  # an earlier change took it away
            continue
    return content


def spoil(data: bytes, chosen: random.Random) -> bytes:
    """JSON that is no longer what one would write: cut, flipped, deep, twice, not UTF-8."""
    at = chosen.randrange(len(data))
    key = data[data.index(b'"') : data.index(b":") + 1]
    return chosen.choice(
        (
            data[:at],
            data[:at] + bytes([data[at] ^ 1 << chosen.randrange(8)]) + data[at + 1 :],
            b"[" * 100_000,
            b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
            data.replace(b"{", b"{" + key + b"1,", 1),
            data.replace(b":", b":NaN,", 1),
            data.replace(b"1", b"1e999", 1),
            data[:at] + b"\xff" + data[at:],
            b"\xef\xbb\xbf" + data,
            data + data,
            b"",
        )
    )


def write_sealed(folder: Path, content: dict) -> None:
    """A manifest with the seal that belongs to it, as anybody can make it."""
    content = content | {"seal": ""}
    (folder / MANIFEST).write_bytes(to_json(content | {"seal": _seal(content)}, indent=1))


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


class Hostile:
    """A bundle beside a secret and an output, and the same with one file changed."""

    def __init__(self, place: Path) -> None:
        self.place, self.bundle, self.out = place, make_bundle(place / "bundle"), place / "out"
        self.out.mkdir()
        (place / "secret").write_text("mine")
        self.manifest = read_manifest(self.bundle)
        self.whole, self.rendered = contents(self.bundle), 0

    def changed(self, name: str, data: bytes) -> Bundle:
        """A bundle that lists a file with these bytes."""
        (self.bundle / name).write_bytes(data)
        files = self.manifest.files | {name: file_sha256(self.bundle / name)}
        return Bundle(self.bundle, self.manifest.model_copy(update={"files": files}))

    def fitted(self, bundle: Bundle) -> Bundle:
        """A bundle whose graphs are as its manifest says, as its maker would have them."""
        manifest, files = bundle.manifest, dict(bundle.manifest.files)
        detector = manifest.detector.graphs if manifest.detector else ()
        for graph in (*manifest.graphs, *detector):
            try:
                data = graph_bytes(graph.model_dump(), graph.opset)
            except (ValueError, TypeError, OverflowError):  # nothing that a graph can hold
                continue
            (self.bundle / graph.file).write_bytes(data)
            files[graph.file] = file_sha256(self.bundle / graph.file)
        return Bundle(self.bundle, manifest.model_copy(update={"files": files}))

    def render(self, bundle: Bundle) -> None:
        """Make its models, and of the first few a repository."""
        for model in build_models(bundle, Settings()):
            assert model.name.isidentifier() and all("/" not in name for name in model.files)
            code = [data for name, data in model.files.items() if name.endswith(".py")]
            assert set(code) <= OURS
        self.rendered += 1
        if self.rendered <= 60:
            make_repository(bundle, self.out / "repository", Settings(), durable=False)
            assert foreign_file(self.out / "repository") == ""

    def read(self, act: Callable[[], object]) -> None:
        """Do something with it, which may be refused in a line."""
        try:
            with WATCH.watching(self.place):
                act()
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 3000

    def restore(self) -> None:
        for name, data in self.whole.items():
            (self.bundle / name).write_bytes(data)


@pytest.fixture
def hostile(tmp_path) -> Iterator[Hostile]:
    """Nothing is beside the bundle and the output afterwards but the secret."""
    result = Hostile(tmp_path)
    # what is imported late is imported now
    assert check(result.bundle) == 0
    result.render(read_bundle(result.bundle))
    yield result
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"bundle", "out", "secret"} and set(contents(result.bundle)) == set(
        result.whole
    )
    assert {path.name for path in result.out.iterdir()} <= {"repository", MADE_WITH}


def changes(content: dict, count: int) -> Iterator[tuple[dict | None, bytes]]:
    """So many changed copies of a JSON value, and their bytes; None for those that are not JSON."""
    chosen, where = random.Random(0), places(content)
    data = json.dumps(content).encode()
    for turn in range(count):
        if turn % 8:
            new = mutate(content, where, chosen)
            yield new, json.dumps(new).encode()
        else:
            yield None, spoil(data, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1000, long_case(4000)])
def test_changed_manifests(hostile, count):
    content = json.loads((hostile.bundle / MANIFEST).read_bytes())

    def act() -> None:
        bundles.append(read_bundle(hostile.bundle))

    for new, data in changes(content, count):
        if new is None:
            (hostile.bundle / MANIFEST).write_bytes(data)
        else:
            write_sealed(hostile.bundle, new)
        bundles: list[Bundle] = []
        hostile.read(act)
        for bundle in bundles:
            fitted = hostile.fitted(bundle)
            hostile.read(lambda fitted=fitted: hostile.render(fitted))
            hostile.restore()
    assert hostile.rendered > count / 70, "some changes are harmless, and these were rendered"


@pytest.mark.slow
@pytest.mark.parametrize("count", [500, long_case(2000)])
def test_changed_descriptions_of_a_text_encoder(hostile, count):
    content = json.loads((hostile.bundle / TEXT_ENCODER).read_bytes())
    for _, data in changes(content, count):
        bundle = hostile.changed(TEXT_ENCODER, data)
        hostile.read(lambda bundle=bundle: zero_shot_parts(bundle, Settings()))
        hostile.read(
            lambda bundle=bundle: encoder_problem(
                bundle.path, bundle.manifest, TEXT_ENCODER, bundle.read
            )
        )


@pytest.mark.slow
def test_1500_changed_class_embeddings(hostile):
    known = EMBEDDED | {name: json.loads(EMBEDDED[name]) for name in ("classes", "templates")}
    for number, (new, data) in enumerate(changes(known, 1500)):
        texts = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in (new or EMBEDDED).items()
        }
        if new is None:
            texts["classes"] = data.decode(errors="replace")
        made = embeddings(texts)
        if number % 5 == 0:  # the header, which is JSON too
            made = made[:8] + spoil(made[8:], random.Random(number))
        bundle = hostile.changed(EMBEDDINGS, made)
        hostile.read(lambda bundle=bundle: zero_shot_parts(bundle, Settings()))


@pytest.mark.slow
def test_1000_changed_golden_sets(hostile):
    golden = read_golden(hostile.bundle / GOLDEN)
    data = golden.to_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = json.loads(header["__metadata__"]["golden"]) | {"allowed": {"depth": [0.5, 1.0]}}

    def act() -> None:
        read = read_golden(bundle.path / GOLDEN, bundle.read(GOLDEN))
        compare(read, read.outputs)

    tensors = load(data)
    for new, text in changes(about, 1000):
        text = text if new is None else json.dumps(new).encode()
        changed = save(tensors, {"golden": text.decode(errors="replace")})
        bundle = hostile.changed(GOLDEN, changed)
        hostile.read(act)


@pytest.mark.slow
def test_1000_changed_records_of_engines(hostile):
    engine = hostile.bundle / "backbone.tensorrt.engine"
    for _, data in changes(json.loads(record_path(engine).read_bytes()), 1000):
        record_path(engine).write_bytes(data)
        hostile.read(lambda: verify_engine(engine))


@pytest.mark.slow
def test_500_changed_marks_of_a_repository(hostile):
    models = tuple(model.name for model in build_models(read_bundle(hostile.bundle), Settings()))
    made_with = MadeWith(bundle="0", settings=Settings(), models=models)
    for _, data in changes(made_with.model_dump(mode="json"), 500):
        (hostile.out / MADE_WITH).write_bytes(data)
        hostile.read(lambda: read_made_with(hostile.out))
        hostile.read(lambda: foreign_file(hostile.out))

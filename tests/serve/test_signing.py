"""Signed bundles: made with openssl's keys, refused where anything was changed or the key is
another's.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from contract.manifest import MANIFEST, add_files, read_manifest
from contract.names import SIGNATURE
from export.check import main as check
from export.run import main as export
from export.sign import main as sign
from serve.repository.__main__ import main as render
from serve.repository.contents import read_made_with
from serve.rollout import main as roll_out
from serve.run import main as serve
from serve.trial import main as trial
from tests.serve.made_bundle import make_bundle


def openssl(*arguments: object, data: bytes | None = None) -> None:
    subprocess.run(
        ["openssl", *map(str, arguments)], check=True, capture_output=True, input=data, timeout=60
    )


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """A folder with two keys, `one` and `two`, their public halves, and what is none."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("one", "two"):
        openssl("genpkey", "-algorithm", "ed25519", "-out", folder / f"{name}.pem")
        openssl("pkey", "-in", folder / f"{name}.pem", "-pubout", "-out", folder / f"{name}.pub")
    openssl("genpkey", "-algorithm", "ed448", "-out", folder / "other.pem")
    openssl("pkey", "-in", folder / "other.pem", "-pubout", "-out", folder / "other.pub")
    secret = ("-aes256", "-passout", "pass:word")
    openssl("pkey", "-in", folder / "one.pem", *secret, "-out", folder / "locked.pem")
    (folder / "text.pem").write_text("no key")
    return folder


@pytest.fixture(scope="module")
def signed(keys, tmp_path_factory) -> Path:
    folder = make_bundle(tmp_path_factory.mktemp("signed") / "bundle")
    assert sign([str(folder), "--key", str(keys / "one.pem")]) == 0
    return folder


def trusting(*keys: object) -> list[object]:
    return [word for key in keys for word in ("--trust", key)]


def commands(bundle: Path, folder: Path, *trust: Path) -> list[tuple]:
    """Everything that takes a bundle and --trust, none of which comes to start a server."""
    trusted = trusting(*trust)
    return [
        (render, bundle, "--output", folder / "repository", *trusted),
        (check, bundle, *trusted),
        (serve, bundle, *trusted, "--tritonserver", "/bin/false"),
        (trial, bundle, __file__, *trusted, "--tritonserver", "/bin/false"),
    ]


def refused(words: str, all_commands: list[tuple], capsys) -> None:
    for command, *arguments in all_commands:
        assert command([str(argument) for argument in arguments]) == 2, command
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and words in message, (command, message)


def test_openssl_verifies_what_is_signed(signed, keys):
    where = ("-rawin", "-in", signed / MANIFEST, "-sigfile", signed / SIGNATURE)
    openssl("pkeyutl", "-verify", "-pubin", "-inkey", keys / "one.pub", *where)


def test_a_bundle_of_a_trusted_key_is_taken(signed, keys, tmp_path, capsys):
    for public in (["one.pub"], ["two.pub", "one.pub"]):
        trust = [str(word) for word in trusting(*(keys / name for name in public))]
        output = tmp_path / public[0]
        assert render([str(signed), *trust, "--output", str(output)]) == 0
        assert read_made_with(output).signed_by
        assert check([*trust, str(signed)]) == 0
        assert "all checks passed" in capsys.readouterr().out
    assert check([str(signed)]) == 0, "a signature is no stranger where nobody asks for it"


def test_any_change_after_the_signature_is_refused(signed, keys, tmp_path, capsys):
    trust = keys / "one.pub"
    for name in (MANIFEST, SIGNATURE, *read_manifest(signed).files):
        copy = shutil.copytree(signed, tmp_path / "bundle")
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        words = "of none of the keys" if name in (MANIFEST, SIGNATURE) else "sha256"
        command, *arguments = commands(copy, tmp_path, trust)[0]
        refused(words, [(command, *arguments)], capsys)
        shutil.rmtree(copy)
    assert list(tmp_path.iterdir()) == []


def test_what_was_sealed_again_by_a_stranger_is_refused(signed, keys, tmp_path, capsys):
    copy = shutil.copytree(signed, tmp_path / "bundle")
    signature = (copy / SIGNATURE).read_bytes()
    (copy / "class_embeddings.safetensors").write_bytes(b"others")
    assert add_files(copy, ["class_embeddings.safetensors"])
    refused("is not signed", commands(copy, tmp_path, keys / "one.pub"), capsys)
    (copy / SIGNATURE).write_bytes(signature)
    refused("of none of the keys", commands(copy, tmp_path, keys / "one.pub"), capsys)


def test_unsigned_bundles_and_other_keys_are_refused(signed, keys, tmp_path, capsys):
    refused("of none of the keys of --trust", commands(signed, tmp_path, keys / "two.pub"), capsys)
    plain = make_bundle(tmp_path / "plain")
    refused("is not signed", commands(plain, tmp_path, keys / "one.pub"), capsys)
    for name, words in (
        ("other.pub", "is not a key of ed25519"),
        ("one.pem", "does not hold a public key"),
        ("text.pem", "does not hold a public key"),
        ("nothing", "is missing"),
    ):
        refused(words, commands(signed, tmp_path, keys / name), capsys)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("one.pub", "does not hold a private key"),
        ("other.pem", "is not a key of ed25519"),
        ("locked.pem", "has a password"),
        ("text.pem", "does not hold a private key"),
        ("nothing", "is missing"),
    ],
)
def test_what_cannot_sign_is_one_line(signed, keys, tmp_path, capsys, name, words):
    copy = shutil.copytree(signed, tmp_path / "bundle")
    before = (copy / SIGNATURE).read_bytes()
    assert sign([str(copy), "--key", str(keys / name)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and words in message
    assert (copy / SIGNATURE).read_bytes() == before


def test_only_whole_bundles_are_signed(keys, tmp_path, capsys):
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "thesis.txt").write_text("mine")
    assert sign([str(bundle), "--key", str(keys / "one.pem")]) == 2
    assert "'thesis.txt': not in the manifest" in capsys.readouterr().err
    assert not (bundle / SIGNATURE).exists()


def test_a_kept_repository_remembers_who_vouched_for_it(signed, keys, tmp_path, capsys):
    unsigned, vouched = tmp_path / "unsigned", tmp_path / "vouched"
    trust = ["--trust", str(keys / "one.pub")]
    assert render([str(signed), "--output", str(unsigned)]) == 0
    assert render([str(signed), "--output", str(vouched), *trust]) == 0
    words = "was not rendered from a bundle that a key of --trust has signed"
    two = ("--trust", keys / "two.pub")
    start = ("--tritonserver", "/bin/false")
    refused(words, [(serve, "--repository", unsigned, *trust, *start)], capsys)
    refused(words, [(serve, "--repository", vouched, *two, *start)], capsys)
    refused("--trust is for --bundle", [(roll_out, vouched, "--back", *trust)], capsys)


def test_an_export_looks_at_its_key_first(keys, tmp_path, capsys):
    run, output = str(tmp_path / "run"), str(tmp_path / "bundle")
    assert export([run, "--output", output, "--sign", str(keys / "one.pub")]) == 2
    assert "--sign" in capsys.readouterr().err
    inside = str(tmp_path / "bundle" / "key.pem")
    assert export([run, "--output", output, "--sign", inside, "--force"]) == 2
    assert "holds --sign" in capsys.readouterr().err

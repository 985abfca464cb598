"""What lies in a bundle's folder, beside what its manifest lists."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from contract.files import file_sha256
from contract.manifest import Manifest
from contract.names import MANIFEST, SIGNATURE


def entries(folder: Path) -> dict[str, int]:
    """Mode (`st_mode`) of everything below a folder by its name in it; links are not followed."""

    def refuse(error: OSError) -> None:
        raise error

    result = {}
    for root, folders, files in os.walk(folder, onerror=refuse):
        for name in (*folders, *files):
            path = Path(root, name)
            result[path.relative_to(folder).as_posix()] = path.lstat().st_mode
    return dict(sorted(result.items()))


def strangers(present: dict[str, int], listed: Iterable[str]) -> list[str]:
    """What is in a folder that is neither a file listed, of whatever kind, nor a folder that holds
    one.
    """
    names = {*listed, MANIFEST, SIGNATURE}
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    return [
        name
        for name, mode in present.items()
        if name not in names and not (name in folders and stat.S_ISDIR(mode))
    ]


def verify_files(bundle: Path, manifest: Manifest) -> dict[str, str]:
    """What is wrong with each listed file ("" where nothing is), and with all else that is
    there.
    """
    present, result = entries(bundle), {}
    for name, expected in {MANIFEST: "", **manifest.files}.items():
        if name not in present:
            result[name] = "missing"
        elif stat.S_ISLNK(present[name]):
            result[name] = "a link, not a file"
        elif not stat.S_ISREG(present[name]):
            result[name] = "not a regular file"
        else:
            result[name] = (
                "" if expected in ("", file_sha256(bundle / name)) else "does not match its sha256"
            )
    return result | dict.fromkeys(strangers(present, manifest.files), "not in the manifest")

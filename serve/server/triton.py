"""Finding a tritonserver and writing its command line. Three kinds: NVIDIA's image, one on PATH,
the nvidia-pytriton wheel's.
"""

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from contract.errors import UserError

IMAGE_PATH = Path("/opt/tritonserver/bin/tritonserver")
"""Where NVIDIA's container image has it."""

_INSTALL = (
    "pip install 'vfm-distill[serve]' for the embedded one (Linux, Python 3.11 or 3.12), or work "
    "in NVIDIA's image nvcr.io/nvidia/tritonserver"
)


@dataclass(frozen=True)
class Tritonserver:
    """An executable, where its backends are, and what its environment needs."""

    executable: Path
    embedded: bool
    backends: Path | None = None
    caches: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def find_tritonserver(path: Path | None, workspace: Path) -> Tritonserver:
    """The server named, else NVIDIA's image's, else one on PATH, else the wheel's (prepared in
    `workspace`).

    Raises UserError if there is none, naming what to install.
    """
    if path is not None:
        if not os.access(path, os.X_OK) or path.is_dir():
            raise UserError(f"--tritonserver {path}: not an executable file")
        return _native(path)
    if os.access(IMAGE_PATH, os.X_OK):
        return _native(IMAGE_PATH)
    on_path = shutil.which("tritonserver")
    if on_path:
        return _native(Path(on_path))
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"no tritonserver found: not {IMAGE_PATH}, not on PATH, no nvidia-pytriton ({_INSTALL})"
        )
    return embedded(Path(spec.submodule_search_locations[0]), workspace)


def _native(executable: Path) -> Tritonserver:
    """A server with the backends folder of NVIDIA's layout."""
    root = executable.resolve().parent.parent
    backends, caches = root / "backends", root / "caches"
    return Tritonserver(
        executable,
        embedded=False,
        backends=backends if backends.is_dir() else None,
        caches=caches if caches.is_dir() else None,
    )


def embedded(package: Path, workspace: Path) -> Tritonserver:
    """The wheel's server: its python backend and the stub of this Python, joined in `workspace`."""
    _check_numpy()
    root, version = package / "tritonserver", f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise UserError(
            f"the embedded tritonserver has no python backend for Python {version} ({_INSTALL})"
        )
    backend = workspace / "backends" / "python"
    backend.mkdir(parents=True, exist_ok=True)
    for source in (*(root / "backends" / "python").iterdir(), stub):
        link = backend / source.name
        if not link.exists():
            link.symlink_to(source)
    executable = root / "bin" / "tritonserver"
    site = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    libraries = [
        str(package.parent / "nvidia_pytriton.libs"),
        os.environ.get("LD_LIBRARY_PATH", ""),
    ]
    environment = {
        "PYTHONPATH": os.pathsep.join(site),
        "LD_LIBRARY_PATH": os.pathsep.join(path for path in libraries if path),
        # the stub starts `python3` of this environment
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    return Tritonserver(executable, True, workspace / "backends", root / "caches", environment)


def _check_numpy() -> None:
    """The wheel's python backend crashes on strings under numpy 2; raises UserError there."""
    import numpy

    if int(numpy.__version__.split(".")[0]) >= 2:
        raise UserError(
            f"numpy {numpy.__version__}: the embedded tritonserver's python backend needs numpy "
            "below 2 in its environment: pip install 'numpy<2'"
        )

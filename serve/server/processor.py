"""What computes the answers: the runtime, its version, and the processor's instructions, on which
the rounding of int8 depends.
"""

import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from contract.gpu import compute_capabilities
from contract.graph_call import used_runtime
from serve.repository.settings import Settings

_INSTRUCTIONS = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "AVX-512-bf16": ("avx512_bf16",),
    "AMX": ("amx_int8",),
    "AMX-bf16": ("amx_bf16",),
    "dot product": ("asimddp",),
    "I8MM": ("i8mm",),
    "SVE": ("sve",),
}
"""Instructions that matrix products are made of, and the flags of /proc/cpuinfo that tell of
them.
"""
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables by which oneDNN, and so OpenVINO, is kept from using all of them."""
_PACKAGES = {
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("onnxruntime-gpu", "onnxruntime"),
}
"""Where the versions of the python backend's runtimes are known from."""


def describe(settings: Settings, triton: str, runtime: str = "") -> str:
    """Runtime, version and processor in one line; `triton` is the version of a native backend's
    server, `runtime` what the python backend's models name (contract/graph_call.py), where they
    are not as the settings say.
    """
    if settings.backend == "python":
        used = settings.runtime
        with suppress(ImportError):  # it is in the python backend's environment alone
            used = used_runtime(runtime or settings.runtime)
        runtime = f"{used} {_version(_PACKAGES[settings.runtime])}".strip()
    else:
        runtime = f"{settings.backend} of Triton {triton}".strip()
    if settings.kind == "gpu":
        here = compute_capabilities()
        chosen = [here[device] for device in settings.devices if device < len(here)]
        kinds = ", ".join(dict.fromkeys(chosen))
        return f"{runtime} on GPUs of compute capability {kinds or 'unknown'}"
    return f"{runtime} on {describe_processor()}"


def describe_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, its instructions for matrix products, and what keeps runtimes from
    using them.
    """
    about: dict[str, str] = {}
    with suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            about.setdefault(name.strip(), value.strip())
    flags = set((about.get("flags") or about.get("Features") or "").split())
    has = [name for name, known in _INSTRUCTIONS.items() if flags & set(known)]
    parts = [about.get("model name") or platform.machine(), *has]
    parts += [f"{name}={os.environ[name]}" for name in _LIMITS if os.environ.get(name)]
    return ", ".join(parts)


def _version(packages: tuple[str, ...]) -> str:
    """Of the first package that is installed, "" of none."""
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return ""

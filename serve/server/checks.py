"""Checks of `serve.run` before anything is copied or started; each error names the remedy."""

from collections.abc import Sequence
from pathlib import Path

from contract.errors import UserError
from contract.gpu import compute_capabilities
from contract.signing import PublicKey
from serve.bundle import Bundle
from serve.repository.contents import is_filled, read_made_with
from serve.repository.settings import Settings
from serve.repository.state import read_state
from serve.server.launch import is_loopback
from serve.server.triton import Tritonserver


def check_repository(
    repository: Path, bundle: Bundle | None, settings: Settings, trust: Sequence[PublicKey] = ()
) -> Settings:
    """The settings to serve with; raises UserError if a kept repository is another bundle's, in
    use, or was not rendered from a bundle signed by one of the keys to `trust`.
    """
    if not repository.exists() or (repository.is_dir() and not is_filled(repository)):
        if bundle is None:
            raise UserError(
                "name a BUNDLE, or an existing --repository (python -m serve.run --help)"
            )
        return settings
    known = read_made_with(repository)
    version, made_with = known.bundle, known.settings
    if trust and known.signed_by not in {key.fingerprint for key in trust}:
        raise UserError(
            f"--repository {repository} was not rendered from a bundle that a key of --trust has "
            "signed: render it again (python -m serve.repository BUNDLE --trust KEY --force)"
        )
    state = read_state(repository)
    if state:
        raise UserError(
            f"--repository {repository} is served by process {state.pid}, gRPC on {state.grpc}: "
            "stop it first"
        )
    if bundle and bundle.version != version:
        raise UserError(
            f"--repository {repository} was rendered from bundle {version}, {bundle.path} is "
            f"{bundle.version}: name another folder, replace it (python -m serve.repository "
            f"{bundle.path} --output {repository} --force), or roll it out (python -m "
            "serve.rollout)"
        )
    if bundle and made_with != settings:
        name = next(name for name, value in settings if value != getattr(made_with, name))
        raise UserError(
            f"--repository {repository} was rendered with {name}={getattr(made_with, name)}, but "
            f"{getattr(settings, name)} was requested: leave BUNDLE out to serve it as it is, or "
            "replace it (python -m serve.repository --force)"
        )
    return made_with


def check_host(tritonserver: Tritonserver, host: str, exposed: bool) -> None:
    """Raise UserError for an address on a network and a tritonserver that is fit for one machine
    only, unless the user accepts that.
    """
    if exposed or not tritonserver.embedded or is_loopback(host):
        return
    raise UserError(
        f"--host {host}: the embedded Triton 2.51 has holes that 25.07 closed (CVE-2025-23310 and "
        "-23311: chunked HTTP bodies crash it or run code; CVE-2025-23319, -23320 and -23334: the "
        "python backend's memory can be taken over): use NVIDIA's image (--tritonserver) or stay "
        "on 127.0.0.1; --expose-embedded opens gRPC alone all the same"
    )


def check_backend(tritonserver: Tritonserver, backend: str) -> None:
    """Raise UserError if this tritonserver has no such backend."""
    if tritonserver.backends is None or (tritonserver.backends / backend).is_dir():
        return
    others = ", ".join(sorted(folder.name for folder in tritonserver.backends.iterdir()))
    raise UserError(
        f"--backend {backend}: {tritonserver.executable} has no such backend (it has {others}): "
        "use --backend python here, or NVIDIA's image nvcr.io/nvidia/tritonserver, which has it"
    )


def check_gpus(settings: Settings, bundle: Bundle | None) -> None:
    """Raise UserError for missing GPUs, or engines that were built for other GPUs."""
    if settings.kind != "gpu":
        return
    here = compute_capabilities()
    if not here:
        raise UserError(
            "--kind gpu: this machine has no CUDA GPU (or no driver): use --kind cpu, or a "
            "machine with a GPU"
        )
    missing = [device for device in settings.devices if not 0 <= device < len(here)]
    if missing:
        raise UserError(
            f"--devices {missing[0]}: this machine has {len(here)} GPUs, counted from 0"
        )
    if settings.backend != "tensorrt" or bundle is None:
        return
    for engine in bundle.manifest.engines:
        built = engine.compute_capabilities
        other = [device for device in settings.devices if built and here[device] not in built]
        if engine.flavour == "tensorrt" and other:
            raise UserError(
                f"{bundle.path}: its engines are for GPUs of compute capability "
                f"{', '.join(built)}, GPU {other[0]} has {here[other[0]]}: export on this "
                "machine, or use --backend onnxruntime"
            )

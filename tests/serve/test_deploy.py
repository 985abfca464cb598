"""deploy/: manifests are what Kubernetes takes, and they and the container say what the code and
the real tritonserver say.
"""

import ast
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from importlib import metadata, resources
from pathlib import Path

import grpc
import jsonschema
import pytest
import yaml
from google.protobuf.json_format import MessageToJson
from packaging.requirements import Requirement

from contract.golden import GOLDEN, read_golden
from contract.tasks import map_tasks
from export import run as export_run
from serve.bundle import read_bundle
from serve.repository import __main__ as serve_repository
from serve.repository.build import make_repository
from serve.repository.models import build_models
from serve.repository.settings import Settings
from serve.server.process import RESTRICTED, Options
from serve.server.rest import ADMIN_HEADER
from serve.server.triton import find_tritonserver
from tests.conftest import need_tritonserver
from tests.serve.made_bundle import make_bundle
from tests.serve.running import Saying, answering

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.37"
"""Version whose schemas manifests are held against."""

PATCHES = ("components/tensorrt/mount.yaml",)
FILES = sorted(
    path.relative_to(DEPLOY).as_posix()
    for path in DEPLOY.rglob("*.yaml")
    if path.name != "kustomization.yaml" and not path.as_posix().endswith(PATCHES)
)
FOLDERS = (
    "kubernetes/base",
    "kubernetes/engines",
    "kubernetes/production",
    "kserve/standard",
    "kserve/knative",
)
WITH_TRITON = (
    "kubernetes/base/deployment.yaml",
    "kserve/standard/serving-runtime.yaml",
    "kserve/knative/serving-runtime.yaml",
)


def read(path):
    """The documents of a file below deploy/."""
    return [document for document in yaml.safe_load_all((DEPLOY / path).read_text()) if document]


def built(folder):
    """What kustomize makes of a folder below deploy/."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: no kustomize")
    done = subprocess.run(
        ["kubectl", "kustomize", DEPLOY / folder], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(documents, kind, name=None):
    found = [d for d in documents if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    assert len(found) == 1, f"{kind} {name}: {len(found)}"
    return found[0]


def container_of(path):
    """The container that runs Triton."""
    document = of_kind(read(path), "Deployment" if "kubernetes" in path else "ServingRuntime")
    spec = document["spec"]
    return (spec["template"]["spec"] if "template" in spec else spec)["containers"][0]


@functools.cache
def kubernetes_schemas():
    """Kubernetes' own definitions, unknown fields refused, and the schemas of custom resources that
    use them.
    """
    folder = (
        resources.files("kubernetes_validate")
        / "kubernetes-json-schema"
        / f"v{KUBERNETES}.0-local-strict"
    )
    definitions = json.loads((folder / "_definitions.json").read_text())["$defs"]
    own = yaml.safe_load((Path(__file__).parent / "custom_resources.yaml").read_text())

    def point(node):
        if isinstance(node, dict):
            return {
                key: re.sub("^(k8s:|/api/_definitions.json#/[$]defs/)", "#/$defs/", value)
                if key == "$ref" and isinstance(value, str)
                else point(value)
                for key, value in node.items()
            }
        return [point(item) for item in node] if isinstance(node, list) else node

    return {"$defs": point(definitions), "definitions": point(own["definitions"])}, point(
        own["kinds"]
    )


def problems(document):
    """What is wrong with a manifest: Kubernetes' kinds by kubernetes-validate, the others by
    custom_resources.yaml.
    """
    import kubernetes_validate

    shared, kinds = kubernetes_schemas()
    kind = document.get("kind", "rules")
    if kind in kinds:
        validator = jsonschema.Draft202012Validator({**shared, **kinds[kind]})
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.path}: {error.message}"]
    return []


@pytest.mark.parametrize("path", FILES)
def test_a_manifest_is_what_kubernetes_takes(path):
    for document in read(path):
        assert problems(document) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_makes_manifests_that_kubernetes_takes(folder):
    for document in built(folder):
        assert problems(document) == []


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("kubernetes/base/deployment.yaml", ("spec", "template", "spec")),
        ("kserve/standard/serving-runtime.yaml", ("spec", "containers", 0)),
        ("kserve/standard/inference-service.yaml", ("spec", "predictor")),
        ("kserve/knative/inference-service.yaml", ("spec", "predictor", "model")),
        ("kubernetes/components/monitoring/service-monitor.yaml", ("spec",)),
        ("kubernetes/components/autoscaling/prometheus-adapter.yaml", ("rules", "custom", 0)),
    ],
)
def test_a_misspelt_field_is_refused(path, where):
    document = read(path)[0]
    functools.reduce(lambda node, key: node[key], where, document)["replicaz"] = 1
    assert problems(document)


def test_ports_probes_and_patience_are_those_of_the_code():
    options, script = Options(), (DEPLOY / "triton.sh").read_text()
    ports = {name: getattr(options, f"{name}_port") for name in ("http", "grpc", "metrics")}
    for name, port in ports.items():
        assert f"--{name}-port={port}" in script
    assert f"--exit-timeout-secs={options.exit_seconds}" in script
    assert f'admin="{",".join(RESTRICTED)}:{ADMIN_HEADER}=$key"' in script
    exposed = re.search("^EXPOSE (8000.*)$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)[
        1
    ]
    assert sorted(map(int, exposed.split())) == sorted(ports.values())

    container = container_of("kubernetes/base/deployment.yaml")
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == ports
    for service in read("kubernetes/base/service.yaml"):
        assert all(ports[port["targetPort"]] == port["port"] for port in service["spec"]["ports"])
    kserve = container_of("kserve/standard/serving-runtime.yaml")
    assert [port["containerPort"] for port in kserve["ports"]] == [
        ports["http"],
        ports["grpc"],
        ports["metrics"],
    ]
    assert container_of("kserve/knative/serving-runtime.yaml")["ports"] == [
        {"name": "h2c", "containerPort": ports["grpc"], "protocol": "TCP"}
    ]


@pytest.mark.parametrize("path", WITH_TRITON[:2])
def test_a_pod_has_time_to_forget_drain_and_end(path):
    if "kubernetes" in path:
        grace = of_kind(read(path), "Deployment")["spec"]["template"]["spec"][
            "terminationGracePeriodSeconds"
        ]
    else:
        service = read("kserve/standard/inference-service.yaml")[0]
        grace = service["spec"]["predictor"]["terminationGracePeriodSeconds"]
    sleep = int(container_of(path)["lifecycle"]["preStop"]["exec"]["command"][1])
    assert grace >= sleep + Options().exit_seconds + 10


def served_models(bundle):
    """Names of the models of repositories, in either form."""
    settings = Settings(), Settings(parts="apart")
    return {m.name for form in settings for m in build_models(read_bundle(bundle), form)}


@pytest.mark.parametrize("path", WITH_TRITON)
def test_probes_ask_for_models_that_a_repository_has(path, small_bundle):
    container = container_of(path)
    names = served_models(small_bundle)
    probes = {
        name: container.get(f"{name}Probe", {}) for name in ("startup", "readiness", "liveness")
    }
    paths = [probe["httpGet"]["path"] for probe in probes.values() if "httpGet" in probe]
    assert {path.split("/")[3] for path in paths if path.startswith("/v2/models/")} <= names
    # server readiness turns 400 with any broken newest version: fit to start with, not to take a
    # pod out of a Service
    assert "health" not in probes["readiness"].get("httpGet", {}).get("path", "")
    command = probes["liveness"]["exec"]["command"]
    assert command[1] == "/opt/vfm/probe.py"
    assert int(command[2].removeprefix("--timeout=")) < probes["liveness"]["timeoutSeconds"]


@pytest.mark.parametrize("path", WITH_TRITON)
def test_the_container_has_no_rights_it_does_not_need(path):
    document, container = read(path)[0], container_of(path)
    pod = document["spec"]["template"]["spec"] if "kubernetes" in path else document["spec"]
    rights = pod.get("securityContext", {}) | container["securityContext"]
    assert (
        rights["runAsNonRoot"]
        and rights["readOnlyRootFilesystem"]
        and not rights["allowPrivilegeEscalation"]
    )
    assert rights["capabilities"] == {"drop": ["ALL"]} and rights["seccompProfile"] == {
        "type": "RuntimeDefault"
    }
    writable = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    assert (
        volumes[writable["/dev/shm"]]["medium"] == "Memory"
        and volumes[writable["/tmp"]]["sizeLimit"]
    )
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_selectors_find_the_pods():
    labels = of_kind(read("kubernetes/base/deployment.yaml"), "Deployment")["spec"]["template"][
        "metadata"
    ]["labels"]
    services = read("kubernetes/base/service.yaml")
    policy = read("kubernetes/base/network-policy.yaml")[0]["spec"]
    budget = read("kubernetes/base/disruption-budget.yaml")[0]["spec"]
    selectors = [service["spec"]["selector"] for service in services]
    selectors += [policy["podSelector"]["matchLabels"], budget["selector"]["matchLabels"]]
    assert all(selector.items() <= labels.items() and selector for selector in selectors)
    monitor = read("kubernetes/components/monitoring/service-monitor.yaml")[0]["spec"]
    watched = [
        s
        for s in services
        if monitor["selector"]["matchLabels"].items() <= s["metadata"]["labels"].items()
    ]
    assert [service["metadata"]["name"] for service in watched] == ["vfm"]
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in watched[0]["spec"]["ports"]}


def test_the_example_of_everything_fits_together():
    documents = built("kubernetes/production")
    deployment = of_kind(documents, "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert "replicas" not in deployment["spec"], "the autoscaler sets them"
    assert pod["containers"][0]["image"].startswith("registry.example.com/vfm-runtime:")
    mount = next(m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == "/models")
    volume = next(v for v in pod["volumes"] if v["name"] == mount["name"])
    engines = built("kubernetes/engines")
    job = of_kind(engines, "Job")["spec"]["template"]["spec"]
    of_kind(engines, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
    render = job["containers"][0]["args"]
    assert f"--output=/repository/{mount['subPath']}" in render
    assert job["nodeSelector"] == pod["nodeSelector"], "engines are for the GPU they were built on"
    target = of_kind(documents, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])


def test_the_cpu_component_leaves_no_gpu(tmp_path):
    def below(path):
        return os.path.relpath(DEPLOY / "kubernetes" / path, tmp_path.resolve())

    parts = {
        "resources": [below("base")],
        "components": [below("components/cpu"), below("components/autoscaling")],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(parts))
    documents = built(tmp_path)
    assert [problem for document in documents for problem in problems(document)] == []
    assert "nvidia.com" not in yaml.safe_dump(of_kind(documents, "Deployment"))


def test_kserve_services_name_runtimes_that_are_there():
    for mode in ("standard", "knative"):
        runtime = read(f"kserve/{mode}/serving-runtime.yaml")[0]
        environment = {
            entry["name"]: entry.get("value") for entry in runtime["spec"]["containers"][0]["env"]
        }
        assert environment["MODEL_REPOSITORY"] == "/mnt/models"
        for path in sorted((DEPLOY / "kserve" / mode).glob("inference-service*.yaml")):
            service = read(path)[0]
            model = service["spec"]["predictor"]["model"]
            assert model["runtime"] == runtime["metadata"]["name"]
            assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
            formats = {entry["name"] for entry in runtime["spec"]["supportedModelFormats"]}
            assert model["modelFormat"]["name"] in formats
    stable, canary = (
        read(f"kserve/knative/inference-service{end}.yaml")[0] for end in ("", "-canary")
    )
    assert canary["spec"]["predictor"].pop("canaryTrafficPercent") == 10
    assert canary["spec"]["predictor"]["model"].pop("storageUri") != stable["spec"]["predictor"][
        "model"
    ].pop("storageUri")
    assert canary == stable


@pytest.mark.parametrize(
    ("place", "command"), [("initContainers", export_run), ("containers", serve_repository)]
)
def test_the_job_calls_commands_as_they_are(place, command, capsys):
    """Every option of the job is one that the command knows, with a value it takes."""
    arguments = of_kind(read("kubernetes/engines/job.yaml"), "Job")["spec"]["template"]["spec"][
        place
    ][0]["args"]
    assert arguments[0] == command.__name__.removesuffix(".__main__")
    assert command.main(arguments[1:]) == 2  # nothing lies in /runs and /repository
    assert capsys.readouterr().err.startswith("error: "), "argparse would have left with SystemExit"


def closure(requirements):
    """Names of distributions that these requirements bring, themselves included."""
    found, waiting = set(), [Requirement(line) for line in requirements]
    while waiting:
        asked = waiting.pop()
        name = asked.name.lower().replace("_", "-")
        if (name, tuple(sorted(asked.extras))) in found:
            continue
        found.add((name, tuple(sorted(asked.extras))))
        for line in metadata.requires(asked.name) or ():
            needed = Requirement(line)
            extras = asked.extras or {""}
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in extras
            ):
                waiting.append(needed)
    return {name for name, _ in found}


def requirements(name):
    """Lines of a requirements file, those of the files it names included."""
    found = []
    for line in (DEPLOY / "requirements" / name).read_text().splitlines():
        if line.startswith("-r "):
            found += requirements(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            found.append(line)
    return found


def missing(loaded, listed):
    """Loaded modules that none of these requirements bring; a namespace (google) is of several
    distributions, any of which will do.
    """
    dists, brought = metadata.packages_distributions(), closure(listed)
    own = {"vfm-distill", "setuptools"}
    names = {
        module: {name.lower().replace("_", "-") for name in dists[module]}
        for module in loaded
        if module in dists
    }
    return {module for module, found in names.items() if not found & (brought | own)}


def test_the_render_stage_has_what_rendering_imports(small_bundle, tmp_path):
    code = (
        "import json, sys; from serve.repository.__main__ import main\nstatus = main([sys.argv[1], "
        "'--output', sys.argv[2], '--backend', 'onnxruntime', '--kind', "
        "'gpu'])\nprint(json.dumps(sorted({name.partition('.')[0] for name in "
        "sys.modules})))\nsys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, small_bundle, tmp_path / "models"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1])) - set(sys.stdlib_module_names)
    assert not loaded & {"torch", "distill", "export"}
    assert not missing(loaded, [*requirements("serve.txt"), *requirements("render.txt")])


GATEWAY = "kubernetes/components/gateway/gateway.yaml"


def test_the_gateway_calls_the_command_as_it_is_and_reaches_the_server():
    pytest.importorskip("prometheus_client", reason="the optional extra [gateway] is not installed")
    from serve.gateway.__main__ import _parser

    deployment, service = read(GATEWAY)
    pod = deployment["spec"]["template"]
    container = pod["spec"]["containers"][0]
    args = _parser().parse_args(container["args"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": args.port} and service["spec"]["ports"][0]["port"] == args.port
    assert f"EXPOSE {args.port}\n" in (DEPLOY / "Containerfile").read_text()
    name, _, port = args.url.partition(":")
    server = of_kind(read("kubernetes/base/service.yaml"), "Service", name)
    assert int(port) in {port["port"] for port in server["spec"]["ports"]}
    labels = pod["metadata"]["labels"]
    admitted = read("kubernetes/base/network-policy.yaml")[0]["spec"]["ingress"][0]["from"][0]
    policy = read("kubernetes/components/gateway/network-policy.yaml")[0]["spec"]
    for selector in (
        admitted["podSelector"]["matchLabels"],
        policy["podSelector"]["matchLabels"],
        service["spec"]["selector"],
    ):
        assert selector.items() <= labels.items()
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert args.api_key_file.parent == Path(mounts["keys"])
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    grace = pod["spec"]["terminationGracePeriodSeconds"]
    assert grace >= sleep + args.exit_timeout + 10


def test_the_gateways_image_has_what_it_imports():
    pytest.importorskip("prometheus_client", reason="the optional extra [gateway] is not installed")
    code = (
        "import json, sys\n"
        "import serve.gateway.__main__, serve.gateway.app, serve.gateway.connections\n"
        "serve.gateway.__main__._parser()\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout)) - set(sys.stdlib_module_names)
    assert not loaded & {"torch", "distill", "export", "onnx", "onnxruntime", "triton_models"}
    optional = {"multipart", "python_multipart", "sniffio"}  # starlette's and anyio's, if there
    assert not missing(loaded - optional, requirements("gateway.txt"))


def imports_of(path):
    """Top-level modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_the_serving_image_has_what_the_python_models_import(small_bundle):
    copied = {
        content
        for model in build_models(read_bundle(small_bundle), Settings())
        for content in model.files.values()
        if isinstance(content, Path) and content.suffix == ".py"
    }
    templates = set((ROOT / "triton_models").glob("*/1/model.py")) | set(
        (ROOT / "triton_models").glob("*.py")
    )
    copied |= {
        ROOT / "contract" / f"{name}.py"
        for path in templates
        for name in imports_of(path)
        if (ROOT / "contract" / f"{name}.py").is_file()
    }
    beside = {path.stem for path in templates | copied}
    modules = {name for path in templates | copied for name in imports_of(path)}
    modules -= set(sys.stdlib_module_names) | beside | {"triton_python_backend_utils"}
    dists = metadata.packages_distributions()
    names = {dists[module][0].lower() for module in modules}
    assert names == {Requirement(line).name for line in requirements("serve-python.txt")}
    assert names - {"openvino"} == {Requirement(line).name for line in requirements("serve.txt")}


def test_the_images_python_packages_are_of_one_version():
    pinned = {
        Requirement(line).name
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line[:1].isalpha()
    }
    for name in ("render.txt", "serve-python.txt", "gateway.txt"):
        for requirement in map(Requirement, requirements(name)):
            assert requirement.name in pinned, requirement


def test_the_container_file_passes_hadolint():
    program = shutil.which("hadolint") or Path(sys.executable).parent / "hadolint"
    if not os.access(program, os.X_OK):
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        [program, DEPLOY / "Containerfile"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_the_container_copies_what_is_there_and_the_build_may_read_it():
    text = (DEPLOY / "Containerfile").read_text()
    allowed = {
        line.removeprefix("!")
        for line in (DEPLOY / "Containerfile.dockerignore").read_text().split()
        if line[0] == "!"
    }
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists() and source.partition("/")[0] in allowed, source
    site, render = (
        re.search(rf"^FROM \S+ AS {name}$(.*?)^FROM", text, re.MULTILINE | re.DOTALL)[1]
        for name in ("site", "render")
    )
    code = re.findall(r"^COPY (contract|distill|export|serve|triton_models) ", site + render, re.M)
    assert code == ["contract", "serve", "triton_models"], "and nothing of training"
    probe = re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", text, re.MULTILINE)[1]
    assert (
        json.loads(probe)[1]
        == container_of("kubernetes/base/deployment.yaml")["livenessProbe"]["exec"]["command"][1]
    )


def tritonserver(folder):
    need_tritonserver()
    return find_tritonserver(None, folder)


def test_every_flag_is_one_that_tritonserver_takes(tmp_path):
    found = tritonserver(tmp_path)
    done = subprocess.run(
        [found.executable, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, **found.environment},
        timeout=60,
    )
    known = set(re.findall(r"^  (--[\w-]+)", done.stdout + done.stderr, re.MULTILINE))
    assert "--strict-readiness" in known
    used = set(re.findall(r"^    (--[\w-]+)", (DEPLOY / "triton.sh").read_text(), re.MULTILINE))
    for path in WITH_TRITON:
        used |= {argument.partition("=")[0] for argument in container_of(path).get("args", ())}
    assert used <= known and len(used) > 8


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def ask(url, *, post=False, **headers):
    """Status and text of a request."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, b"" if post else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def deployed(expensive, small_bundle, tmp_path_factory):
    """triton.sh as the container starts it, on other ports and with the embedded tritonserver:
    (process, http, grpc, metrics).
    """
    folder = tmp_path_factory.mktemp("deployed")
    found = tritonserver(folder)
    make_repository(read_bundle(small_bundle), folder / "models", Settings())
    web, rpc, metrics = free_ports(3)
    arguments = [
        f"--backend-directory={found.backends}",
        f"--http-port={web}",
        f"--grpc-port={rpc}",
        f"--metrics-port={metrics}",
        *container_of("kubernetes/base/deployment.yaml")["args"],
        *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")),
        "--exit-timeout-secs=5",
    ]
    environment = {
        **os.environ,
        **found.environment,
        "TRITONSERVER": str(found.executable),
        "ADMIN_KEY": "s3cret",
        "MODEL_REPOSITORY": str(folder / "models"),
    }
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            ["/bin/sh", DEPLOY / "triton.sh", *arguments], env=environment, stdout=log, stderr=log
        )
    try:
        end = time.monotonic() + 120
        while True:
            try:
                if ask(f"http://127.0.0.1:{web}/v2/health/ready")[0] == 200:
                    break
            except OSError:
                pass
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[
                -3000:
            ]
            time.sleep(0.2)
        yield (
            process,
            f"http://127.0.0.1:{web}",
            f"127.0.0.1:{rpc}",
            f"http://127.0.0.1:{metrics}/metrics",
        )
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            # a backend that a test has killed makes it wait for the whole of --exit-timeout-secs
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def probe(url, repository, *arguments):
    """Run the liveness probe as Kubernetes does."""
    return subprocess.run(
        [
            sys.executable,
            "-I",
            DEPLOY / "probe.py",
            "--url",
            url,
            "--repository",
            repository,
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )


def stub_of(process, model):
    """Process id of a model's python backend."""
    listed = ["ps", "-ww", "--ppid", str(process.pid), "-o", "pid=,args="]
    children = subprocess.run(
        listed, capture_output=True, text=True, timeout=10
    ).stdout.splitlines()
    return next(int(line.split()[0]) for line in children if f"/{model}/" in line)


def repository_of(process):
    return next(
        argument.partition("=")[2]
        for argument in Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
        if argument.startswith("--model-repository=")
    )


def test_the_server_as_deployed_is_ready_and_guards_its_administration(deployed):
    _, url, rpc, _ = deployed
    container = container_of("kubernetes/base/deployment.yaml")
    assert ask(url + container["readinessProbe"]["httpGet"]["path"])[0] == 200
    with grpc.insecure_channel(rpc) as channel:
        health = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert health(b"", timeout=10) == b"\x08\x01", "SERVING"  # the probe of Knative
        index = channel.unary_unary("/inference.GRPCInferenceService/RepositoryIndex")
        with pytest.raises(grpc.RpcError, match="restricted"):
            index(b"", timeout=10)
        assert index(b"", timeout=10, metadata=[(f"triton-grpc-protocol-{ADMIN_HEADER}", "s3cret")])
    closed = f"{url}/v2/repository/index"
    assert ask(closed, post=True)[0] == 403
    assert ask(closed, post=True, **{ADMIN_HEADER: "guess"})[0] == 403
    assert ask(closed, post=True, **{ADMIN_HEADER: "s3cret"})[0] == 200


def test_autoscaling_reads_metrics_that_triton_gives(deployed):
    _, _, _, metrics = deployed
    given = set(re.findall(r"^(nv_\w+)\{", ask(metrics)[1], re.MULTILINE))
    rules = read("kubernetes/components/autoscaling/prometheus-adapter.yaml")[0]["rules"]["custom"]
    scaler = read("kubernetes/components/autoscaling/autoscaler.yaml")[0]["spec"]
    assert {metric["pods"]["metric"]["name"] for metric in scaler["metrics"]} == {
        rule["name"]["as"] for rule in rules
    }
    keda = read("kserve/standard/inference-service.yaml")[0]["spec"]["predictor"]["autoScaling"][
        "metrics"
    ]
    queries = [rule[key] for rule in rules for key in ("seriesQuery", "metricsQuery")]
    queries += [metric["external"]["metric"]["query"] for metric in keda]
    for query in queries:
        assert set(re.findall(r"nv_\w+", query)) and set(re.findall(r"nv_\w+", query)) <= given


def test_autoscaling_watches_every_queue_that_pictures_wait_in_first(small_bundle, tmp_path):
    rules = read("kubernetes/components/autoscaling/prometheus-adapter.yaml")[0]["rules"]["custom"]
    scaling = read("kserve/standard/inference-service.yaml")[0]["spec"]["predictor"]["autoScaling"]
    queries = [rule["metricsQuery"] for rule in rules]
    queries += [metric["external"]["metric"]["query"] for metric in scaling["metrics"]]
    first, there = set(), set()
    for bundle in (small_bundle, make_bundle(tmp_path / "bundle")):  # the latter has a detector
        for backend in ("python", "onnxruntime"):
            models = build_models(read_bundle(bundle), Settings(backend=backend))
            there |= {model.name for model in models}
            for config in (model.config for model in models):
                inputs = {port.name for port in config.input}
                if config.platform == "ensemble":
                    first.add(config.ensemble_scheduling.step[0].model_name)
                elif "image" in inputs and inputs <= {"image", "labels", "threshold"}:
                    first.add(config.name)
    for query in queries:
        watched = set(re.search('model=~"([^"]*)"', query)[1].split("|"))
        assert "decode" in first <= watched <= there, watched ^ first


def test_nvidias_entrypoint_runs_first():
    text = (DEPLOY / "Containerfile").read_text()
    stages = re.findall(r"^FROM (\S+) AS (\w+)$(.*?)(?=^FROM|\Z)", text, re.M | re.S)
    entrypoints = {
        stage: json.loads(found[1])
        for image, stage, body in stages
        if image == "${TRITON}" and (found := re.search(r"^ENTRYPOINT (.*)$", body, re.M))
    }
    assert set(entrypoints) == {"export", "runtime"}
    for command in entrypoints.values():
        assert command[0] == "/opt/nvidia/nvidia_entrypoint.sh" and len(command) > 2


def test_startup_asks_the_golden_pictures(deployed, tmp_path):
    process, url, _, _ = deployed
    command = container_of("kubernetes/base/deployment.yaml")["startupProbe"]["exec"]["command"]
    assert command[1] == "/opt/vfm/probe.py"
    done = probe(url, repository_of(process), *command[2:])
    assert done.returncode == 0, done.stderr
    place = tmp_path / "features" / "1" / GOLDEN
    place.parent.mkdir(parents=True)
    assert probe(url, tmp_path, "--golden").returncode == 0, "of a bundle without them"
    golden = read_golden(Path(repository_of(process)) / "features" / "1" / GOLDEN)
    depth = golden.outputs["depth"]
    for change, said in (
        (1.2 * depth, "off by 0.167 of its length"),
        (-depth, "cosine -1.0"),
        (depth[:, :-1], f"{depth[0].size} values, recorded {depth[0, :-1].size}"),
    ):
        wrong = replace(golden, outputs=golden.outputs | {"depth": change})
        place.write_bytes(wrong.to_bytes())
        done = probe(url, tmp_path, "--golden")
        assert done.returncode == 1 and f"output 'depth' on {golden.pictures[0]}" in done.stderr
        assert said in done.stderr and done.stderr.count("\n") == 1
    done = probe(f"http://127.0.0.1:{free_ports(1)[0]}", tmp_path, "--golden")
    assert done.returncode == 1 and done.stderr.startswith("error: ")


def test_liveness_reaches_every_model(deployed, small_bundle):
    process, url, _, _ = deployed
    done = probe(url, repository_of(process))
    assert done.returncode == 0, done.stderr
    stats = json.loads(ask(f"{url}/v2/models/stats")[1])["model_stats"]
    ran = {model["name"] for model in stats if int(model["execution_count"])}
    served = {model.name for model in build_models(read_bundle(small_bundle), Settings())}
    # `features` is `features_encoded` without its first step
    assert served - ran <= {"features"}


def test_liveness_finds_a_dead_backend_that_readiness_does_not(deployed):
    process, url, _, _ = deployed
    os.kill(stub_of(process, "depth"), signal.SIGKILL)
    done = probe(url, repository_of(process))
    assert done.returncode == 1 and "depth" in done.stderr and "Traceback" not in done.stderr
    assert ask(f"{url}/v2/health/ready")[0] == 200


def test_liveness_of_no_server_is_one_line():
    done = probe(f"http://127.0.0.1:{free_ports(1)[0]}", "/models")
    assert (
        done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("settings", [{}, {"parts": "apart"}, {"encoded": False}], ids=str)
def test_liveness_asks_every_front_door(small_bundle, tmp_path, settings):
    """Of each form of a repository, as rendered; `encoded` is also missing where a picture has
    several views. What answers is no Triton, because only what is asked matters.
    """
    bundle = read_bundle(small_bundle)
    configs = {m.name: m.config for m in build_models(bundle, Settings(**settings))}
    for name in configs:
        (tmp_path / name).mkdir()
    asked: list[str] = []

    class Answers(Saying):
        def do_GET(self):
            config = configs.get(self.path.split("/")[3] if "/models/" in self.path else "")
            self.say(
                200,
                (
                    MessageToJson(config, preserving_proto_field_name=True)
                    if config
                    else '{"model_stats":[]}'
                ).encode(),
            )

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path.split("/")[3])
            self.say(200, b"")

    with answering(Answers) as url:
        done = probe(url, tmp_path)
    assert done.returncode == 0, done.stderr
    tasks = [task.name for task in map_tasks() if task.name in bundle.graphs]
    assert tasks and {*tasks, "fused"} < {*asked}
    assert ("features" in asked) == ("features_encoded" not in configs)
    assert ("features_encoded" in asked) == ("features_encoded" in configs)


class Slow(Saying):
    """What a Triton says whose one door never answers, because a real one cannot be made to hang:
    it ends such a backend.
    """

    answers, step, status = 0, 0, 0

    def do_GET(self):
        about = json.dumps({"height": 8, "width": 8, "tasks": {}})
        sizes = {"parameters": {"about": {"string_value": about}}}
        type(self).answers += self.step
        stats = {"model_stats": [{"inference_stats": {"success": {"count": self.answers}}}]}
        self.say(200, json.dumps(stats if self.path.endswith("/stats") else sizes).encode())

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.status:
            self.say(self.status, b"Exceeds maximum queue size")
        else:
            time.sleep(3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "status", "alive"),
    [(0, 0, False), (1, 0, True), (0, 503, True), (1, 500, False)],
    ids=["hangs", "busy with others", "full queue", "fails"],
)
def test_liveness_tells_a_busy_server_from_one_that_hangs(tmp_path, step, status, alive):
    (tmp_path / "fused").mkdir()
    said = type("Said", (Slow,), {"step": step, "status": status})
    with answering(said) as url:
        done = probe(url, tmp_path, "--timeout=1")
    assert done.returncode == (0 if alive else 1), done.stderr
    assert done.stderr.count("\n") == (0 if alive else 1)

"""What is rendered for Triton's own backends, and what is refused, because they would serve it
wrongly or not at all.
"""

import hashlib
import os
import subprocess
from pathlib import Path

import onnxruntime
import pytest
import yaml
from onnx import TensorProto, helper
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from contract import graph_call
from contract.engine_record import EngineOptions
from contract.errors import UserError
from contract.manifest import BundledEngine, GraphRecord
from export.graph import build_parts, open_student
from export.tensorrt.engines import make_profile
from serve.bundle import Bundle, read_bundle
from serve.repository.__main__ import main
from serve.repository.build import make_repository
from serve.repository.graph_files import graph_json, usual_sizes
from serve.repository.lint import lint
from serve.repository.model_config import FRONT_QUEUES
from serve.repository.models import build_models, graph_model
from serve.repository.native import POOL_BYTES, VERSION_FLAG, native_flags, provider_options
from serve.repository.settings import Settings
from serve.repository.versions import Repository
from serve.server.launch import Options, command_line
from serve.server.triton import Tritonserver
from tests.conftest import run_here, small_recipe

ROOT = Path(__file__).parents[2]
SIZES = [(64, 96), (32, 32)]
ENGINE = b"an engine, which no machine without a GPU can build"


def changed(bundle: Bundle, **changes: object) -> Bundle:
    """A bundle whose manifest says something else; its files are as they were."""
    return Bundle(bundle.path, bundle.manifest.model_copy(update=changes))


@pytest.fixture(scope="module")
def bundle(small_bundle):
    return read_bundle(small_bundle)


@pytest.fixture
def with_engines(bundle, tmp_path):
    """A function: the bundle with an engine for every graph, built with these options."""

    def make(**options: object) -> Bundle:
        folder = tmp_path / "bundle"
        folder.mkdir(exist_ok=True)
        for name in bundle.manifest.files:
            if not (folder / name).exists():
                os.link(bundle.path / name, folder / name)
        engines, files = [], dict(bundle.manifest.files)
        for graph in bundle.manifest.graphs:
            file = f"{graph.name}.tensorrt.engine"
            (folder / file).write_bytes(ENGINE)
            files[file] = hashlib.sha256(ENGINE).hexdigest()
            engine = BundledEngine(
                graph=graph.name,
                file=file,
                inputs=(),
                outputs=(),
                profiles=(),
                dtypes=(),
                compute_capabilities=("9.0",),
                flavour="tensorrt",
                tensorrt_version="11.0",
                graph_sha256={},
                engine_sha256=files[file],
                options=EngineOptions(flavour="tensorrt", **options),
            )
            engines.append(engine)
        update = {"engines": tuple(engines), "files": files}
        return Bundle(folder, bundle.manifest.model_copy(update=update))

    return make


def configurations(bundle: Bundle, **settings: object) -> dict[str, ModelConfig]:
    return {model.name: model.config for model in build_models(bundle, Settings(**settings))}


TENSORRT = {"backend": "tensorrt", "kind": "gpu"}


def test_a_graph_has_the_fields_that_its_backend_reads_and_no_others(bundle, with_engines):
    common = {"name", "backend", "max_batch_size", "input", "output", "version_policy"}
    common |= {"instance_group", "dynamic_batching", "model_warmup", "default_model_filename"}
    for made, own, settings in (
        (bundle, {"parameters"}, {"backend": "onnxruntime", "kind": "gpu"}),
        (bundle, {"parameters"}, {"backend": "onnxruntime"}),
        (with_engines(), {"optimization"}, TENSORRT),
    ):
        configs = configurations(made, **settings)
        assert lint(configs) == []
        graphs = {n: c for n, c in configs.items() if c.backend == settings["backend"]}
        assert len(graphs) == len(bundle.manifest.graphs)
        for config in graphs.values():
            assert {field.name for field, _ in config.ListFields()} == common | own
            assert {port.HasField("reshape") for port in config.input} == {False}
            (group,) = config.instance_group
            on_gpu = settings.get("kind") == "gpu"
            assert group.kind == (
                ModelInstanceGroup.KIND_GPU if on_gpu else ModelInstanceGroup.KIND_CPU
            )
            assert list(group.gpus) == ([0] if on_gpu else [])
            assert list(group.profile) == (["0"] if settings is TENSORRT else [])
            told = {"intra_op_thread_count", *(["cudnn_conv_algo_search"] if on_gpu else [])}
            assert set(config.parameters) == (told if settings is not TENSORRT else set())


def test_the_first_graphs_wait_as_long_as_asked_and_no_other_step_does(bundle):
    configs = configurations(bundle, backend="onnxruntime", queue_delay_us=7000)
    delays = {
        name: config.dynamic_batching.max_queue_delay_microseconds
        for name, config in configs.items()
    }
    assert {name for name, delay in delays.items() if delay} == {"backbone", "fused_graph"}
    assert delays["backbone"] == delays["fused_graph"] == 7000


def test_the_check_of_numbers_has_room_for_all_outputs_of_all_requests(bundle):
    configs = configurations(bundle, backend="onnxruntime")
    steps = [step.model_name for step in configs["features"].ensemble_scheduling.step]
    most = configs["finite"].dynamic_batching.default_queue_policy.max_queue_size
    assert steps.count("finite") > 5
    assert most > FRONT_QUEUES * Settings().max_queue * steps.count("finite")


def test_a_new_version_is_taken_by_a_native_repository(bundle, tmp_path):
    make_repository(bundle, tmp_path / "repository", Settings(backend="onnxruntime"), durable=False)
    repository = Repository(tmp_path / "repository")
    repository.check_interface(repository.render(bundle, 2))


# Warm-up


@pytest.fixture(scope="module")
def cnn_run(expensive, photo_folder, tmp_path_factory):
    """A run of a coupled student that has no class token."""
    folder = tmp_path_factory.mktemp("cnn")
    recipe = small_recipe(photo_folder, train={"steps": 1})
    recipe["student"] = {"name": "resnet10t", "image_size": 64}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_here(folder / "recipe.yaml", "--output", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def as_records(parts) -> dict[str, GraphRecord]:
    """What the manifest would say of graphs."""
    return {
        part.signature.graph: GraphRecord(
            name=part.signature.graph,
            file=f"{part.signature.graph}.onnx",
            precision="fp32",
            dtypes=(),
            opset=20,
            about=part.about,
            **{
                what: tuple(
                    {"name": p.name, "dtype": p.dtype, "shape": p.axes, "meaning": p.meaning}
                    for p in getattr(part.signature, what)
                )
                for what in ("inputs", "outputs")
            },
        )
        for part in parts
    }


@pytest.mark.parametrize("kind", ["with a class token", "without"])
def test_warm_ups_and_profiles_end_at_the_same_sizes(kind, bundle, cnn_run):
    student = open_student(bundle.path.parent / "run" if kind != "without" else cnn_run)
    parts = {part.signature.graph: part for part in build_parts(student, None, None)}
    records, stride = as_records(parts.values()), student.stride
    resolution = bundle.manifest.resolution.model_copy(
        update={
            "dynamic": True,
            "width": 96,
            "min_height": 32,
            "min_width": 32,
            "stride": stride,
        }
    )
    profiles = {name: make_profile(part, 4, SIZES, stride) for name, part in parts.items()}
    varying = changed(bundle, graphs=tuple(records.values()), resolution=resolution)
    assert "tokens" in {axis for t in records["head_mae"].inputs for axis in t.shape}
    for name, record in records.items():
        model = graph_model(varying, record, Settings(backend="onnxruntime"))
        options = provider_options(varying, record, 4)
        for tensor in record.inputs:
            low, favoured, high = profiles[name].shapes[tensor.name]
            (sample,) = model.config.model_warmup
            assert tuple(sample.inputs[tensor.name].dims) == high[1:], (name, tensor.name)
            # the python backend's onnxruntime builds for the same shapes as export does
            for which, shape in (("min", low), ("opt", favoured), ("max", high)):
                said = options[f"trt_profile_{which}_shapes"].split(",")
                assert f"{tensor.name}:{'x'.join(map(str, shape))}" in said
    # a bundle that does not say it yet, but has engines
    silent = {n: record.model_copy(update={"about": {}}) for n, record in records.items()}
    engine = BundledEngine.model_construct(
        graph="head_mae", profiles=(profiles["head_mae"],), flavour="tensorrt"
    )
    old = changed(varying, graphs=tuple(silent.values()), engines=(engine,))
    assert usual_sizes(old)["tokens"] == usual_sizes(varying)["tokens"]


@pytest.mark.parametrize("told", ["many", -1, 10**12, True, None, 1.5])
def test_a_manifest_that_says_nonsense_of_class_tokens_is_one_line(bundle, told):
    graphs = [
        g.model_copy(update={"about": {"class_tokens": told}}) if g.name == "interaction" else g
        for g in bundle.manifest.graphs
    ]
    with pytest.raises(UserError, match="class tokens, 0 to 64 are possible: export again"):
        usual_sizes(changed(bundle, graphs=tuple(graphs)))


# Engines


def test_an_engine_without_weights_is_refused(with_engines):
    with pytest.raises(UserError, match=r"'backbone' was built without weights.*--strip-weights"):
        build_models(with_engines(strip_weights=True), Settings(**TENSORRT))
    build_models(with_engines(refit=True), Settings(**TENSORRT))


def test_a_version_compatible_engine_is_said_on_every_command_line(
    with_engines, tmp_path, monkeypatch, capsys
):
    settings = Settings(**TENSORRT, devices=(0, 2))
    pools = [f"--cuda-memory-pool-byte-size={gpu}:{POOL_BYTES}" for gpu in (0, 2)]
    for compatible, expected in ((False, pools), (True, [*pools, VERSION_FLAG])):
        repository = tmp_path / f"repository_{compatible}"
        made = with_engines(version_compatible=compatible)
        make_repository(made, repository, settings)
        assert native_flags(repository) == expected
        listening = {"grpc": ("127.0.0.1", 8001)}
        line = command_line(
            Tritonserver(Path("tritonserver"), embedded=False),
            repository,
            Options(gpu=True, extra=("--last",)),
            listening,
            "key",
        )
        assert [flag for flag in line if flag in [*pools, VERSION_FLAG]] == expected
        # echo stands for tritonserver: the script's last word is its command line
        done = subprocess.run(
            ["/bin/sh", ROOT / "deploy" / "triton.sh", "--last"],
            env={"PATH": os.environ["PATH"], "TRITONSERVER": "/bin/echo"}
            | {"MODEL_REPOSITORY": str(repository)},
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0 and done.stdout.split()[-len(expected) - 1 :] == [
            *expected,
            "--last",
        ]
        monkeypatch.setattr("serve.bundle.read_bundle", lambda *_, made=made: made)
        words = [str(made.path), "--output", str(tmp_path / f"again_{compatible}")]
        assert main([*words, "--backend", "tensorrt", "--kind", "gpu"]) == 0
        assert (VERSION_FLAG in capsys.readouterr().out) == compatible


def test_cuda_graphs_are_captured_for_the_batches_that_the_batcher_makes(with_engines):
    config = configurations(with_engines(), **TENSORRT)["backbone"]
    assert config.optimization.cuda.graphs
    sizes = [spec.batch_size for spec in config.optimization.cuda.graph_spec]
    assert sizes == [1, 2, 3, 4] and config.max_batch_size == 4
    config = configurations(with_engines(), **TENSORRT, max_batch=3)["backbone"]
    assert [spec.batch_size for spec in config.optimization.cuda.graph_spec] == [1, 2, 3]
    assert not config.dynamic_batching.preferred_batch_size, "it would split batches of others"


# bf16


def test_onnxruntime_on_cpus_has_no_bf16_convolution():
    """Once it has, `check_native` may let such bundles through."""
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, 4, 4]) for n in "xy"]
    nodes = [
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.BFLOAT16),
        helper.make_node("Conv", ["b", "b"], ["c"]),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    ports[1].type.tensor_type.shape.dim[2].dim_value = 1
    ports[1].type.tensor_type.shape.dim[3].dim_value = 1
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=9)
    with pytest.raises(Exception, match=r"Could not find an implementation for Conv\(22\)"):
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"runtime": "onnxruntime"}, "--runtime openvino"),
        ({"runtime": "onnxruntime", "kind": "gpu"}, "--runtime tensorrt"),
        ({"backend": "onnxruntime"}, "--runtime openvino"),
        ({"backend": "onnxruntime", "kind": "gpu"}, "--backend tensorrt"),
        ({"runtime": "openvino"}, ""),
        ({"runtime": "tensorrt", "kind": "gpu"}, ""),
    ],
)
def test_bf16_is_refused_where_onnxruntime_would_not_load_it(bundle, settings, remedy):
    rounded = changed(bundle, precision="bf16")
    if not remedy:
        build_models(rounded, Settings(**settings))
        return
    with pytest.raises(UserError, match=f"is bf16.*{remedy}.*--precision fp16") as raised:
        build_models(rounded, Settings(**settings))
    assert "\n" not in str(raised.value)


# onnxruntime's TensorRT provider


@pytest.mark.parametrize(
    ("precision", "flags"),
    [
        ("fp32", set()),
        ("fp16", {"trt_fp16_enable", "trt_layer_norm_fp32_fallback"}),
        ("bf16", {"trt_bf16_enable"}),
        ("int8", {"trt_int8_enable"}),
    ],
)
def test_the_tensorrt_provider_is_told_shapes_and_types(bundle, precision, flags):
    graph = bundle.graphs["interaction"].model_copy(update={"precision": precision})
    options = provider_options(bundle, graph, 3)
    shapes = {f"trt_profile_{which}_shapes" for which in ("min", "opt", "max")}
    assert set(options) == shapes | flags and {options[flag] for flag in flags} <= {"1"}
    assert options["trt_profile_max_shapes"] == "features:3x4x4x48,features_global:3x1x48"
    assert options["trt_profile_min_shapes"] == "features:1x4x4x48,features_global:1x1x48"
    assert b"provider_options" not in graph_json(bundle, graph)
    files = build_models(bundle, Settings(runtime="tensorrt", kind="gpu"))[0].files
    assert b'"trt_profile_max_shapes": "image:4x64x64x3"' in files["model.json"]


def test_engines_are_kept_beside_the_graph_if_anything_can_be(tmp_path, monkeypatch):
    graph = tmp_path / "model.onnx"
    kept = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(tmp_path)}
    assert graph_call.engine_cache(graph) == kept
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may be root
    assert graph_call.engine_cache(graph) == {"trt_engine_cache_enable": "0"}


# The guard


def test_without_the_nan_check_nothing_is_copied_for_it(bundle):
    settings = {"backend": "onnxruntime", "nan_check": False}
    configs = configurations(bundle, **settings)
    assert lint(configs) == [] and "finite" not in configs and "guard" in configs
    steps = [step.model_name for step in configs["features"].ensemble_scheduling.step]
    assert steps[:2] == ["guard", "backbone"]


def test_the_python_backend_needs_no_guard(bundle):
    assert not {"guard", "finite", "fused_graph"} & set(configurations(bundle))


class TestLint:
    """Each trap, written into a repository that is otherwise right."""

    @pytest.fixture
    def configs(self, with_engines):
        found = configurations(with_engines(), **TENSORRT)
        assert lint(found) == []
        return found

    def test_graphs_for_two_sizes_alone(self, configs):
        cuda = configs["backbone"].optimization.cuda
        del cuda.graph_spec[:]
        assert any("batches of 1 and 4 alone would run as graphs" in said for said in lint(configs))
        configs["backbone"].dynamic_batching.preferred_batch_size[:] = [2]
        assert lint(configs) == []
        cuda.graph_spec.add(batch_size=5)
        assert any("graph_spec of batch_size 5" in said for said in lint(configs))

    def test_an_engine_on_the_cpu_and_a_gpu_twice(self, configs):
        (group,) = configs["backbone"].instance_group
        group.gpus[:] = [0, 0]
        assert any("GPUs [0, 0]: name each once" in said for said in lint(configs))
        group.kind = ModelInstanceGroup.KIND_CPU
        assert any("tensorrt backend runs on GPUs alone" in said for said in lint(configs))
        configs["backbone"].backend = "onnxruntime"
        said = "\n".join(lint(configs))
        assert "profiles are the tensorrt backend's" in said and "not model.onnx" in said
        assert "only the tensorrt backend captures CUDA graphs" in said

    def test_inputs_that_reach_the_graph_as_something_else(self, configs):
        (port,) = configs["backbone"].input
        port.allow_ragged_batch = True
        port.reshape.shape[:] = [1, 64, 64, 3]
        said = "\n".join(lint(configs))
        assert "'image' is reshaped" in said and "'image' allows ragged batches" in said

    def test_a_cache_that_never_hits(self, configs):
        configs["segmentation_head"].response_cache.enable = True
        assert any("response_cache on a graph on a GPU" in said for said in lint(configs))

    @pytest.mark.parametrize("door", ["features", "fused", "segmentation"])
    def test_a_picture_past_the_guard(self, configs, door):
        steps = configs[door].ensemble_scheduling.step
        assert steps[0].model_name == "guard"
        for step in steps:
            for inner, outer in step.input_map.items():
                step.input_map[inner] = "image" if outer == "guarded_image" else outer
        del steps[0]
        assert any(
            f"{door}: step '" in said and "reads 'image' as the client sent it" in said
            for said in lint(configs)
        )

    @pytest.mark.parametrize(
        ("door", "tensor", "reader"),
        [
            ("features", "mae_token", "clients"),
            ("segmentation", "segmentation_logits", "step 'segmentation_map'"),
        ],
    )
    def test_numbers_past_the_check(self, configs, door, tensor, reader):
        steps = configs[door].ensemble_scheduling.step
        at = next(n for n, step in enumerate(steps) if tensor in step.output_map.values())
        assert steps[at].model_name == "finite"
        del steps[at]
        for step in steps:
            if tensor in step.output_map:
                step.output_map[tensor] = tensor
        assert any(f"'{tensor}' goes from" in said and reader in said for said in lint(configs))

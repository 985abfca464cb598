"""From a bundle to a repository: names, types and dims are the manifest's, and what Triton would
serve wrongly is refused.
"""

import json
import shutil
from pathlib import Path
from typing import BinaryIO

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInput

from contract.errors import UserError
from contract.manifest import read_manifest
from contract.signature import IDENTITY
from contract.untrusted import open_file
from serve.bundle import Bundle, read_bundle
from serve.repository.__main__ import main
from serve.repository.build import make_repository
from serve.repository.contents import MADE_WITH, read_made_with
from serve.repository.lint import lint
from serve.repository.model_config import FRONT_QUEUES, TEMPLATES, read_template
from serve.repository.models import build_models, needed, served_name
from serve.repository.settings import Settings, choose_runtime, instances_and_threads, runtimes_here
from serve.repository.versions import Repository


def configs_of(repository):
    """Every config.pbtxt below a folder, read by Triton's own schema."""
    return {
        path.parent.name: text_format.Parse(path.read_text(), ModelConfig())
        for path in repository.glob("*/config.pbtxt")
    }


@pytest.fixture(scope="module")
def bundle(small_bundle):
    return read_bundle(small_bundle)


@pytest.fixture(scope="module")
def repository(small_bundle, tmp_path_factory):
    """In the form of GPUs: a model a graph."""
    folder = tmp_path_factory.mktemp("rendered") / "repository"
    words = ["--output", folder, "--instances", 2, "--threads", 1, "--parts", "apart"]
    assert main([str(word) for word in (small_bundle, *words)]) == 0
    return folder


@pytest.fixture(scope="module")
def together(small_bundle, tmp_path_factory):
    """In the form of CPUs: a model that holds all graphs."""
    folder = tmp_path_factory.mktemp("rendered") / "repository"
    words = ["--output", folder, "--instances", 2, "--threads", 1]
    assert main([str(word) for word in (small_bundle, *words)]) == 0
    return folder


@pytest.fixture
def copy(small_bundle, tmp_path):
    """A bundle that a test may break."""
    return shutil.copytree(small_bundle, tmp_path / "bundle")


def configurations(bundle, **settings):
    settings = Settings(**{"parts": "apart"} | settings)
    return {model.name: model.config for model in build_models(bundle, settings)}


@pytest.mark.parametrize(
    "template", sorted(path.parent.name for path in TEMPLATES.glob("*/config.pbtxt"))
)
def test_a_template_is_a_valid_configuration_of_its_own_name(template):
    config = read_template(template)
    assert config.name == template
    assert config.platform == "ensemble" or (TEMPLATES / template / "1" / "model.py").is_file()


def test_serving_reads_the_manifest_as_export_wrote_it(bundle, small_bundle):
    assert bundle.manifest == read_manifest(small_bundle)


def test_configurations_have_the_names_types_and_dims_of_the_graphs(repository, bundle):
    configs = configs_of(repository)
    for graph in bundle.manifest.graphs:
        config = configs[served_name(graph.name)]
        for ports, tensors in ((config.input, graph.inputs), (config.output, graph.outputs)):
            found = [
                (port.name, DataType.Name(port.data_type), tuple(port.dims))
                for port in ports
                if port.name != IDENTITY
            ]
            kinds = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}
            assert found == [(t.name, kinds[t.dtype], tuple(t.shape[1:])) for t in tensors]
        assert config.max_batch_size == bundle.manifest.max_batch


def test_the_front_door_offers_what_fused_gives(repository, bundle):
    configs = configs_of(repository)
    offered = {(port.name, tuple(port.dims)) for port in configs["features"].output}
    assert offered == {(port.name, tuple(port.dims)) for port in configs["fused"].output}
    assert offered == {(port.name, tuple(port.dims)) for port in configs["features_encoded"].output}


def test_each_version_holds_the_graph_whose_hash_it_names(repository, bundle):
    for graph in bundle.manifest.graphs:
        folder = repository / served_name(graph.name) / "1"
        assert json.loads((folder / "model.json").read_text())["sha256"] == {
            "model.onnx": bundle.manifest.files[graph.file]
        }
        assert (folder / "model.onnx").read_bytes() == (bundle.path / graph.file).read_bytes()


def test_one_model_holds_every_graph_and_offers_what_the_ensemble_does(
    together, repository, bundle
):
    one, other = configs_of(together), configs_of(repository)
    tasks = {"segmentation", "depth"}
    assert set(one) == {"features", "features_encoded", "decode", "fused", *tasks}
    for door in ("features", "features_encoded", *tasks):
        assert one[door].backend == "python" and other[door].platform == "ensemble"
        assert list(one[door].version_policy.specific.versions) == [1]
        for ports in ("input", "output"):
            found, expected = (
                [(p.name, p.data_type, tuple(p.dims)) for p in getattr(configs[door], ports)]
                for configs in (one, other)
            )
            assert found == expected
        assert one[door].max_batch_size == other[door].max_batch_size
        for name, known in other[door].parameters.items():
            assert one[door].parameters[name] == known
    folder = together / "features" / "1"
    for graph in bundle.parts:
        assert (folder / f"{graph.name}.onnx").read_bytes() == (
            bundle.path / graph.file
        ).read_bytes()
    about = json.loads((folder / "model.json").read_text())
    assert about["sha256"] == {
        f"{g.name}.onnx": bundle.manifest.files[g.file] for g in bundle.parts
    }
    assert one["features"].instance_group[0].count == 2
    assert lint(one) == []


@pytest.mark.parametrize(
    ("settings", "together"),
    [
        ({}, True),
        ({"kind": "gpu"}, False),
        ({"backend": "onnxruntime"}, False),
        ({"parts": "apart"}, False),
    ],
)
def test_graphs_are_together_where_models_are_processes_on_cpus(settings, together):
    assert Settings(**settings).together is together


def test_a_repository_of_an_older_version_is_served_as_it_is_and_gets_no_other_bundle(
    repository, bundle, tmp_path
):
    older = shutil.copytree(repository, tmp_path / "repository")
    about = json.loads((older / MADE_WITH).read_text())
    del about["settings"]["parts"]
    (older / MADE_WITH).write_text(json.dumps(about))
    assert not read_made_with(older).settings.together
    config = older / "backbone" / "config.pbtxt"
    found = text_format.Parse(config.read_text(), ModelConfig())
    del found.output[-1]
    config.write_text(text_format.MessageToString(found))
    made = Repository(older)
    with pytest.raises(UserError, match="was rendered by an older version.*: render a new one"):
        made.check_interface(made.render(bundle, 2))


def test_a_task_needs_the_backbone_and_only_what_lies_between(bundle):
    for task in ("segmentation", "depth"):
        names = [graph.name for graph in needed(bundle, task)]
        reads = {tensor.name for tensor in bundle.graphs[task].inputs}
        assert names == (
            ["backbone", task] if "spaces" not in reads else ["backbone", "interaction", task]
        )


def test_instances_go_to_the_graphs_whose_weights_are_a_quarter_of_the_backbones(
    repository, small_bundle
):
    configs, weights = (
        configs_of(repository),
        {path.stem: path.stat().st_size for path in small_bundle.glob("*.onnx")},
    )
    large = {name for name, size in weights.items() if 4 * size >= weights["backbone"]}
    assert {"backbone", "fused", "interaction"} <= large and len(large) < len(weights)
    counts = {name: configs[served_name(name)].instance_group[0].count for name in weights}
    assert counts == {name: 2 if name in large else 1 for name in weights}


@pytest.mark.parametrize(
    ("asked", "cores", "found"),
    [
        ((None, None), 1, (1, 1)),
        ((None, None), 2, (2, 2)),
        ((None, None), 16, (4, 8)),
        ((1, None), 2, (1, 2)),
        ((4, None), 2, (4, 1)),
        ((None, 1), 2, (4, 1)),
        ((None, 2), 2, (2, 2)),
        ((1, None), 64, (1, 8)),
        ((3, 5), 2, (3, 5)),
    ],
)
def test_two_instances_share_the_cores(asked, cores, found):
    assert instances_and_threads(*asked, cores) == found


def test_native_backends_get_the_graph_and_no_python(bundle):
    models = {
        model.name: model
        for model in build_models(
            bundle, Settings(backend="onnxruntime", kind="gpu", devices=(0, 1))
        )
    }
    backbone = models["backbone"]
    assert backbone.config.backend == "onnxruntime" and set(backbone.files) == {"model.onnx"}
    assert list(backbone.config.instance_group[0].gpus) == [0, 1]
    assert models["decode"].config.backend == "python"
    assert lint({name: model.config for name, model in models.items()}) == []


def test_a_served_model_says_that_openvino_computes_in_bf16_where_export_compared_it_so(bundle):
    manifest = bundle.manifest.model_copy(update={"openvino_precision": "bf16"})
    faster = Bundle(bundle.path, manifest)
    for of, runtime, said in (
        (bundle, "openvino", "openvino"),
        (faster, "openvino", "openvino-bf16"),
        (faster, "onnxruntime", "onnxruntime"),
    ):
        models = {model.name: model for model in build_models(of, Settings(runtime=runtime))}
        assert models["features"].config.parameters["runtime"].string_value == said


def test_tensorrt_without_engines_of_full_tensorrt_is_refused(bundle):
    with pytest.raises(
        UserError, match="no engine of full TensorRT for 'backbone'.*--formats onnx,tensorrt"
    ):
        build_models(bundle, Settings(backend="tensorrt", kind="gpu"))


def test_larger_batches_than_were_checked_are_refused(bundle):
    with pytest.raises(UserError, match="--max-batch 64: the bundle was checked up to"):
        build_models(bundle, Settings(max_batch=64))


def test_batching_and_warm_up_can_be_left_out(bundle):
    config = configurations(bundle, batching=False, warmup=False)["backbone"]
    assert not config.HasField("dynamic_batching") and not config.model_warmup


@pytest.mark.parametrize("file", ["backbone.onnx", "manifest.json"])
def test_a_changed_byte_is_refused_and_nothing_is_written(copy, tmp_path, capsys, file):
    content = bytearray((copy / file).read_bytes())
    place = (
        len(content) // 2
        if file != "manifest.json"
        else bytes(content).index(b'"max_batch": ') + len(b'"max_batch": ')
    )
    content[place] = ord("9") if file == "manifest.json" else content[place] ^ 1
    (copy / file).write_bytes(content)
    assert main([str(copy), "--output", str(tmp_path / "repository")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("sha256" in said or "seal" in said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_a_folder_that_is_no_bundle_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path), "--output", str(tmp_path / "repository")]) == 2
    assert (
        "is not a bundle: manifest.json is missing. Create one with `python -m export.run`"
        in capsys.readouterr().err
    )


def test_an_output_that_holds_files_needs_force(small_bundle, tmp_path, capsys):
    (tmp_path / "kept").write_text("mine")
    assert main([str(small_bundle), "--output", str(tmp_path)]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "kept").read_text() == "mine"


def test_force_replaces_a_repository_and_nothing_else(small_bundle, together, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    command = [str(small_bundle), "--output", str(folder), "--force"]
    assert main(command) == 2
    assert "holds thesis.txt, which is not part of a repository" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    shutil.rmtree(folder)
    shutil.copytree(together, folder)
    (folder / "mine").mkdir()
    assert main(command) == 2 and "holds mine" in capsys.readouterr().err
    (folder / "mine").rmdir()
    (folder / "decode" / "config.pbtxt").write_text("old")
    (tmp_path / "link").symlink_to(folder)
    command[2] = str(tmp_path / "link")
    assert main(command) == 0
    assert (tmp_path / "link").is_symlink() and len(configs_of(folder)) == len(configs_of(together))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]


def test_a_bundles_files_are_read_once_to_be_checked_and_once_to_be_copied(
    small_bundle, tmp_path, monkeypatch
):
    opened = []

    def watched(path: Path, *options: object) -> BinaryIO:
        opened.append(path)
        return open_file(path, *options)

    monkeypatch.setattr("serve.bundle.open_file", watched)
    monkeypatch.setattr("contract.untrusted.open_file", watched)
    bundle = read_bundle(small_bundle)
    opened.clear()
    for name in ("one", "two"):
        make_repository(bundle, tmp_path / name, Settings())
        assert opened.count(small_bundle / "backbone.onnx") == (2 if name == "one" else 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--instances", "0"], "--instances 0: give 1 or more"),
        (["--decoders", "0"], "--decoders 0: give 1 or more"),
        (["--queue-delay", "-1"], "--queue-delay -1"),
        (["--backend", "tensorrt"], "--kind gpu"),
        (["--runtime", "openvino", "--kind", "gpu"], "--runtime openvino runs on CPUs"),
        (["--runtime", "tensorrt"], "--runtime tensorrt runs on GPUs"),
        (["--response-cache", "nothing"], "--response-cache nothing: no such model"),
        (["--response-cache", "features", "--parts", "apart"], "response_cache on an ensemble"),
        (["--response-cache", "features"], "response_cache on a model of"),
        (["--response-cache", "backbone", "--parts", "apart"], "response_cache on a model of 5"),
        (["--parts", "together", "--kind", "gpu"], "--parts together is for --backend python"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(small_bundle, tmp_path, capsys, options, said):
    assert main([str(small_bundle), "--output", str(tmp_path / "repository"), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
    assert list(tmp_path.iterdir()) == []


def test_a_cache_is_allowed_where_answers_cannot_be_mixed_up(bundle):
    configs = configurations(bundle, response_cache=("segmentation_head",))
    assert configs["segmentation_head"].response_cache.enable
    assert lint(configs) == []


def test_the_runtime_on_cpus_is_openvino_where_it_is_installed():
    assert choose_runtime("auto", "cpu") == runtimes_here()[0] == "openvino"
    assert choose_runtime("auto", "gpu") == "onnxruntime"


class TestLint:
    """Each trap, written into a repository that is otherwise right."""

    @pytest.fixture
    def configs(self, bundle):
        found = configurations(bundle)
        assert lint(found) == []
        return found

    def test_an_output_that_a_step_reads(self, configs):
        features = configs["features"]
        features.output.add().CopyFrom(
            next(port for port in configs["backbone"].output if port.name == "features")
        )
        assert any("'features' is an output and is read by step" in said for said in lint(configs))

    def test_an_input_beside_the_first_step(self, configs):
        port = ModelInput(name="labels", data_type=DataType.TYPE_FP32, dims=[4])
        configs["features"].input.append(port)
        assert any("'labels' is not read by the first step" in said for said in lint(configs))

    def test_a_cache_on_inputs_that_vary(self, configs):
        head = configs["segmentation_head"]
        head.response_cache.enable = True
        head.input[0].dims[0] = -1
        assert any("shape varies" in said for said in lint(configs))

    def test_a_batch_size_that_is_not_written_down(self, configs):
        configs["backbone"].max_batch_size = 0
        said = lint(configs)
        assert any("backbone: max_batch_size is not set" in line for line in said)
        assert any("is more than the 0 of step 'backbone'" in line for line in said)

    def test_a_queue_without_end(self, configs):
        configs["backbone"].dynamic_batching.default_queue_policy.max_queue_size = 0
        assert any("without max_queue_size" in said for said in lint(configs))

    def test_a_step_that_is_not_told_of_which_bundle_its_inputs_are(self, configs):
        del configs["features"].ensemble_scheduling.step[1].input_map["identity"]
        assert any("step 'interaction' gets no 'identity'" in said for said in lint(configs))

    def test_later_steps_never_refuse_what_a_front_lets_in(self, configs):
        """Triton 2.51 crashes where a step refuses while others of its request run."""
        for config in configs.values():
            for step in config.ensemble_scheduling.step:
                if step.model_name not in ("backbone", "decode"):
                    policy = configs[step.model_name].dynamic_batching.default_queue_policy
                    assert policy.max_queue_size > FRONT_QUEUES * Settings().max_queue

    def test_strings_in_one_batch_with_those_of_others(self, configs):
        assert not any("decode" in said for said in lint(configs))
        configs["decode"].max_batch_size = 8
        assert any("decode: dynamic_batching of strings" in said for said in lint(configs))

    def test_warm_up_by_random_bytes(self, configs):
        data = configs["interaction"].model_warmup[0].inputs["features"]
        data.random_data = True
        assert any("warm-up of 'features' by random_data" in said for said in lint(configs))

    def test_steps_that_do_not_fit(self, configs):
        configs["interaction"].input[0].dims[-1] += 1
        configs["features"].ensemble_scheduling.step[0].model_version = 7
        del configs["depth_map"]
        said = "\n".join(lint(configs))
        assert "step 'interaction' reads 'features'" in said
        assert "features: its steps are of versions [1, 7]" in said
        assert "step 'depth_map' is not a model of this repository" in said

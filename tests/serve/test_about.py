"""What a client can read of a bundle in the server's configurations: the student, its teachers,
classes, units, sizes.
"""

import json

import pytest
import tritonclient.grpc as grpc

from serve.bundle import read_bundle
from serve.repository.models import build_models
from serve.repository.settings import Settings


@pytest.fixture(scope="module")
def bundle(small_bundle):
    return read_bundle(small_bundle)


def parameters(config) -> dict[str, str]:
    return {name: value.string_value for name, value in config.parameters.items()}


def test_the_front_doors_say_which_bundle_is_behind_them(bundle):
    configs = {model.name: model.config for model in build_models(bundle, Settings())}
    for door in ("features", "features_encoded"):
        about = json.loads(parameters(configs[door])["about"])
        assert (about["student"], about["method"], about["precision"]) == (
            "vit_tiny_patch16_224",
            "umt",
            "fp32",
        )
        assert about["bundle"] == bundle.version and (
            about["stride"],
            about["height"],
            about["width"],
        ) == (16, 64, 64)
        assert about["teachers"][2] == {"label": "dino", "role": "dino", "licence": "unknown"}
        assert set(about["tasks"]) == {"classification", "segmentation", "depth"}
        assert about["tasks"]["depth"] == {"unit": "metre", "stride": 16}
        assert about["tasks"]["classification"]["classes"]


def test_maps_say_what_their_numbers_mean(bundle):
    configs = {model.name: parameters(model.config) for model in build_models(bundle, Settings())}
    classes = json.loads(configs["segmentation"]["classes"])
    assert (
        classes[0] == "wall" and len(classes) == bundle.graphs["segmentation"].outputs[0].shape[-1]
    )
    assert configs["depth"]["unit"] == "metre" and "classes" not in configs["depth"]
    assert {
        configs[task][side] for task in ("segmentation", "depth") for side in ("height", "width")
    } == {"64"}


def test_a_running_server_passes_them_on(server, bundle):
    with grpc.InferenceServerClient(server.grpc) as client:
        about = json.loads(parameters(client.get_model_config("features").config)["about"])
        classes = json.loads(parameters(client.get_model_config("segmentation").config)["classes"])
    assert (
        about["bundle"] == bundle.version and classes == about["tasks"]["segmentation"]["classes"]
    )

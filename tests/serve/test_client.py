"""serve.client against a real server: what goes in, what comes out, and what is refused."""

import asyncio
import shutil
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc
from PIL import Image

from contract.images import Limits, decode
from contract.views import SQUASH
from distill.data.pictures import PackagedPhotos
from serve.client import FeatureClient
from serve.client.aio import AsyncFeatureClient
from serve.client.answers import join
from serve.client.options import ADMIN, RequestOptions
from serve.client.served import Port, Served, read_answer
from serve.client.shared_memory import Pool, Region
from serve.errors import (
    BadRequest,
    DeadlineExceeded,
    NotAllowed,
    NotServed,
    ServerFailed,
    WrongAnswer,
)

SIZE = 64
"""Sides of the small bundle's pictures."""


@pytest.fixture(scope="module")
def client(server):
    with FeatureClient(server.grpc) as found:
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Eleven photographs as PNG files of many sizes."""
    folder, photos = tmp_path_factory.mktemp("pictures"), PackagedPhotos()
    paths = []
    for number in range(11):
        path = folder / f"{number}.png"
        photo = photos.load(number % len(photos)).convert("RGB")
        photo.resize((60 + 9 * number, 100 - 5 * number)).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def pixels(files):
    """The same as the model reads them, uint8 [11, 64, 64, 3]."""
    return np.stack([SQUASH.pixels(Image.open(path), SIZE, SIZE) for path in files])


def raw(url, pixels, outputs):
    """What tritonclient alone is answered."""
    with grpc.InferenceServerClient(url) as triton:
        image = grpc.InferInput("image", pixels.shape, "UINT8")
        image.set_data_from_numpy(pixels)
        answer = triton.infer(
            "features", [image], outputs=[grpc.InferRequestedOutput(name) for name in outputs]
        )
        return {name: answer.as_numpy(name) for name in outputs}


# What goes in, what comes out


def test_every_form_of_a_picture_gives_the_same_features(client, server, files, pixels):
    expected = raw(server.grpc, pixels[:1], ["backbone_global"])["backbone_global"]
    path, photo = files[0], Image.open(files[0])
    forms = (
        path,
        str(path),
        path.read_bytes(),
        photo,
        np.asarray(photo),
        pixels[0],
        pixels[:1],
        [path],
        iter([path]),
    )
    for form in forms:
        assert np.array_equal(client.features(form, "backbone_global")["backbone_global"], expected)


def test_a_list_may_mix_forms_and_keeps_its_order(client, files, pixels):
    mixed = [files[0], files[1].read_bytes(), pixels[2:4], Image.open(files[4])]
    found = client.features(mixed, ["mae_token"])["mae_token"]
    np.testing.assert_allclose(
        found, client.features(pixels[:5], ["mae_token"])["mae_token"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("encoded", [False, True])
def test_more_than_a_batch_is_split_and_joined_in_order(client, files, pixels, encoded):
    answer = client.features(files, ["backbone_global", "dino_patches"], encoded=encoded)
    assert answer["backbone_global"].shape[0] == len(files) == 11  # the bundle's batch is 4
    assert answer.size == (SIZE, SIZE) and answer.grid("dino_patches") == (4, 4)
    for number in range(len(files)):
        alone = client.features(pixels[number], ["backbone_global", "dino_patches"])
        for name in alone:
            np.testing.assert_allclose(answer[name][number], alone[name][0], rtol=1e-3, atol=1e-4)


def test_without_a_choice_every_output_comes(client, pixels):
    assert set(client.features(pixels[0])) == set(client.describe().outputs)


def test_encoded_pictures_that_are_no_files_are_sent_without_loss(client, pixels):
    for form in (pixels[0], Image.fromarray(pixels[0])):
        found = client.features(form, "backbone_global", encoded=True)["backbone_global"]
        np.testing.assert_allclose(
            found, client.features(pixels[0], "backbone_global")["backbone_global"], atol=1e-5
        )


def test_answers_may_be_written_to(client, pixels):
    client.features(pixels[0], "backbone_global")["backbone_global"][:] = 0


# What is refused, and how


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "no pictures"),
        (np.zeros((0, 64, 64, 3), np.uint8), "not empty"),
        (np.zeros((64, 64), np.uint8), r"\[H, W, 3\]"),
        (np.zeros((64, 64, 4), np.uint8), r"\[H, W, 3\]"),
        (np.zeros((64, 64, 3)), "float64: give uint8"),
        (7, "of type int"),
        ([{"a": 1}], "picture 0 is of type dict"),
        (b"", "empty"),
        (b"GIF89a", "not a JPEG, PNG or WEBP"),
        ("nowhere/cat.jpg", "nowhere/cat.jpg: No such file"),
    ],
)
def test_what_is_no_picture_is_refused_before_the_server_is_asked(client, images, said):
    with pytest.raises(BadRequest, match=said):
        client.features(images)


def test_a_damaged_picture_is_named_wherever_it_is_decoded(client, files, pixels):
    damaged = files[0].read_bytes()[:200]
    for encoded in (False, True):
        with pytest.raises(BadRequest, match="picture 6"):
            client.features([*files[:6], damaged], "backbone_global", encoded=encoded)
    with pytest.raises(BadRequest, match="picture 1: .*more than the 1,000"):
        with FeatureClient(client.url, limits=Limits(max_bytes=1000)) as strict:
            strict.features([pixels[0], files[5].read_bytes() + bytes(50_000)])


def test_an_unknown_output_is_answered_with_the_nearest(client, pixels):
    for asked in ("backbone.global", "backbone_globl"):
        with pytest.raises(BadRequest, match="did you mean 'backbone_global'"):
            client.features(pixels[0], [asked])


def test_an_unknown_model_a_wrong_size_and_no_time_are_refused(client, pixels):
    with pytest.raises(NotServed, match="nope"):
        client.features(pixels[0], model="nope")
    with pytest.raises(BadRequest, match="64x64 only"):
        client.features(pixels[0], size=(128, 128))
    with pytest.raises(BadRequest, match="timeout=0"):
        client.features(pixels[0], timeout=0)
    with pytest.raises(BadRequest, match="encoded"):
        client.features(pixels[0], model="fused", encoded=True)


def test_options_may_be_shared_and_changed_for_one_call(client, files):
    options = RequestOptions(encoded=True, request_id="shared")
    assert client.features(files[0], "backbone_global", options).request_id == "shared"
    answer = client.features(files[0], "backbone_global", options, request_id="mine")
    assert answer.request_id == "mine" and options.request_id == "shared"
    with pytest.raises(BadRequest, match="timeout=-1: give seconds above 0"):
        client.features(files[0], options=options, timeout=-1)
    with pytest.raises(BadRequest, match="leave one of them out"):
        client.features(files[0], options=options, size=(SIZE, SIZE))
    with pytest.raises(TypeError, match="tiemout"):
        client.features(files[0], tiemout=1)


def test_errors_of_the_server_carry_the_requests_id(client, files):
    with pytest.raises(BadRequest, match=r"\[request mine-7\]") as caught:
        client.features(files[0].read_bytes()[:100], encoded=True, request_id="mine-7")
    assert caught.value.request_id == "mine-7"


def test_an_answer_that_is_not_what_was_promised_is_refused():
    served = Served("m", 4, {}, {"a": Port("a", "FP32", (3,)), "b": Port("b", "FP32", (-1, 2))}, {})
    good = {"a": np.zeros((2, 3), np.float32), "b": np.zeros((2, 5, 2), np.float32)}

    def look(names=("a", "b"), **changed):
        values = good | changed
        return read_answer(served, ("a", "b"), 2, values.get, names, "id")

    assert look()["b"].shape == (2, 5, 2)
    for wrong in (
        {"names": ("a",)},
        {"names": ("a", "b", "c")},
        {"a": None},
        {"a": np.zeros((2, 3))},
        {"a": np.zeros((1, 3), np.float32)},
        {"a": np.zeros((2, 4), np.float32)},
        {"b": np.zeros((2, 5), np.float32)},
        {"b": np.full((2, 5, 2), np.nan, np.float32)},
        {"a": np.full((2, 3), np.inf, np.float32)},
    ):
        with pytest.raises(WrongAnswer):
            look(**wrong)


def test_a_model_of_many_sizes_says_which_it_takes():
    about = (
        '{"stride": 16, "height": 96, "width": 64, "min_height": 32, "min_width": 32, '
        '"dynamic": true}'
    )
    many = Served(
        "features", 4, {"image": Port("image", "UINT8", (-1, -1, 3))}, {}, {"about": about}
    )
    assert many.size() == (96, 64)
    assert many.takes((96, 64)) and many.takes((32, 48))
    assert (
        not many.takes((16, 32))
        and not many.takes((64, 96))
        and not many.takes((60, 64))
        and not many.takes(None)
    )
    silent = Served("features", 4, many.inputs, {}, {})  # then the server has the word
    assert silent.size() is None and silent.takes((60, 64))


def test_parts_of_two_versions_are_not_joined():
    one, other = np.array([b"cat"], np.object_), np.array([b"dog"], np.object_)
    for first, second in ((one, other), (np.zeros((2, 3)), np.zeros((2, 4)))):
        with pytest.raises(WrongAnswer, match="send the request again"):
            join([({"a": first}, {}), ({"a": second}, {})], (8, 8), "id", SQUASH)
    lost = ({}, {"a": ServerFailed("broke")})
    answer = join(
        [({"a": np.zeros((2, 3)), "b": np.ones((2, 1))}, {}), ({"b": np.ones((1, 1))}, lost[1])],
        (8, 8),
        "",
        SQUASH,
    )
    assert list(answer) == ["b"] and answer["b"].shape == (3, 1)
    with pytest.raises(KeyError, match="broke"):
        answer["a"]


# Shared memory


def regions(server):
    with grpc.InferenceServerClient(server.grpc) as triton:
        status = triton.get_system_shared_memory_status(headers={ADMIN: server.admin_key})
        return {name for name in status.regions if name.startswith("vfm-")}


def test_shared_memory_changes_nothing_and_leaves_nothing(client, server, files):
    outputs = ["backbone_patches", "cls_token", "depth"]
    expected = client.features(files, outputs)
    with FeatureClient(server.grpc, shared_memory="system", admin_key=server.admin_key) as fast:
        for _ in range(2):
            found = fast.features(files, outputs)
            for name in outputs:
                assert np.allclose(found[name], expected[name], atol=1e-4)
        assert regions(server)
        # a server that was started anew knows no regions
        with grpc.InferenceServerClient(server.grpc) as triton:
            triton.unregister_system_shared_memory(headers=fast.calls.headers())
        assert np.allclose(fast.features(files, outputs)["depth"], expected["depth"], atol=1e-4)
        mine = regions(server)
    assert not regions(server) and not any((Path("/dev/shm") / name).exists() for name in mine)


def test_shared_memory_wants_the_key_of_a_server_that_restricts_it(server, pixels):
    with (
        FeatureClient(server.grpc, shared_memory="system") as fast,
        pytest.raises(NotAllowed, match="key"),
    ):
        fast.features(pixels[0])


def test_shared_memory_of_a_request_that_was_given_up_is_lent_to_nobody():
    pool = Pool("system")
    places = {"image": (0, 100)}
    first = pool.lend(places)
    pool.retire(first)
    second = pool.lend(places)
    assert second is not first and pool.leave(everything=False) == []
    pool.back(second)
    assert pool.lend({"image": (0, 50)}) is second
    first.retired -= 1000
    assert pool.leave(everything=False) == [first]
    for region in (first, second):
        region.destroy()


def test_regions_hold_inputs_and_outputs_apart():
    region = Region("system", 1 << 12, 0)
    region.fill({"image": np.full((1, 4, 4, 3), 7, np.uint8)}, {"image": (0, 48), "a": (64, 8)})
    memory = np.frombuffer(region.handle._mpsm_handle.buf, np.uint8).copy()
    assert (memory[:48] == 7).all() and not memory[48:].any()
    assert region.read("a", "FP32", [1, 2]).tolist() == [[0, 0]]
    region.destroy()


def test_cuda_shared_memory_says_what_is_missing():
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU")
    with pytest.raises(BadRequest, match="cuda"):
        with FeatureClient(shared_memory="cuda") as fast:
            fast.calls.pool.lend({"image": (0, 100)})
    with pytest.raises(BadRequest, match="'system', 'cuda' or None"):
        FeatureClient(shared_memory="posix")


# asyncio


def test_asyncio_is_answered_the_same(client, server, files):
    outputs = ["backbone_global", "segmentation_logits"]
    expected = client.features(files, outputs)

    async def ask():
        async with AsyncFeatureClient(server.grpc) as found:
            whole, *each = await asyncio.gather(
                found.features(files, outputs),
                *(found.features(path, outputs, encoded=True) for path in files),
            )
            with pytest.raises(BadRequest, match="did you mean"):
                await found.features(files, ["backbone_globl"])
            task = asyncio.create_task(found.features(files * 4))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(DeadlineExceeded):
                await found.features(files, timeout=0.002)
            again = await found.features(files, outputs)
            return whole, each, again

    whole, each, again = asyncio.run(ask())
    for name in outputs:
        np.testing.assert_allclose(whole[name], expected[name], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(again[name], expected[name], rtol=1e-3, atol=1e-4)
        joined = np.concatenate([answer[name] for answer in each])
        np.testing.assert_allclose(joined, expected[name], rtol=1e-3, atol=1e-4)


def test_what_is_decoded_here_is_what_the_server_decodes(files, pixels):
    for path, expected in zip(files, pixels, strict=True):
        assert np.array_equal(SQUASH.pixels(decode(path.read_bytes()), SIZE, SIZE), expected)

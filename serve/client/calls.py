"""What a client does, in steps that name no socket: describe, split, ask, check, drop a failing
head, join.
"""

import contextlib
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial as bind
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from contract.images import Limits
from serve.client.answers import Answer, join
from serve.client.breaker import Breakers
from serve.client.heads import Found, ask_heads
from serve.client.inputs import Images, Picture, common_size, list_pictures
from serve.client.retry import Budget, Retry, attempt
from serve.client.served import DECODER, ENCODED, FRONT_DOOR, Served, read_answer
from serve.client.shared_memory import Kind, Pool, Region, lay_out
from serve.client.steps import Rpc, Steps, Together, Work
from serve.client.tls import Tls
from serve.errors import BadRequest, NotAllowed, NotServed, ServerFailed, WrongAnswer
from serve.server.rest import ADMIN_HEADER

ADMIN = f"triton-grpc-protocol-{ADMIN_HEADER}"
"""gRPC's header for the key of restricted endpoints; the part after `triton-grpc-protocol-` is the
server's to choose.
"""

CANCELS = (2, 70)
"""Triton's first version (container 26.06) that is told to drop a request whose time is up.
Cancelling one while its answer is being sent crashes older servers (triton-inference-server/server
issues 7368 and 8034; 2.51 dies within a hundred such requests): those are left to finish, and the
client merely stops waiting.
"""


@dataclass(frozen=True)
class Options:
    """How a client behaves; its defaults are stated here and nowhere else."""

    timeout: float = 30.0
    """Seconds for each request (of at most the model's batch), all its attempts together."""
    retry: Retry = Retry()
    budget: tuple[float, float] = (0.2, 100)
    """Retries: so many a call in the long run, and so many at once (see serve.client.retry.Budget).
    """
    breaker: tuple[int, float] = (3, 10.0)
    """A head is left alone after so many failures in a row, for so many seconds."""
    concurrency: int = 4
    """Requests of one call that are under way at the same time."""
    shared_memory: Kind | None = None
    device: int = 0
    """GPU of CUDA shared memory."""
    admin_key: str | None = field(default=None, repr=False)
    """Key of the server's restricted endpoints; shared memory wants it where they are."""
    admin_header: str = ADMIN
    tls: Tls | None = None
    limits: Limits = Limits()
    """Of encoded pictures that are decoded here."""


class Calls:
    """The state that a client's calls share: known models, budget, breakers, shared memory."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.budget, self.breakers = Budget(*options.budget), Breakers(*options.breaker)
        self.pool = Pool(options.shared_memory, options.device) if options.shared_memory else None
        self.known: dict[str, Served] = {}
        self.cancels: bool | None = None

    def features(
        self,
        images: Images,
        outputs: Sequence[str] | str | None = None,
        *,
        model: str = FRONT_DOOR,
        encoded: bool = False,
        partial: bool = False,
        size: tuple[int, int] | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
        extra: Mapping[str, np.ndarray] | None = None,
    ) -> Steps[Answer]:
        """Outputs of a model for pictures; see FeatureClient.features. `extra`: further inputs, the
        same for all.
        """
        request_id = request_id or uuid.uuid4().hex
        seconds = self.options.timeout if timeout is None else timeout
        if seconds <= 0:
            raise BadRequest(f"timeout={timeout}: give seconds above 0")
        if encoded and model not in (FRONT_DOOR, ENCODED):
            raise BadRequest(
                f"encoded pictures are taken by '{FRONT_DOOR}' only, not by '{model}': leave "
                "encoded out"
            )
        model = ENCODED if encoded else model
        pictures = list_pictures(images)
        served = yield from self.describe(model, seconds, request_id)
        names = served.choose(outputs)
        if encoded and size is not None:
            raise BadRequest(
                "size= and encoded=True: the server decodes to its own size; leave one of them out"
            )
        seen = yield from self.size_of(served, pictures, size, seconds, request_id)
        most = (
            served.max_batch
            or (yield from self.describe(FRONT_DOOR, seconds, request_id)).max_batch
            or len(pictures)
        )
        parts = [pictures[start : start + most] for start in range(0, len(pictures), most)]
        ids = [
            request_id if len(parts) == 1 else f"{request_id}-{number}"
            for number in range(len(parts))
        ]
        answers = yield Together(
            [
                self.part(served, part, names, seen, encoded, partial, seconds, one, extra or {})
                for part, one in zip(parts, ids, strict=True)
            ]
        )
        return join(answers, seen, request_id)

    def describe(
        self, model: str, seconds: float, request_id: str = "", fresh: bool = False
    ) -> Steps[Served]:
        """A model's inputs, outputs, batch and parameters, asked for once unless `fresh`; raises
        NotServed.
        """
        if fresh or model not in self.known:
            deadline = time.monotonic() + seconds
            answer = yield from self.ask(
                "get_model_config", {"model_name": model}, deadline, request_id
            )
            self.known[model] = Served.read(answer.config)
        return self.known[model]

    def size_of(
        self,
        served: Served,
        pictures: Sequence[Picture],
        size: tuple[int, int] | None,
        seconds: float,
        request_id: str,
    ) -> Steps[tuple[int, int]]:
        """The (height, width) pictures are brought to: the model's own, where that is fixed.

        Where it varies: the size asked for, else that of the arrays if they have one in common that
        the model takes, else the model's usual one.
        """
        image = served.inputs.get("image")
        if image is not None:
            fixed = image.dims[-3:-1]
            if min(fixed) > 0:
                if size is not None and tuple(size) != fixed:
                    raise BadRequest(
                        f"size={tuple(size)}: '{served.name}' takes {fixed[0]}x{fixed[1]} only"
                    )
                return fixed
            if size is not None:
                return size
            own = common_size(pictures)
            if (yield from self.describe(FRONT_DOOR, seconds, request_id)).takes(own):
                return own
        for model in (served.name, FRONT_DOOR, DECODER):
            try:
                known = (yield from self.describe(model, seconds, request_id)).size()
            except NotServed:
                continue
            if known:
                return known
        raise BadRequest(
            f"'{served.name}' takes pictures of many sizes: say which with size=(height, width)"
        )

    def part(
        self,
        served: Served,
        pictures: Sequence[Picture],
        names: Sequence[str],
        size: tuple[int, int],
        encoded: bool,
        partial: bool,
        seconds: float,
        request_id: str,
        extra: Mapping[str, np.ndarray],
    ) -> Steps[Found]:
        """Decode and ask for as many pictures as one request may hold; arrays, and what is missing
        of them.
        """
        deadline = time.monotonic() + seconds
        yield from self.clean(everything=False)
        if encoded:
            tensors = {"encoded": (yield Work(bind(files_of, pictures, self.options.limits)))}
        else:
            tensors = {"image": (yield Work(bind(pixels_of, pictures, size, self.options.limits)))}
        tensors |= extra

        def ask(wanted: Sequence[str], until: float) -> Steps[dict[str, np.ndarray]]:
            return self.infer(
                served, tensors, wanted, until, len(pictures), request_id, hurry=partial
            )

        try:
            return (yield from ask_heads(ask, names, self.breakers, deadline, partial, request_id))
        except BadRequest as error:
            self.known.pop(
                served.name, None
            )  # if its sizes are others by now, the next call learns them
            if encoded:
                error.message = named(error.message, pictures)
            raise

    def ask(
        self,
        method: str,
        arguments: Mapping[str, Any],
        deadline: float,
        request_id: str,
        hurry: bool = False,
    ) -> Steps[Any]:
        """Call the server within the deadline and the budget for retries; see
        serve.client.retry.attempt.
        """
        return attempt(
            method, arguments, deadline, self.options.retry, self.budget, request_id, hurry
        )

    def ask_to_infer(
        self, arguments: Mapping[str, Any], deadline: float, request_id: str, hurry: bool
    ) -> Steps[Any]:
        """The same for inference, which a server that cannot bear it is not told to give up."""
        if self.cancels is None:
            answer = yield from self.ask("get_server_metadata", {}, deadline, request_id)
            match = re.match(r"(\d+)\.(\d+)", answer.version)
            self.cancels = match is None or (int(match[1]), int(match[2])) >= CANCELS
        return (
            yield from attempt(
                "infer",
                arguments,
                deadline,
                self.options.retry,
                self.budget,
                request_id,
                hurry,
                self.cancels,
            )
        )

    def infer(
        self,
        served: Served,
        tensors: Mapping[str, np.ndarray],
        names: Sequence[str],
        deadline: float,
        rows: int,
        request_id: str,
        hurry: bool,
    ) -> Steps[dict[str, np.ndarray]]:
        """One request's checked answer; through shared memory where that was asked for and sizes
        are known.
        """
        arguments = {"model_name": served.name, "request_id": request_id}
        places = (
            lay_out(tensors, [served.outputs[name] for name in names], rows) if self.pool else {}
        )
        if not places:
            inputs = [
                InferInput(name, list(tensor.shape), served.inputs[name].kind)
                for name, tensor in tensors.items()
            ]
            for port, tensor in zip(inputs, tensors.values(), strict=True):
                port.set_data_from_numpy(tensor)
            arguments |= {
                "inputs": inputs,
                "outputs": [InferRequestedOutput(name) for name in names],
            }
            result = yield from self.ask_to_infer(arguments, deadline, request_id, hurry)
            return (yield from self.check(served, names, rows, result, result.as_numpy, request_id))
        region = self.pool.lend(places)
        let_go = False
        try:
            ports = region.fill(tensors, places)
            arguments |= dict(zip(("inputs", "outputs"), ports, strict=True))
            result = yield from self.through(region, arguments, deadline, request_id, hurry)
            kinds = {
                port.name: (port.datatype, port.shape) for port in result.get_response().outputs
            }
            answer = yield from self.check(
                served,
                names,
                rows,
                result,
                lambda name: region.read(name, *kinds[name]),
                request_id,
            )
            let_go = True
            return answer
        except (BadRequest, NotServed, NotAllowed, ServerFailed):
            let_go = True
            raise
        finally:  # after a time-out or a lost connection the server may still be at it
            (self.pool.back if let_go else self.pool.retire)(region)

    def through(
        self,
        region: Region,
        arguments: dict[str, Any],
        deadline: float,
        request_id: str,
        hurry: bool,
    ) -> Steps[Any]:
        """Ask with tensors in a region; a server that was started anew since it was registered is
        told of it again.
        """
        for last in (False, True):
            if not region.registered:
                call = region.registration()
                headers = self.headers()
                yield from self.ask(
                    call.method, call.arguments | {"headers": headers}, deadline, request_id
                )
                region.registered = True
            try:
                return (yield from self.ask_to_infer(arguments, deadline, request_id, hurry))
            except NotServed as error:
                if last or "shared memory region" not in error.message:
                    raise
                region.registered = False

    def check(
        self,
        served: Served,
        names: Sequence[str],
        rows: int,
        result: Any,
        read: Any,
        request_id: str,
    ) -> Steps[dict[str, np.ndarray]]:
        """The arrays of an answer that is what was asked for; raises WrongAnswer."""
        response = result.get_response()
        if response.id != request_id:
            raise WrongAnswer(
                f"an answer to another request came back ('{response.id}')", request_id
            )
        given = [port.name for port in response.outputs]
        try:
            return read_answer(served, names, rows, read, given, request_id)
        except WrongAnswer:
            # perhaps right for a version that was loaded since the model was described
            self.known.pop(served.name, None)
            fresh = yield from self.describe(served.name, self.options.timeout, request_id)
            if fresh == served:
                raise
            return read_answer(fresh, names, rows, read, given, request_id)

    def headers(self) -> dict[str, str] | None:
        """What restricted endpoints want to see."""
        return (
            {self.options.admin_header: self.options.admin_key} if self.options.admin_key else None
        )

    def clean(self, everything: bool) -> Steps[None]:
        """Give back shared memory: what was retired long ago, or all of it."""
        for region in self.pool.leave(everything) if self.pool else ():
            if region.registered:
                call = region.removal()
                arguments = call.arguments | {"headers": self.headers(), "client_timeout": 2.0}
                # a server that is gone has forgotten it by itself
                with contextlib.suppress(InferenceServerException):
                    yield Rpc(call.method, arguments)
            region.destroy()


def pixels_of(pictures: Sequence[Picture], size: tuple[int, int], limits: Limits) -> np.ndarray:
    """uint8 [B, H, W, 3] of a size; raises BadRequest for what cannot be decoded."""
    return np.stack([picture.pixels(*size, limits) for picture in pictures])


def files_of(pictures: Sequence[Picture], limits: Limits) -> np.ndarray:
    """Encoded files as an object array [B, 1] of bytes."""
    array = np.empty((len(pictures), 1), np.object_)
    array[:, 0] = [picture.read(limits) for picture in pictures]
    return array


def named(message: str, pictures: Sequence[Picture]) -> str:
    """The server's message about `picture 2` of a request in the caller's name for it."""
    match = re.search(r"picture (\d+): ", message)
    if match is None:
        return f"{pictures[0].name}: {message}" if len(pictures) == 1 else message
    number = int(match[1])
    return (
        message.replace(match[0], f"{pictures[number].name}: ")
        if number < len(pictures)
        else message
    )

"""The client's logic in steps without sockets: describe, split, request, check, drop a failing
head, join.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from contract.views import SQUASH, ViewPolicy
from serve.client.answers import Answer, join
from serve.client.breaker import Breakers
from serve.client.connection import AFTERWARDS
from serve.client.heads import Found, ask_heads
from serve.client.inputs import (
    Images,
    Picture,
    blame_picture,
    common_size,
    list_pictures,
    to_tensor,
)
from serve.client.options import ClientOptions, RequestOptions
from serve.client.retry import Budget, attempt, may_cancel
from serve.client.served import DECODER, FRONT_DOOR, Outputs, Served, read_answer
from serve.client.shared_memory import COOLING, Pool, Region, lay_out
from serve.client.steps import Rpc, Steps, Together, Work
from serve.errors import BadRequest, NotAllowed, NotServed, Unavailable, WrongAnswer

_VIEW_LASTS = 60.0
"""Seconds after which a client asks again how the bundle sees pictures."""


class Calls:
    """The state that a client's calls share: known models, budget, breakers, shared memory."""

    def __init__(self, options: ClientOptions) -> None:
        self.options = options
        self.budget, self.breakers = Budget(*options.budget), Breakers(*options.breaker)
        self.pool = Pool(options.shared_memory, options.device) if options.shared_memory else None
        self.known: dict[str, Served] = {}
        self.cancels: bool | None = None
        self.looked = -_VIEW_LASTS
        """When the front door was described last."""

    def features(
        self,
        images: Images,
        outputs: Outputs,
        options: RequestOptions,
        extra: Mapping[str, np.ndarray] | None = None,
    ) -> Steps[Answer]:
        """Outputs of a model for pictures; see FeatureClient.features. `extra`: further inputs, the
        same for all.
        """
        options = options.complete(self.options)
        pictures = list_pictures(images, self.options.limits)
        about = options.timeout, options.request_id
        served = yield from self.describe(options.model, *about)
        names = served.choose(outputs)
        size = yield from self.size_of(served, pictures, options)
        view = SQUASH
        if options.encoded or any(picture.size != size for picture in pictures):
            view = yield from self.view_of(options)
        if view.kind == "tiles" and any(picture.size != size for picture in pictures):
            raise BadRequest(
                f"view {view}: tiles are for maps, a picture's tiles have no one vector and no one "
                "grid of patches: choose view='letterbox' or 'centre-crop:0.875'"
            )
        most = (
            served.max_batch
            or (yield from self.describe(FRONT_DOOR, *about)).max_batch
            or len(pictures)
        )
        parts = [pictures[start : start + most] for start in range(0, len(pictures), most)]
        ids = [options.request_id]
        if len(parts) > 1:
            ids = [f"{options.request_id}-{number}" for number in range(len(parts))]
        answers = yield Together(
            [
                self.part(
                    served, part, names, size, view, replace(options, request_id=one), extra or {}
                )
                for part, one in zip(parts, ids, strict=True)
            ]
        )
        return join(answers, size, options.request_id, view)

    def view_of(self, options: RequestOptions) -> Steps[ViewPolicy]:
        """The requested view policy, or the bundle's. Servers that name none, and those of other
        makes, squash.
        """
        asked = None if options.view is None else ViewPolicy.parse(options.view)
        if asked is not None and (asked.kind != "letterbox" or asked.fill):
            return asked
        # a rollout may have put another bundle there, of which pixels of one size say nothing
        fresh = time.monotonic() - self.looked > _VIEW_LASTS
        try:
            served = yield from self.describe(
                FRONT_DOOR, options.timeout, options.request_id or "", fresh
            )
        except NotServed:
            return asked or SQUASH
        about = served.facts("about")
        if asked is not None:  # on the ground that the network subtracts
            mean = about.get("mean") if isinstance(about, dict) else None
            return asked.on(mean) if mean else asked
        text = about.get("view", "") if isinstance(about, dict) else ""
        try:
            return ViewPolicy.parse(text) if text else SQUASH
        except ValueError as error:
            raise BadRequest(
                f"the server's {error}: choose one with view=, or a client of its version"
            ) from error

    def describe(
        self,
        model: str,
        timeout: float | None = None,
        request_id: str = "",
        fresh: bool = False,
    ) -> Steps[Served]:
        """A model's inputs, outputs, batch and parameters, cached unless `fresh`; raises
        NotServed.
        """
        served = self.known.get(model)  # which other threads may forget meanwhile
        if fresh or served is None:
            deadline = time.monotonic() + (timeout or self.options.timeout)
            answer = yield from self.ask(
                "get_model_config", {"model_name": model}, deadline, request_id
            )
            served = self.known[model] = Served.read(answer.config)
            if model == FRONT_DOOR:
                self.looked = time.monotonic()
        return served

    def size_of(
        self, served: Served, pictures: Sequence[Picture], options: RequestOptions
    ) -> Steps[tuple[int, int]]:
        """The (height, width) pictures are brought to: the model's own, where that is fixed.

        Where it varies: the requested size, else that of the arrays if they have one in common that
        the model takes, else the model's usual one.
        """
        image, size = served.inputs.get("image"), options.size
        about = options.timeout, options.request_id
        if image is not None:
            fixed = image.dims[-3:-1]
            if min(fixed) > 0:
                if size is not None and tuple(size) != fixed:
                    raise BadRequest(
                        f"size={tuple(size)}: '{served.name}' takes {fixed[0]}x{fixed[1]} only"
                    )
                return fixed
            if size is not None:
                most = self.options.limits.max_pixels
                if size[0] * size[1] > most:  # before pictures of that size are made
                    raise BadRequest(f"size={size}: at most {most:,} pixels are taken")
                return size
            own = common_size(pictures)
            if (yield from self.describe(FRONT_DOOR, *about)).takes(own):
                return own
        for model in (served.name, FRONT_DOOR, DECODER):
            try:
                known = (yield from self.describe(model, *about)).size()
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
        view: ViewPolicy,
        options: RequestOptions,
        extra: Mapping[str, np.ndarray],
    ) -> Steps[Found]:
        """Decode and request as many pictures as one request may hold; arrays, and what is missing
        of them.
        """
        deadline, request_id = time.monotonic() + options.timeout, options.request_id
        yield from self.clean(everything=False)
        limits, encoded = self.options.limits, options.encoded
        tensors = (yield Work(lambda: to_tensor(pictures, size, view, encoded, limits))) | extra

        def ask(names: Sequence[str], until: float) -> Steps[dict[str, np.ndarray]]:
            rows, hurry = len(pictures), options.partial
            return self.infer(served, tensors, names, until, rows, request_id, hurry)

        try:
            return (
                yield from ask_heads(
                    ask, names, self.breakers, deadline, options.partial, request_id
                )
            )
        except BadRequest as error:
            # if the model's sizes are others by now, the next call learns them
            self.known.pop(served.name, None)
            if encoded:
                raise blame_picture(error, pictures) from error
            raise

    def ask(
        self,
        method: str,
        arguments: Mapping[str, Any],
        deadline: float,
        request_id: str,
        **how: Any,
    ) -> Steps[Any]:
        """Call the server within the deadline and the budget for retries; `how` are further
        arguments of serve.client.retry.attempt.
        """
        retry, budget = self.options.retry, self.budget
        return attempt(method, arguments, deadline, retry, budget, request_id, **how)

    def ask_to_infer(
        self, arguments: Mapping[str, Any], deadline: float, request_id: str, **how: Any
    ) -> Steps[Any]:
        """The same for inference, which servers that crash on it are not asked to cancel."""
        if self.cancels is None:
            answer = yield from self.ask("get_server_metadata", {}, deadline, request_id)
            self.cancels = may_cancel(answer.version)
        how |= {"cancels": self.cancels}
        return (yield from self.ask("infer", arguments, deadline, request_id, **how))

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
        """One request's checked answer; through shared memory where enabled and sizes
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
            result = yield from self.ask_to_infer(arguments, deadline, request_id, hurry=hurry)
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
        except (BadRequest, NotServed, NotAllowed, Unavailable):
            let_go = True
            raise
        finally:  # after a time-out or a lost connection the server may still be at it
            (self.pool.back if let_go and not region.doubtful else self.pool.retire)(region)

    def through(
        self,
        region: Region,
        arguments: dict[str, Any],
        deadline: float,
        request_id: str,
        hurry: bool,
    ) -> Steps[Any]:
        """Ask with tensors in a region; a server that was restarted since it was registered is
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
                return (
                    yield from self.ask_to_infer(
                        *(arguments, deadline, request_id), hurry=hurry, unsure=region.doubt
                    )
                )
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
        """The arrays of an answer that matches the request; raises WrongAnswer."""
        response = result.get_response()
        if response.id != request_id:
            raise WrongAnswer(
                f"an answer to another request came back ('{response.id}')", request_id
            )
        returned = [port.name for port in response.outputs]
        try:
            return read_answer(served, names, rows, read, returned, request_id)
        except WrongAnswer:
            # perhaps right for a version that was loaded since the model was described
            self.known.pop(served.name, None)
            fresh = yield from self.describe(served.name, request_id=request_id)
            if fresh == served:
                raise
            return read_answer(fresh, names, rows, read, returned, request_id)

    def headers(self) -> dict[str, str] | None:
        return (
            {self.options.admin_header: self.options.admin_key} if self.options.admin_key else None
        )

    def clean(self, everything: bool) -> Steps[None]:
        """Give back shared memory: what was retired long ago, or all of it."""
        cooling = COOLING if self.cancels else AFTERWARDS
        for region in self.pool.leave(everything, cooling) if self.pool else ():
            if region.registered:
                call = region.removal()
                arguments = call.arguments | {"headers": self.headers(), "client_timeout": 2.0}
                # a server that is gone has forgotten it by itself
                with contextlib.suppress(InferenceServerException):
                    yield Rpc(call.method, arguments)
            region.destroy()

"""The model that Triton's Python backend runs: a pool of all variants of a bundle.

``model.py`` of a repository that ``tocom-export triton --backend python`` writes imports it.
``triton_python_backend_utils`` is there only within Triton.
"""

from __future__ import annotations

import builtins
import json
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tocom_export.errors import InputError, TocomError, brief

from ..engine import Images, check_images
from .grouping import Answer, run_grouped
from .loaded import Serving
from .pool import EnginePool
from .steered import Steered
from .triton_requests import Settings, Wish

IMAGES = "images"
BUNDLE = "bundle"
"""The folder beside ``model.py``."""


class TritonPythonModel:
    """What Triton calls, from one thread: once each model is loaded, for requests, at its end.

    Requests of a call that run on the same variant run as one batch. Those that name none run on
    the one that is steered to where the configuration has ``slo_ms``, else on the one that serves.
    Requests that change the pool are carried out one by one in a thread of their own; others are
    answered meanwhile.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Open the pool; Triton doesn't load the model where that fails, and says why."""
        import triton_python_backend_utils as utils

        self._utils = utils
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        try:
            _check_numpy()
            self._settings = Settings.read(config)
            self._pool = EnginePool(path, **self._settings.options)
            self._steered = self._steer()
        except TocomError as error:
            raise utils.TritonModelException(str(error)) from None
        self._changes = ThreadPoolExecutor(1, "changes")
        self._model = args["model_name"]
        self._family = utils.MetricFamily(
            name="tocom_images_total",
            description="Images answered, by variant",
            kind=utils.MetricFamily.COUNTER,
        )
        self._counts: dict[str, Any] = {}

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response to each request; None for those that are answered once a change is made."""
        responses: list[Any] = [None] * len(requests)
        plain: dict[int, tuple[Images, Wish]] = {}
        for index, request in enumerate(requests):
            try:
                wish = Wish.read(request.parameters(), self._settings)
                images = self._utils.get_input_tensor_by_name(request, IMAGES).as_numpy()
                check_images(images, self._pool.spec)
            except Exception as error:
                responses[index] = self._refuse(error)
                continue
            if wish.change is None:
                plain[index] = images, wish
            else:  # its memory is Triton's again when this returns
                names, sender = request.requested_output_names(), request.get_response_sender()
                self._changes.submit(self._change, wish, images.copy(), names, sender)
        try:
            answers = self._answer(list(plain.values())) if plain else []
        except Exception as error:
            answers = [error] * len(plain)
        for index, answer in zip(plain, answers, strict=True):
            responses[index] = self._respond(answer, requests[index].requested_output_names())
        return responses

    def finalize(self) -> None:
        """Let the engines go, once the changes that are under way are made."""
        self._changes.shutdown()
        self._pool.close()
        self._counts.clear()  # before their family

    def _steer(self) -> Steered | None:
        settings = self._settings
        if settings.slo is None:
            return None
        return Steered(self._pool, settings.slo, settings.capacity, settings.delay)

    def _answer(self, asked: Sequence[tuple[Images, Wish]]) -> list[Any]:
        """An :class:`Answer` or an error for the images and the wish of each request."""
        if (steered := self._steered) is not None:
            steered.begin(sum(len(images) for images, _ in asked))
        found = self._find_servings(asked, steered)
        ready = [i for i, serving in enumerate(found) if isinstance(serving, Serving)]

        def observe(serving: Serving, images: int, seconds: float) -> None:
            name = serving.variant.name
            self._count(name, images)
            if steered is not None and steered.knows(name):
                steered.observe(name, images, seconds)

        answers = run_grouped([asked[i][0] for i in ready], [found[i] for i in ready], observe)
        if steered is not None:
            steered.end()
        return [dict(zip(ready, answers, strict=True)).get(i, found[i]) for i in range(len(asked))]

    def _find_servings(
        self, asked: Sequence[tuple[Images, Wish]], steered: Steered | None
    ) -> list[Any]:
        """What each request runs on, or what is wrong with what it asks for."""
        found: list[Any] = []
        default = None
        for _, wish in asked:
            try:
                if wish.variant is not None:
                    found.append(self._pool.open(wish.variant))
                    continue
                default = default or self._choose(steered)
                found.append(default)
            except TocomError as error:
                found.append(error)
        return found

    def _choose(self, steered: Steered | None) -> Serving:
        """What requests that name no variant run on."""
        if steered is not None:
            name = steered.choose()
            if name in self._pool.variants:  # a reload may just have taken it away
                return self._pool.open(name)
        return self._pool.serving

    def _change(self, wish: Wish, images: Images, names: Sequence[str], sender: Any) -> None:
        """Carry out a change, then answer the request that asked for it."""
        try:
            wish.carry_out(self._pool)
            if wish.change == "reload":
                self._steered = self._steer()
            serving = self._pool.serving if wish.variant is None else self._pool.open(wish.variant)
            response = self._respond(Answer(serving.run_all(images), serving), names)
        except Exception as error:
            response = self._refuse(error)
        sender.send(response, flags=self._utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _respond(self, answer: Any, names: Sequence[str]) -> Any:
        """An answer, of which the outputs asked for, or an error as Triton takes it."""
        if not isinstance(answer, Answer):
            return self._refuse(answer)
        variant = answer.serving.variant
        count = len(next(iter(answer.outputs.values())))
        outputs = {
            **answer.outputs,
            "variant": np.full((count, 1), variant.name.encode(), object),
            "source": np.full((count, 1), variant.source, np.int32),
            "scale": np.full((count, 1), variant.scale, np.float32),
        }
        tensors = [self._utils.Tensor(n, value) for n, value in outputs.items() if n in names]
        return self._utils.InferenceResponse(output_tensors=tensors)

    def _refuse(self, error: BaseException) -> Any:
        codes = self._utils.TritonError
        if isinstance(error, TocomError):
            code = codes.INVALID_ARG if isinstance(error, InputError) else codes.INTERNAL
            message = str(error)
        else:  # a fault of ours, whose trace is for the server's log alone
            code, message = codes.INTERNAL, f"{type(error).__name__}: {brief(error)}"
            self._utils.Logger.log_error("".join(traceback.format_exception(error)))
        return self._utils.InferenceResponse(error=codes(message, code))

    def _count(self, variant: str, images: int) -> None:
        if (count := self._counts.get(variant)) is None:
            count = self._family.Metric(labels={"model": self._model, "variant": variant})
            self._counts[variant] = count
        count.increment(images)


def _check_numpy() -> None:
    """Raise InputError where Triton's Python backend would misread arrays of this NumPy.

    Built with pybind11 before 2.12, it takes arrays of NumPy 2 to be empty, and all requests fail.
    Only these versions note themselves among the builtins, with a 4 in Python 3.11 and before.
    """
    old = any(name.startswith("__pybind11_internals_v4") for name in vars(builtins))
    if old and int(np.__version__.split(".")[0]) >= 2:
        raise InputError(
            f"this Triton's Python backend can't read arrays of NumPy {np.__version__}; pip "
            "install 'numpy<2' in the environment that it uses."
        )

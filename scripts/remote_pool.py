"""A pool that serves under Triton, asked as one in this process is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy.typing as npt
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tocom_export.compression.bank import ToComBank
from tocom_export.errors import ImageError, InputError

Array = npt.NDArray[Any]


class RemoteServing:
    """One request to the pool; ``variant`` is the one that answered."""

    def __init__(self, pool: RemotePool, **parameters: Any) -> None:
        self._pool, self._parameters = pool, parameters
        self._variant: Any = None

    def run(self, images: Array) -> Array:
        """Logits of normalised images; ImageError or InputError where Triton refuses them."""
        found = self._pool.infer(images, **self._parameters)
        (name,), (source,), (scale,) = (found[key][0] for key in ("variant", "source", "scale"))
        self._variant = SimpleNamespace(
            name=name.decode(), source=int(source), scale=round(float(scale), 5)
        )
        return found["logits"]

    @property
    def variant(self) -> Any:
        """Name, source and scale of what answered; asks, if nothing was asked yet."""
        if self._variant is None:
            self.run(self._pool.probe)
        return self._variant


class RemotePool:
    """The part of EnginePool's interface that a soak uses.

    Args:
        url: of Triton's gRPC.
        probe: images for the requests that are not about images.
        folder: for what it hands over as a file.
    """

    def __init__(
        self, url: str, model: str, variants: Sequence[str], probe: Array, folder: Path
    ) -> None:
        self.client = triton.InferenceServerClient(url)
        self.model, self.variants, self.probe = model, tuple(variants), probe
        self._folder = folder

    def infer(self, images: Array, **parameters: Any) -> dict[str, Array]:
        """All outputs for some images."""
        given = triton.InferInput("images", list(images.shape), "FP32")
        given.set_data_from_numpy(images)
        try:
            found = self.client.infer(self.model, [given], parameters=parameters or None)
        except InferenceServerException as error:
            refused = str(error.status()) == "StatusCode.INVALID_ARGUMENT"
            message = str(error.message())
            if refused and message.startswith("image"):
                raise ImageError(message) from None
            if refused:
                raise InputError(message) from None
            raise
        names = [output.name for output in found.get_response().outputs]
        return {name: found.as_numpy(name) for name in names}

    @property
    def serving(self) -> RemoteServing:
        """What a request that begins now runs on."""
        return RemoteServing(self)

    def switch(self, variant: str | int) -> RemoteServing:
        """Serve another variant from now on."""
        serving = RemoteServing(self, control="switch", variant=variant)
        serving.run(self.probe)
        return serving

    def refit(self, *, bank: ToComBank | None = None, **options: Any) -> None:
        """Exchange the weights; a bank is written to a file first."""
        if bank is not None:
            file = self._folder / "handed-over-bank.safetensors"
            if not file.exists():
                bank.save(file)
            options["bank"] = str(file)
        given = {
            n: str(v) if isinstance(v, Path) else v for n, v in options.items() if v is not None
        }
        self.infer(self.probe, control="refit", **given)

    def reload(self) -> None:
        """Open the bundle's files again."""
        self.infer(self.probe, control="reload")

    def close(self) -> None:
        """Let go of the connection."""
        self.client.close()

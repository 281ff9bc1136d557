"""What the model of a pool under Triton is told: by its configuration, and by each request."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tocom_export.errors import InputError

from .pool import EnginePool

_REFIT: dict[str, Callable[[Any], Any]] = {
    "checkpoint": str, "weights_key": str, "bank": str, "source": int, "scale": float,
}  # fmt: skip
"""Parameters of a refit, as :meth:`EnginePool.refit` takes them."""


@dataclass(frozen=True)
class Settings:
    """How a pool is to be opened and served: the ``parameters`` of ``config.pbtxt``, and more."""

    runtime: Any = "auto"
    """The pool's backend; ``backend`` is Triton's."""
    device: str | None = None
    threads: int | None = None
    slo: float | None = None
    """Latency wanted, seconds; None doesn't steer."""
    control: bool = False
    """Whether requests may change the pool."""
    capacity: int = 1
    """Images in a call at the most."""
    delay: float = 0.0
    """Seconds that Triton lets a call wait for others."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Settings:
        """The settings in a model's configuration, as Triton passes it on.

        Raises:
            InputError: a parameter is not what it should be.
        """
        given = {name: v["string_value"] for name, v in config.get("parameters", {}).items()}
        if (control := given.get("control", "off")) not in ("on", "off"):
            raise InputError(f"`control` {control!r}: it is on or off.")
        slo = convert(given, "slo_ms", float)
        if slo is not None and not 0 < slo < math.inf:
            raise InputError(f"`slo_ms` {slo:g}: a positive number of milliseconds is expected.")
        batching = config.get("dynamic_batching", {})
        return cls(
            runtime=given.get("runtime", "auto"),
            device=given.get("device"),
            threads=convert(given, "threads", int),
            slo=None if slo is None else slo / 1000,
            control=control == "on",
            capacity=max(1, int(config["max_batch_size"])),
            delay=int(batching.get("max_queue_delay_microseconds", 0)) / 1e6,
        )

    @property
    def options(self) -> dict[str, Any]:
        """As :class:`EnginePool` takes them."""
        options = {"backend": self.runtime, "device": self.device, "threads": self.threads}
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class Wish:
    """What a request asks for beside its images."""

    variant: str | int | None = None
    """By name or bare degree; None leaves it to the model."""
    change: str | None = None
    """Of the pool, before it is answered: switch, reload or refit."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of a refit."""

    @classmethod
    def read(cls, text: str, settings: Settings) -> Wish:
        """What the parameters of a request say, which Triton gives as JSON; others are let be.

        Raises:
            InputError: one is not what it should be, or the model takes no changes.
        """
        given = json.loads(text or "{}")
        variant = read_variant(given)
        if (change := given.get("control")) is None:
            return cls(variant)
        if not settings.control:
            raise InputError(
                "`control`: this model takes no changes by request; write its repository with "
                "tocom-export triton --control, or set the parameter in its config.pbtxt to on."
            )
        if change not in ("switch", "reload", "refit"):
            raise InputError(f"`control` {change!r}: it is switch, reload or refit.")
        if change == "switch" and variant is None:
            raise InputError("`control` switch: `variant` or `degree` must say to which.")
        if change == "switch" and settings.slo is not None:
            raise InputError(
                "`control` switch: what serves is steered by `slo_ms`; take that out of the "
                "model's config.pbtxt, or ask for a `variant` with each request."
            )
        names = _REFIT if change == "refit" else {}
        options = {name: convert(given, name, to) for name, to in names.items() if name in given}
        return cls(variant, change, options)

    def carry_out(self, pool: EnginePool) -> None:
        """Change the pool; raises what the pool does, which then goes on as it was."""
        if self.change == "refit":
            pool.refit(**self.options)
        elif self.change == "reload":
            pool.reload()
        elif self.variant is not None:
            pool.switch(self.variant)


def read_variant(given: Mapping[str, Any]) -> str | int | None:
    """The variant that a request's parameters ask for, by name or bare degree; None: by none.

    Raises:
        InputError: it can't be either.
    """
    variant = given.get("variant")
    if "degree" in given:
        if variant is not None:
            raise InputError("`variant` and `degree` say the same; give one of them.")
        variant = convert(given, "degree", int)
    if not isinstance(variant, (str, int, type(None))) or isinstance(variant, bool):
        raise InputError(f"`variant` {repr(variant)[:64]}: a name or a degree is expected.")
    return variant


def convert(given: Mapping[str, Any], name: str, to: Callable[[Any], Any]) -> Any:
    """A parameter as a text, a whole number or a number; None where it isn't given.

    Raises:
        InputError: it is something else.
    """
    value = given.get(name)
    if value is None:
        return None
    try:
        if isinstance(value, bool) or (to is int and isinstance(value, float)):
            raise ValueError
        return to(value)
    except ValueError:
        what = "a text" if to is str else "a whole number" if to is int else "a number"
        raise InputError(f"`{name}` {value!r}: {what} is expected.") from None

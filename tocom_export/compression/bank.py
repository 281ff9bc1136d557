"""The ToCom bank: one low-rank step per pair of adjacent degrees (paper, section 4)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..errors import BankError, CheckpointError, DegreeError, InputError, brief
from ..io.atomic import replace_file
from ..io.pickles import load_pickle
from ..io.tensors import read_header
from ..model.spec import VitSpec
from .bank_groups import Arithmetic, coefficients, groups_of
from .metadata import from_metadata, to_metadata
from .method import Method
from .schedule import MAX_DEGREE

Array = npt.NDArray[Any]
FACTORS = ("q.down", "q.up", "v.down", "v.up")


@dataclass(frozen=True)
class BankInfo:
    """What a bank's file says of itself, in its metadata."""

    method: Method
    model: str = ""
    arithmetic: Arithmetic = "steps"


@dataclass(frozen=True, eq=False)
class ToComBank:
    """Low-rank factors of the query and value steps of all layers.

    Group ``g`` of a layer is the step from degree ``g`` to ``g + 1``; ``G`` of them, 16 in
    the paper. ``L`` layers, rank ``h``, width ``C``. Banks of the paper's ablations group
    otherwise; see :data:`~tocom_export.compression.bank_groups.Arithmetic`.
    """

    q_down: Array
    """(L, G, h, C), floating point; likewise ``v_down``."""
    q_up: Array
    """(L, G, C, h); likewise ``v_up``."""
    v_down: Array
    v_up: Array
    method: Method
    """The method that the bank was trained with."""
    model: str = ""
    """The model that it was trained on."""
    arithmetic: Arithmetic = "steps"

    def __post_init__(self) -> None:
        if self.q_down.ndim != 4:
            raise BankError(f"bank: q.down has shape {self.q_down.shape}, not (L, G, h, C).")
        layers, groups, rank, width = self.q_down.shape
        down, up = (layers, groups, rank, width), (layers, groups, width, rank)
        for name, factor in self.factors().items():
            expected = down if name.endswith("down") else up
            if factor.shape != expected:
                raise BankError(f"bank: {name} has shape {factor.shape}, expected {expected}.")
            if factor.dtype.kind != "f":
                raise BankError(f"bank: {name} is of type {factor.dtype}, not floating point.")
            if not np.isfinite(factor).all():
                raise BankError(f"bank: {name} holds NaN or infinite values.")

    @property
    def depth(self) -> int:
        """Number of layers, ``L``."""
        return int(self.q_down.shape[0])

    @property
    def groups(self) -> int:
        """Number of groups, ``G``."""
        return int(self.q_down.shape[1])

    @property
    def max_degree(self) -> int:
        """Degrees run over 0..max_degree."""
        return self.groups if self.arithmetic == "steps" else MAX_DEGREE

    @property
    def rank(self) -> int:
        """Rank of one step, ``h``."""
        return int(self.q_down.shape[2])

    @property
    def width(self) -> int:
        """Channels, ``C``."""
        return int(self.q_down.shape[3])

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        return sum(f.size for f in self.factors().values())

    @cached_property
    def sha256(self) -> str:
        """Of its values, whatever file they are in and whatever type they were stored in."""
        digest = hashlib.sha256()
        for name, factor in self.factors().items():
            digest.update(f"{name} {factor.shape} {self.arithmetic} ".encode())
            digest.update(np.ascontiguousarray(factor, np.float32).tobytes())
        return digest.hexdigest()

    def factors(self) -> dict[str, Array]:
        """The four arrays under the names they have in a file."""
        return dict(zip(FACTORS, (self.q_down, self.q_up, self.v_down, self.v_up), strict=True))

    def gap(
        self, layer: int, source: int, target: float, scale: float
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """What a layer's query and value weights gain between two degrees, each (C, C) float64.

        ``+s Σ B_g A_g`` over the steps from source up to target, ``-s Σ`` of the same steps
        on the way down (paper, eq. 5 and 6); interpolated between whole degrees.

        Raises:
            DegreeError: a degree outside 0..max_degree.
        """
        for degree in (source, target):
            if not 0 <= degree <= self.max_degree:
                raise DegreeError(f"degree {degree} is outside the bank's 0..{self.max_degree}.")
        shares = coefficients(self.arithmetic, source, target, self.groups)
        (used,) = np.nonzero(shares)

        def total(down: Array, up: Array) -> npt.NDArray[np.float64]:
            a = down[layer, used].astype(np.float64).reshape(-1, self.width)  # (n·h, C)
            b = up[layer, used] * shares[used, None, None]  # (n, C, h)
            b = b.transpose(1, 0, 2).reshape(self.width, -1)  # (C, n·h)
            return np.asarray(scale * (b @ a))

        return total(self.q_down, self.q_up), total(self.v_down, self.v_up)

    def check(self, spec: VitSpec, method: Method, origin: str = "bank") -> None:
        """Raise BankError where the bank doesn't fit a model, saying both sides.

        Args:
            origin: what to call the bank in the message; its file, for one.
        """
        sides = (
            ("width", self.width, spec.width),
            ("depth", self.depth, spec.depth),
            ("groups", self.groups, groups_of(self.arithmetic)),
            ("method", self.method, method),
        )
        for what, ours, theirs in sides:
            if ours != theirs:
                raise BankError(
                    f"{origin}: the bank has {what} {ours}, but {spec.model} is to have {theirs}; "
                    "use a bank trained for this model and method, or `bank` none."
                )

    def save(self, file: Path | str) -> None:
        """Write the bank as safetensors, atomically."""
        # safetensors writes an array's memory as it lies, whatever its strides.
        factors = {name: np.ascontiguousarray(f) for name, f in self.factors().items()}
        with replace_file(Path(file)) as beside:
            info = BankInfo(self.method, self.model, self.arithmetic)
            save_file(factors, beside, to_metadata(info))

    @classmethod
    def load(cls, file: Path | str) -> ToComBank:
        """Read a bank: ours (.safetensors), or the authors' layout (.pth, needs torch).

        Raises:
            BankError: the file is not a bank.
            MissingPackageError: a .pth file, and torch is not installed.
        """
        file = Path(file)
        try:
            if file.suffix == ".safetensors":
                return cls._from_safetensors(file)
            return _from_authors(file, load_pickle(file, averaged=False).tensors)
        except CheckpointError as error:
            raise BankError(str(error)) from None
        except BankError as error:
            message = str(error)
            if message.startswith("bank: "):
                message = f"{file}: {message.removeprefix('bank: ')}"
            raise BankError(message) from None

    @classmethod
    def _from_safetensors(cls, file: Path) -> ToComBank:
        stored, metadata = read_header(file)
        if sorted(stored) != sorted(FACTORS) or any(len(t.shape) != 4 for t in stored.values()):
            raise BankError(f"{file} is not a ToCom bank: it should hold {', '.join(FACTORS)}.")
        try:
            info = from_metadata(BankInfo, metadata)
            arrays = load_file(file)
        except SafetensorError as error:
            raise BankError(f"{file}: can't be read ({brief(error)}).") from None
        except InputError as error:
            raise BankError(f"{file} is not a ToCom bank: {error}") from None
        q_down, q_up, v_down, v_up = (arrays[name] for name in FACTORS)
        return cls(q_down, q_up, v_down, v_up, info.method, info.model, info.arithmetic)


def holds_bank(names: Iterable[str]) -> bool:
    """Whether a weights file with those tensors is a bank, in our layout or the authors'."""
    listed = sorted(names)
    return listed == sorted(FACTORS) or any("_tocom." in name for name in listed)


def _from_authors(file: Path, state: Mapping[str, Array]) -> ToComBank:
    """The layout of the paper's published program.

    Per block ``blocks.{l}.attn.{q,v}_tocom.adapter_{down,up}.weight`` with all groups side by
    side on one axis of ``G·h`` channels, the last group first: degree r switches on the last
    ``r·h`` channels.
    """

    def stack(projection: str, factor: str) -> Array:
        layers: list[Array] = []
        while (key := f"blocks.{len(layers)}.attn.{projection}_tocom.{factor}.weight") in state:
            layers.append(state[key])
        if not layers or len({a.shape for a in layers}) != 1 or layers[0].ndim != 2:
            raise BankError(f"{file} is not a ToCom bank: no usable {projection}_tocom.{factor}.")
        return np.stack(layers)

    def unpack(projection: str) -> tuple[Array, Array]:
        down, up = stack(projection, "adapter_down"), stack(projection, "adapter_up")
        depth, channels, width = down.shape
        if channels % MAX_DEGREE or up.shape != (depth, width, channels):
            raise BankError(
                f"{file}: {projection}_tocom has factors {down.shape[1:]} and {up.shape[1:]}, "
                f"which are no {MAX_DEGREE} groups of one rank."
            )
        rank = channels // MAX_DEGREE
        down = down.reshape(depth, MAX_DEGREE, rank, width)[:, ::-1]
        up = up.reshape(depth, width, MAX_DEGREE, rank)[:, :, ::-1].transpose(0, 2, 1, 3)
        return np.ascontiguousarray(down), np.ascontiguousarray(up)

    return ToComBank(*unpack("q"), *unpack("v"), Method("tome"))

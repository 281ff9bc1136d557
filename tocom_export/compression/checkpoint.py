"""A model's weights: opened, checked against a spec, read tensor by tensor."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, InputError
from ..io.pickles import AVERAGED, SUFFIXES, StateDict, clean_names, load_pickle
from ..io.tensors import NUMPY_TYPES, is_finite, map_tensors, read_header
from ..model.catalogue import is_known, known_model
from ..model.huggingface.files import (
    CONFIG,
    PICKLED,
    WEIGHTS,
    find_pickled,
    read_record,
    read_weights,
)
from ..model.huggingface.folder import open_folder
from ..model.huggingface.names import is_huggingface, list_needed, strip_names, to_timm
from ..model.spec import VitSpec
from ..model.timm_folder import TimmModel, is_timm, is_timm_folder, open_timm_folder
from .bank import holds_bank
from .metadata import ModelInfo, from_metadata
from .method import Method

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. A safetensors file is mapped, not read."""

    file: Path
    tensors: Mapping[str, Array]
    """PyTorch name → array of float32, float16, bfloat16 or (.pth) float64; int8 in a bundle's."""
    info: ModelInfo
    note: str = ""
    """What a person should know of which weights these are; empty where there is no choice."""
    config: Path | None = None
    """Of a folder, or a file in one, what ``info`` is from."""
    timm: TimmModel | None = None
    """What a folder of timm's says, from which ``info`` has no spec where the package doesn't list
    the architecture."""

    @classmethod
    def open(
        cls,
        file: Path | str,
        weights_key: str | None = None,
        spec: VitSpec | None = None,
        model: str | None = None,
    ) -> Checkpoint:
        """Open a .safetensors, .pth, .pt, .bin or .tar file (the latter four need torch).

        Names lose the prefixes that parallel and compiled models give them. A folder, or a file
        with a ``config.json`` beside it, may be Hugging Face's or timm's; it gets timm's names.

        Args:
            weights_key: the entry of a pickled file that holds the weights; default: as timm, the
                averaged (EMA) ones where there are any, which ``note`` then says.
            spec: the model that the weights are for, where that is known; with it a file of
                Hugging Face's needs no ``config.json``.
            model: timm's name of it, as a person says; a ``config.json`` of timm's that stands
                beside a lone file and says another is left alone.

        Raises:
            CheckpointError: the file is missing, truncated or of another format.
            UnsupportedModelError: a folder's model has a part that a spec can't express.
            MissingPackageError: torch is needed and not installed.
        """
        file = Path(file)
        if file.is_dir():
            read_record(file / CONFIG)  # tells of folders that are none of these
            if pickled := find_pickled(file):
                return cls._from_folder(file, file, *_unpickle(pickled, weights_key))
            _refuse_key(file, weights_key)
            return cls._from_folder(file, file, read_weights(file))
        if file.suffix in SUFFIXES:
            tensors, note = _unpickle(file, weights_key)
            return cls._name(file, tensors, ModelInfo(), note, spec, model)
        stored, metadata = read_header(file)
        _refuse_key(file, weights_key)
        if holds_bank(stored):
            raise CheckpointError(f"{file} is a ToCom bank, not a model's weights.")
        if is_huggingface(stored):
            return cls._name(file, read_weights(file.parent, file), ModelInfo(), "", spec)
        for name, tensor in stored.items():
            if tensor.dtype not in NUMPY_TYPES:
                raise CheckpointError(
                    f"{file}: {name} is of type {tensor.dtype}; F32, F16 and BF16 are read."
                )
        try:
            info = from_metadata(ModelInfo, metadata)
        except InputError as error:
            raise CheckpointError(f"{file}: {error}") from None
        if info.spec and info.spec.depth > len(stored):  # before any name is made
            raise CheckpointError(
                f"{file}: its metadata say {info.spec.depth} layers, but it has {len(stored)} "
                "tensors; save it again."
            )
        names = clean_names(stored, file)
        cleaned = {names[name]: tensor for name, tensor in map_tensors(stored).items()}
        return cls._name(file, cleaned, info, "", spec, model)

    @classmethod
    def _name(
        cls,
        file: Path,
        tensors: Mapping[str, Array],
        info: ModelInfo,
        note: str,
        spec: VitSpec | None,
        model: str | None = None,
    ) -> Checkpoint:
        """Of a file's tensors what its folder, or the spec, makes of them."""
        folder = file.parent
        if is_huggingface(tensors):
            if (folder / CONFIG).exists():
                return cls._from_folder(folder, file, tensors, note)
            if spec is None:
                raise CheckpointError(
                    f"{file} has the names of Hugging Face's transformers, which need the "
                    f"{CONFIG} that it was saved with beside it."
                )
            tensors = to_timm(strip_names(tensors, file), spec, file)
        elif info == ModelInfo() and is_timm_folder(folder) and _is_of_folder(file, model):
            return cls._from_folder(folder, file, tensors, note)
        return cls(file, tensors, info, note)

    @classmethod
    def _from_folder(
        cls, folder: Path, file: Path, weights: Mapping[str, Array], note: str = ""
    ) -> Checkpoint:
        config = folder / CONFIG
        if is_timm(read_record(config)):
            timm, spec = open_timm_folder(folder, weights), None
            if is_known(timm.architecture):
                spec = timm.make_spec(known_model(timm.architecture)[0])
            info = ModelInfo(spec, classes=timm.classes, preprocess=timm.preprocess)
            return cls(file, timm.tensors, info, note, config, timm)
        found = open_folder(folder, weights)
        method = Method("tome", proportional=False) if found.masked else None
        info = ModelInfo(
            found.spec, method=method, classes=found.classes, preprocess=found.preprocess
        )
        return cls(file, found.tensors, info, note, config)

    def check(self, spec: VitSpec, advice: str = "Is it of another model?") -> VitSpec:
        """The spec with as many rows of its head as this has, once every tensor fits it.

        Args:
            advice: what to say where the tensors are another model's.

        Raises:
            CheckpointError: tensors are missing, too many, of another shape, or not finite.
        """
        if integers := [name for name, t in self.tensors.items() if t.dtype == np.int8]:
            raise CheckpointError(
                f"{self.file}: {integers[0]} is int8, of a bundle built so; give the checkpoint "
                "that the bundle was built from."
            )
        head = self.tensors.get("head.weight")
        if head is not None and head.ndim == 2:
            rows = "projection" if spec.projection else "classes"
            spec = dataclasses.replace(spec, **{rows: head.shape[0]})
        elif not any(name.startswith("head") for name in self.tensors):
            spec = dataclasses.replace(spec, classes=0)
        named = self.info.classes
        if named is not None and len(named) != spec.classes:
            raise CheckpointError(
                f"{self.file}: its metadata names {len(named)} classes, but its head has "
                f"{spec.classes}."
            )
        self._check_shapes(spec, advice)
        for name, tensor in self.tensors.items():
            if not is_finite(tensor):
                raise CheckpointError(f"{self.file}: {name} holds NaN or infinite values.")
        return spec

    def _check_shapes(self, spec: VitSpec, advice: str) -> None:
        """Raise CheckpointError where the tensors are not those of a model, by name and shape."""
        expected, model = spec.weights(), spec.model
        missing = [name for name in expected if name not in self.tensors]
        extra = [name for name in self.tensors if name not in expected]
        known = {name: shape for name, shape in expected.items() if name in self.tensors}
        wrong = [name for name, shape in known.items() if self.tensors[name].shape != shape]
        layers = {name.split(".")[1] for name in known if name.startswith("blocks.")}
        if missing and not extra and not wrong and len(layers) == spec.depth:  # but for some, it is
            named = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            raise CheckpointError(
                f"{self.file}: {len(missing)} of {len(expected)} tensors of {model} are missing "
                f"({named}), the others fit it. Save the model's whole state_dict()."
            )
        if missing:
            near = difflib.get_close_matches(missing[0], self.tensors, 1)
            hint = f"; it has {near[0]}" if near else ""
            raise CheckpointError(
                f"{self.file}: {len(missing)} of {len(expected)} tensors of {model} are "
                f"missing, {missing[0]} first{hint}. {advice}"
            )
        if extra:
            raise CheckpointError(
                f"{self.file}: {model} has no tensor {extra[0]} "
                f"({len(extra)} such tensors). {advice}"
            )
        if wrong:
            first = wrong[0]
            most = f" ({len(wrong)} such tensors). {advice}" if 2 * len(wrong) > len(known) else "."
            raise CheckpointError(
                f"{self.file}: {first} has shape {self.tensors[first].shape}, but {model} needs "
                f"{expected[first]}{most}"
            )

    def choose_source(self, given: int | None, default: int = 0) -> int:
        """The degree that the weights were trained at: as given, else by the metadata.

        Args:
            default: where neither says it.

        Raises:
            CheckpointError: the two differ.
        """
        known = self.info.source
        if None not in (given, known) and given != known:
            raise CheckpointError(
                f"`source` {given}, but {self.file} was trained at degree {known} by its metadata; "
                "leave `source` out."
            )
        return next(source for source in (given, known, default) if source is not None)


def _unpickle(file: Path, key: str | None) -> tuple[Mapping[str, Array], str]:
    """A pickled file's tensors, and what a person should know of the entry that was taken."""
    state = load_pickle(file, key, choose=list_needed)
    return state.tensors, _tell_averaged(state, file, key)


def _tell_averaged(state: StateDict, file: Path, key: str | None) -> str:
    """What a person should know of the entry that was taken.

    Raises:
        CheckpointError: there are weights elsewhere alone.
    """
    others = ", ".join(state.others)
    if not state.tensors and others:
        raise CheckpointError(
            f"{file} has no weights where they are looked for; `weights_key` says in which of "
            f"its entries they are: {others}."
        )
    if key is not None or state.key not in AVERAGED:
        return ""
    note = f"{file}: the averaged weights are taken, {state.key}."
    return note + (f" `weights_key` chooses others: {others}." if others else "")


def _is_of_folder(file: Path, model: str | None) -> bool:
    """Whether timm's ``config.json`` beside a file tells of it."""
    if model is None or file.name in (WEIGHTS, PICKLED):
        return True
    named: Any = read_record(file.parent / CONFIG)["architecture"]
    return bool(model.split(".")[0] == named)


def _refuse_key(file: Path, key: str | None) -> None:
    if key is not None:
        raise CheckpointError(f"`weights_key` {key}: {file} has no entries; pickled files do.")

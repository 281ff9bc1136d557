"""Eighty ways to get it wrong, each answered in a line or two with status 2."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

TABLE = """
inspect nowhere                                       | nowhere
inspect {empty}                                       | empty
inspect {text}                                        | text.safetensors is not a safetensors file
inspect {cut}                                         | cut.safetensors is truncated
inspect {huge_shape}                                  | huge.safetensors is not a safetensors file
inspect {huge_header}                                 | header.safetensors is not a safetensors file
inspect {folder}                                      | folder
inspect {fifo}                                        | pipe
inspect {long}                                        | File name too long
inspect                                               | Missing argument
inspect {bundle} {bundle}                             | unexpected extra argument
inspect {bundle} --what                               | No such option
inspect {manifest:{}}                                 | manifest.json can't be understood
inspect {manifest:[]}                                 | manifest.json can't be understood
inspect {manifest:not json}                           | manifest.json can't be understood
inspect {manifest:Infinity}                           | manifest.json can't be understood
inspect {manifest-scale:Infinity}                     | manifest.json can't be understood
inspect {manifest-scale:BIG}                          | manifest.json can't be understood
inspect {manifest-scale:-1}                           | manifest.json can't be understood
inspect {manifest-scale:NaN}                          | manifest.json can't be understood
inspect {manifest-format:7}                           | pip install -U tocom-export
inspect {manifest-format:1}                           | format 1, 2 is expected
inspect {manifest-variants:{}}                        | variants: there is none
inspect {manifest-files:{"../x": {"sha256": "", "bytes": 1}}} | not a plain file name
run {manifest-variants:{}} {image}                    | variants: there is none
run {bundle} nowhere.png                              | nowhere.png: no such file
run {bundle} {notimage}                               | is not an image
run {bundle} {folder}                                 | folder
run {bundle} {image} --variant r05                    | has no variant r05
run {bundle} {image} --variant 99999999999            | has no variant
run {bundle} {image} --backend warp                   | warp
run {bundle} {image} --threads 0                      | --threads
run {bundle} {image} --device mars                    | MARS
run nowhere {image}                                   | nowhere is not a bundle
run {bundle}                                          | Missing argument
build --targets 99                                    | --bank none
build --targets 1000001                               | 1000001
build --keep 1.5                                      | --keep
build --schedule a=keep:0                             | keep
build --targets x                                     | --targets
build --targets 4-1                                   | rising span
build --targets 0-9999999999999999999                 | --targets
build --source 17                                     | --source
build --scale nan                                     | --scale
build --scale 1e38                                    | --scale
build --scale -1                                      | --scale
build --schedule fast                                 | --schedule
build --schedule fast=1,2                             | fast
build --schedule ../x=every:2                         | can't name a variant
build --schedule weights=every:2                      | can't name a variant
build --schedule a=nowhere.json                       | nowhere.json
build --schedule a=every:0                            | every
build --model no_such_vit                             | no_such_vit
build --model resnet50                                | resnet50
build --checkpoint nowhere.safetensors                | nowhere.safetensors
build --checkpoint {text}                             | text.safetensors
build --checkpoint {cut}                              | cut.safetensors
build --checkpoint {evil}                             | evil.pth
build --checkpoint {bank}                             | ToCom bank
build --checkpoint {folder}                           | folder
build --bank nowhere.safetensors                      | nowhere.safetensors
build --bank {checkpoint}                             | bank
build --bank {text}                                   | text.safetensors
build --method prune                                  | --method
build --precision fp8                                 | --precision
build --precision int8                                | --calibrate
build --calibrate {photos}                            | --calibrate
build --out {text}                                    | is a file
build --out {folder}                                  | exists; add --force
build --out {folder} --force                          | holds other files
build --out {long}                                    | name too long
build --out {text}/under                              | can't be written
build --backend abacus                                | --backend
refit nowhere                                         | nowhere: no such file
refit {text}                                          | name a bundle, or one of its
refit {folder}                                        | is not a bundle
refit {bundle} --bank {bank} --scale 1e38             | --scale
refit {bundle} --bank nowhere.safetensors             | nowhere.safetensors
refit {bundle} --checkpoint {cut} --bank {bank}       | cut.safetensors
refit {bundle} --out x.plan                           | --out is for plans
refit {bundle}/r05.onnx --bank {bank}                 | no such file
verify {bundle} --images nowhere                      | nowhere
verify {bundle} --images {empty}                      | empty
verify {bundle} --atol -1                             | --atol
bench {bundle} --batch 0                              | --batch
bench {bundle} --variants r99                         | r99
evaluate {bundle} --data nowhere                      | nowhere
train --checkpoint {checkpoint} --data nowhere --out b.safetensors | nowhere
train --checkpoint {checkpoint} --data {photos} --batch 0 | --batch
finetune --checkpoint {checkpoint} --data {photos} --source 99 --out t.safetensors | --source
triton {bundle} {folder}                              | exists; add --force
buidl                                                 | did you mean build?
nonsense                                              | No such command
"""
"""A command line | what its answer says."""
ROWS = [tuple(map(str.strip, line.split("|"))) for line in TABLE.strip().splitlines()]


class Evil:
    """A pickle that runs code when it is read without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


@pytest.fixture
def places(
    here: Path, bundle: Path, checkpoint: Path, bank_file: Path, photos: Path
) -> dict[str, Path]:
    """What the table speaks of."""
    names = ("empty", "folder", "text.safetensors", "cut.safetensors", "huge.safetensors")
    empty, folder, text, cut, huge = (here / name for name in names)
    empty.mkdir()
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    text.write_text("this is a text, and not a short one")
    cut.write_bytes(checkpoint.read_bytes()[:-1000])
    header = {"x": {"dtype": "F32", "shape": [0, 2**47, 2**47], "data_offsets": [0, 0]}}
    packed = json.dumps(header).encode()
    huge.write_bytes(struct.pack("<Q", len(packed)) + packed)
    long_header = here / "header.safetensors"
    long_header.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    evil, notimage, image = here / "evil.pth", here / "not.png", here / "image.png"
    evil.write_bytes(pickle.dumps({"model": Evil()}))
    notimage.write_text("no image")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(image)
    pipe = here / "pipe"
    if hasattr(os, "mkfifo"):
        os.mkfifo(pipe)
    return {
        "empty": empty, "folder": folder, "text": text, "cut": cut, "huge_shape": huge,
        "huge_header": long_header, "evil": evil, "notimage": notimage, "image": image,
        "fifo": pipe, "long": here / ("x" * 300), "bundle": bundle, "checkpoint": checkpoint,
        "bank": bank_file, "photos": photos,
    }  # fmt: skip


def change_manifest(bundle: Path, what: str) -> None:
    """``manifest:TEXT`` puts a text in its place, ``manifest-FIELD:TEXT`` in that of a field."""
    file = bundle / "manifest.json"
    field, _, text = what.removeprefix("manifest").partition(":")
    text = text.replace("BIG", "9" * 400)
    if field:
        data = json.loads(file.read_text())
        if field == "-scale":
            next(iter(data["variants"].values()))["scale"] = "HERE"
        else:
            data[field[1:]] = "HERE"
        text = json.dumps(data).replace('"HERE"', text)
    file.write_text(text)


def test_there_are_eighty():
    assert len(ROWS) >= 80
    assert len({line for line, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("line", "says"), ROWS, ids=[line for line, _ in ROWS])
def test_each_gets_an_answer(
    fails: Callable[..., Result], places: dict[str, Path], here: Path, line: str, says: str
):
    if "{fifo}" in line and not hasattr(os, "mkfifo"):
        pytest.skip("has no pipes with names")
    if "{manifest" in line:
        start = line.index("{manifest")
        end = line.rindex("}") if line.count("}") == 1 else _find_end(line, start)
        change_manifest(places["bundle"], line[start + 1 : end])
        line = line[:start] + "{bundle}" + line[end + 1 :]
    words = [word.format(**places) for word in line.split()]
    result = fails(*words, says=(says,))
    assert result.stdout == ""
    assert "report" not in result.stderr
    assert not (here / "pwned").exists()


def _find_end(line: str, start: int) -> int:
    """Where the brace that opens at ``start`` is closed."""
    depth = 0
    for at in range(start, len(line)):
        depth += {"{": 1, "}": -1}.get(line[at], 0)
        if not depth:
            return at
    raise AssertionError(line)

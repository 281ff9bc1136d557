from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import Result
from PIL import Image

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.tracing import Tracer

Run = Callable[..., Result]


def test_the_last_layer_of_the_fastest_variant(
    succeeds: Run, bundle: Path, photos: Path, here: Path
):
    photo = photos / "a" / "0.png"
    shown = json.loads(succeeds("show", bundle, photo, "--json").stdout)
    opened = Bundle.open(bundle)
    fastest = opened.by_cost()[-1]
    assert (shown["variant"], shown["file"]) == (fastest, str(photo))
    assert shown["out"] == f"0-{fastest}.png"
    with Image.open(here / shown["out"]) as drawn:
        assert drawn.format == "PNG"
    image = opened.preprocess.load(photo, opened.spec.image_size)
    maps = Tracer(opened, fastest).run(image[None]).maps[0]
    assert shown["grid"] == list(opened.spec.grid)
    assert shown["layers"] == [{"layer": opened.spec.depth, "map": maps[-1].tolist()}]


def test_layers_and_a_name(succeeds: Run, bundle: Path, photos: Path, here: Path):
    photo, depth = photos / "a" / "0.png", Bundle.open(bundle).spec.depth
    every = succeeds("show", bundle, photo, "--layers", "all", "--out", "x.svg", "--json")
    assert [layer["layer"] for layer in json.loads(every.stdout)["layers"]] == [
        *range(1, depth + 1)
    ]
    assert (here / "x.svg").read_text().count("<text") == depth + 1
    table = succeeds("show", bundle, photo, "--variant", "8", "--layers", "1,2")
    assert "patch tokens" in table.stdout
    assert "Wrote 0-r08.png." in table.stderr
    assert (here / "0-r08.png").stat().st_size


def test_what_is_refused(fails: Run, bundle: Path, photos: Path, here: Path):
    photo = photos / "a" / "0.png"
    says = ("--layers 0: last, all, or numbers from 1",)
    fails("show", bundle, photo, "--layers", 0, says=says)
    fails("show", bundle, photo, "--variant", "r99", says=("no variant r99",))
    fails("show", bundle, photo, "--out", "x.jpg", says=("--out x.jpg: .png and .svg are written",))
    fails("show", bundle, photos / "none.png", says=("no such file",))
    assert not list(here.iterdir())

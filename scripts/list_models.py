"""Write two lists of timm's models to tocom_export/assets: their specs, and why others have none.

With them a bundle can be built where timm isn't installed, and a model that can't be is refused
with a reason there, too. docs/models.md says what is in them. Run it after an upgrade of timm
(some minutes):

    python scripts/list_models.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict

import timm
import torch
from models_page import PAGE, format_page

from tocom_export.errors import UnsupportedModelError
from tocom_export.io.json_codec import encode
from tocom_export.model.catalogue import ASSETS
from tocom_export.model.from_timm import spec_from_timm
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.training.timm_models import preprocess_of_name


def changes(new: dict[str, object], old: dict[str, object]) -> dict[str, object]:
    """The entries of ``new`` that differ from ``old``'s."""
    return {key: value for key, value in new.items() if value != old[key]}


def list_tags() -> dict[str, list[str]]:
    """Model name → the tags of its pretrained weights."""
    tags: dict[str, list[str]] = defaultdict(list)
    for pretrained in timm.list_pretrained():
        name, _, tag = pretrained.partition(".")
        tags[name].append(tag)
    return tags


def describe(name: str, spec: VitSpec, tags: Iterable[str]) -> dict[str, object]:
    """An entry of models.json: the spec, the image statistics, and how those of its tags differ."""
    entry = encode(spec, defaults=False)
    del entry["model"]
    default = asdict(preprocess_of_name(name))
    others = {tag: changes(asdict(preprocess_of_name(f"{name}.{tag}")), default) for tag in tags}
    return {"spec": entry, "preprocess": changes(default, asdict(Preprocess())), "tags": others}


def format_lines(table: Mapping[str, object]) -> str:
    """JSON with a line for each entry, so that a new version of timm is a short diff."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(table.items())]
    return "{\n" + ",\n".join(lines) + "\n}"


def main() -> None:
    """Try every model of timm's."""
    models: dict[str, object] = {}
    classes: dict[str, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    tags = list_tags()
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        try:
            models[name] = describe(name, spec_from_timm(model, name), tags[name])
        except UnsupportedModelError as error:
            classes[type(model).__name__][error.part][name] = len(tags[name])
    (ASSETS / "models.json").write_text(format_lines(models) + "\n", "utf-8")
    head = f'{{"timm": {json.dumps(timm.__version__)},\n"classes": '
    text = head + format_lines(classes) + "}\n"
    (ASSETS / "unsupported_models.json").write_text(text, "utf-8")
    PAGE.write_text(format_page(), "utf-8")
    refused = sum(len(names) for parts in classes.values() for names in parts.values())
    print(f"{len(models)} models, {refused} not supported, timm {timm.__version__}")


if __name__ == "__main__":
    main()

"""Write two lists of timm's models to tocom_export/assets: their specs, and why others have none.

With them a bundle can be built where timm isn't installed, and a model that can't be is refused
with a reason there, too. Run it after an upgrade of timm (some minutes):

    python scripts/list_models.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

import timm

from tocom_export.errors import UnsupportedModelError
from tocom_export.io.json_codec import encode
from tocom_export.model.catalogue import ASSETS
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.training.timm_models import preprocess_of_name, spec_of_name


def changes(new: dict[str, object], old: dict[str, object]) -> dict[str, object]:
    """The entries of ``new`` that differ from ``old``'s."""
    return {key: value for key, value in new.items() if value != old[key]}


def describe(name: str, spec: VitSpec) -> dict[str, object]:
    """An entry of models.json: the spec, and the image statistics of the model and its tags."""
    entry = encode(spec, defaults=False)
    del entry["model"]
    default = asdict(preprocess_of_name(name))
    tags = {
        pretrained.split(".")[1]: tag
        for pretrained in timm.list_pretrained(f"{name}.*")
        if (tag := changes(asdict(preprocess_of_name(pretrained)), default))
    }
    return {"spec": entry, "preprocess": changes(default, asdict(Preprocess())), "tags": tags}


def write(name: str, table: Mapping[str, object]) -> None:
    """A JSON file with a line for each entry, so that a new version of timm is a short diff."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(table.items())]
    (ASSETS / name).write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def main() -> None:
    """Try every model of timm's."""
    models: dict[str, object] = {}
    unsupported: dict[str, list[str]] = {}
    for name in timm.list_models():
        try:
            models[name] = describe(name, spec_of_name(name))
        except UnsupportedModelError as error:
            unsupported.setdefault(error.part, []).append(name)
    write("models.json", models)
    write("unsupported_models.json", unsupported)
    refused = sum(map(len, unsupported.values()))
    print(f"{len(models)} models, {refused} not supported, timm {timm.__version__}")


if __name__ == "__main__":
    main()

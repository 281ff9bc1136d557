"""Write tocom_export/assets/models.json: the specs of timm's plain ViTs.

With it a bundle can be built where timm isn't installed. Run it after an upgrade of timm:

    python scripts/list_models.py
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import timm

from tocom_export.errors import UnsupportedModelError
from tocom_export.io.json_codec import encode
from tocom_export.model.preprocess import Preprocess
from tocom_export.training.timm_models import preprocess_of_name, spec_of_name

OUT = Path(__file__).parent.parent / "tocom_export" / "assets" / "models.json"


def changes(new: dict[str, object], old: dict[str, object]) -> dict[str, object]:
    """The entries of ``new`` that differ from ``old``'s."""
    return {key: value for key, value in new.items() if value != old[key]}


def main() -> None:
    """Try every model of timm's two modules of plain ViTs."""
    models: dict[str, dict[str, object]] = {}
    refused = 0
    for name in timm.list_models(module="vision_transformer") + timm.list_models(module="deit"):
        try:
            spec = spec_of_name(name)
        except UnsupportedModelError:
            refused += 1
            continue
        entry = encode(spec, defaults=False)
        del entry["model"]
        models[name] = {"spec": entry}
        default = asdict(preprocess_of_name(name))
        models[name]["preprocess"] = changes(default, asdict(Preprocess()))
        models[name]["tags"] = {
            pretrained.split(".")[1]: tag
            for pretrained in timm.list_pretrained(f"{name}.*")
            if (tag := changes(asdict(preprocess_of_name(pretrained)), default))
        }
    lines = [f"{json.dumps(n)}: {json.dumps(m)}" for n, m in sorted(models.items())]
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    print(f"{OUT.name}: {len(models)} models, {refused} not supported, timm {timm.__version__}")


if __name__ == "__main__":
    main()

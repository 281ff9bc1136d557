"""The figures in docs/method.md, worked out anew."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from tocom_export.compression.rules import list_degrees
from tocom_export.compression.schedule import Schedule
from tocom_export.model.catalogue import known_model

PAGE = (Path(__file__).parent.parent / "docs" / "method.md").read_text("utf-8")
MODELS = {
    "ViT-B/16, 384 pixels": ("vit_base_patch16_384", 384),
    "ViT-B/16, 512 pixels": ("vit_base_patch16_384", 512),
    "DINOv2 ViT-B/14 with registers, 518 pixels": ("vit_base_patch14_reg4_dinov2", 518),
}


def test_multiply_adds_of_merging_for_the_mlp_alone():
    lines = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    (head,) = (line[1:] for line in lines if line[0].endswith("`--merge ffn`"))
    (here,) = (line[1:] for line in lines if line[0] == "here")
    spec = replace(known_model("vit_base_patch16_384")[0], image_size=(512, 512))
    found = [Schedule.of(spec, int(degree), "ffn").macs(spec) for degree in head]
    assert here == [f"{macs / 1e9:.1f}" for macs in found]


def test_multiply_adds_of_long_sequences():
    lines = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    (head,) = (line for line in lines if line[:2] == ["model", "tokens"])
    rows = {line[0]: line[1:] for line in lines if line[0] in MODELS}
    assert rows.keys() == MODELS.keys()
    asked = [re.sub(r"r = |`", "", column) for column in head[2:]]
    assert asked == ["0", "16", "23", "48", "keep:0.5"]
    for model, (name, side) in MODELS.items():
        spec = replace(known_model(name)[0], image_size=(side, side))
        assert rows[model][0] == f"{spec.tokens:,}"
        for column, cell in zip(asked, rows[model][1:], strict=True):
            degree = int(column) if column.isdecimal() else list_degrees(spec, column)
            assert cell == f"{Schedule.of(spec, degree).macs(spec) / 1e9:.1f}", (model, column)

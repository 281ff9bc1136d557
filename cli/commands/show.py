"""``tocom-export show``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tocom_export.errors import InputError

from ..options import FILE, common_options, take_output
from ..output import Command
from ..runtime_options import threads_option


@click.command("show", cls=Command)
@click.argument("bundle", type=FILE)
@click.argument("image", type=FILE)
@click.option("--variant", help="A name or a bare degree; default: the one of the fewest MACs.")
@click.option(
    "--layers",
    default="last",
    metavar="last|all|LIST",
    help="After which layers: 4,8,12, counted from 1.",
)
@click.option(
    "--out",
    type=FILE,
    metavar="FILE.png|FILE.svg",
    help="Default: <image>-<variant>.png, here.",
)
@threads_option
@common_options
def show_command(
    bundle: Path,
    image: Path,
    variant: str | None,
    layers: str,
    out: Path | None,
    threads: int | None,
    **options: Any,
) -> None:
    """Draw which patches of an image become one token.

    The image as the model sees it, and beside it its patches: those of one token in one colour, the
    mean of their pixels, with lines between tokens; pruned ones black.

    \b
    Examples:
      tocom-export show reference-source0 cat.jpg --variant r16
      tocom-export show reference-source0 cat.jpg --layers all --out cat.svg
    """
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.merge_picture import Panel, restore_pixels, write_picture
    from tocom_export.engines.tracing import Tracer

    output = take_output(options)
    opened = Bundle.open(bundle)
    chosen = opened.variant(variant or opened.by_cost()[-1])
    numbers = _read_layers(layers, opened.spec.depth)
    file = out or Path(f"{image.stem}-{chosen.name}.png")
    pixels = opened.preprocess.load(image, opened.spec.image_size)
    maps = Tracer(opened, chosen, threads=threads).run(pixels[None]).maps[0]  # (layers, patches)
    panels = []
    for number in numbers:
        left = len({token for token in maps[number - 1].tolist() if token >= 0})
        panels.append(Panel(f"layer {number}: {left} patch tokens", maps[number - 1]))
    write_picture(file, restore_pixels(pixels, opened.preprocess), panels, opened.spec.grid)
    output.document(
        {
            "file": str(image),
            "variant": chosen.name,
            "grid": list(opened.spec.grid),
            "layers": [{"layer": number, "map": maps[number - 1].tolist()} for number in numbers],
            "out": str(file),
        }
    )
    output.table(
        ["layer", "patch tokens"],
        [[str(n), panel.title.split()[2]] for n, panel in zip(numbers, panels, strict=True)],
        f"{opened.spec.model}, {chosen.name}, {opened.spec.patches} patches",
    )
    output.note(f"Wrote {file}.")


def _read_layers(text: str, depth: int) -> list[int]:
    if text == "last":
        return [depth]
    if text == "all":
        return list(range(1, depth + 1))
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= depth for part in parts):
        raise InputError(f"`layers` {text}: last, all, or numbers from 1 to {depth}, as 4,8,12.")
    return [int(part) for part in parts]

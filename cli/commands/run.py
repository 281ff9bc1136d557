"""``tocom-export run``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import ImageError, InputError
from tocom_export.model.outputs import DENSE, OUTPUTS

from ..options import FILE, common_options, take_output
from ..output import Command, Output
from ..runtime_options import run_options

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.classifying import Answer
    from tocom_export.model.outputs import Form


@click.command("run", cls=Command)
@click.argument("bundle", type=FILE)
@click.option("--variant", help="A name or a bare degree; default: the one of the most MACs.")
@run_options
@click.option("--top-k", type=click.IntRange(1), default=5, help="Classes.")
@click.option(
    "--output",
    "arrays",
    type=(click.Choice(OUTPUTS), FILE),
    multiple=True,
    metavar=f"{'|'.join(OUTPUTS)} FILE",
    help="Also write them to FILE.npy, in the order of the images: (images, classes or channels) "
    "float32, tokens (images, patches, channels) float32, map (images, patches) int32; NaN (map: "
    "-1) of an image that can't be read; repeatable.",
)
@click.option("--check-hashes", is_flag=True, help="Refuse a bundle of which any file was changed.")
@click.argument("images", type=FILE, nargs=-1, required=True, metavar="IMAGE|DIR|-...")
@common_options
def run_command(
    bundle: Path,
    variant: str | None,
    top_k: int,
    arrays: tuple[tuple[Any, Path], ...],
    check_hashes: bool,
    images: tuple[Path, ...],
    **options: Any,
) -> None:
    """Classify image files with one engine of a bundle: the likeliest classes.

    Of a bundle without logits, the length of each embedding; of one without both, the shape of
    what it gives.

    Of a DIR, all images under it; - reads one from stdin. One that can't be read is named, the
    others are answered, and the exit status is 2.

    \b
    Examples:
      tocom-export run reference-source0 --variant r08 cat.jpg dog.png
      tocom-export run reference-source0 photos --output logits photos.npy --json
      tocom-export run backbone photos --output embedding photos.npy
      tocom-export run dense photos --output tokens features.npy --output map map.npy
      curl -s https://example.org/cat.jpg | tocom-export run reference-source0 -
      tocom-export run reference-source0 --backend openvino --inference-precision f32 cat.jpg
    """
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.classifying import list_images, run_files

    output = take_output(options)
    opened = Bundle.open(bundle, hashes=check_hashes)
    # A wrong one is told before the images are read.
    chosen = opened.variant(variant or opened.by_cost()[0])
    wanted = [(opened.find_output(name), _name_file(file)) for name, file in arrays]
    named = [file.resolve() for _, file in wanted]
    if twice := [file.name for file in named if named.count(file) > 1]:
        raise InputError(f"--output {twice[0]} is named twice; choose another file.")
    files = list_images(images)
    engine = opened.engine(chosen.name, **options)
    documents: list[dict[str, Any]] = []
    failed = 0
    with ExitStack() as stack:
        writers = [
            (name, stack.enter_context(_write(file, len(files), opened.forms[name], output)))
            for name, file in reversed(wanted)  # what is begun last is told first
        ]
        with output.progress("running", len(files)) as advance:
            for answer in run_files(opened, engine, files):
                advance(answer.file)
                for name, write in writers:
                    write(answer.outputs[name])
                documents.append(_describe(opened, chosen.name, answer, top_k))
        for document in documents:
            if "error" in document:
                output.fault(document["error"])
                failed += 1
        if failed == len(documents):  # and no array is written
            click.get_current_context().exit(ImageError.exit_status)
    output.document({"bundle": str(bundle), "engine": engine.about, "images": documents})
    title = f"{opened.spec.model}, {chosen.name}, {engine.about}"
    answered = [document for document in documents if "error" not in document]
    _show(answered, title, opened, bool(wanted), output)
    if failed:
        click.get_current_context().exit(ImageError.exit_status)


def _describe(bundle: Bundle, variant: str, answer: Answer, count: int) -> dict[str, Any]:
    if answer.error:
        return {"file": answer.file, "error": answer.error}
    document: dict[str, Any] = {"file": answer.file, "variant": variant}
    if not {*bundle.outputs} - {*DENSE}:  # of which each would be a page of numbers
        return {**document, "shapes": {n: list(of.shape) for n, of in answer.outputs.items()}}
    if not bundle.has_logits:
        embedding = answer.outputs[bundle.find_output("embedding")]
        return {**document, "embedding": [float(value) for value in embedding]}
    names = bundle.classes
    classes = [
        {"name": names[i] if names else f"class {i}", "index": i, "probability": share}
        for i, share in answer.rank(count)
    ]
    return {**document, "classes": classes}


def _show(
    documents: list[dict[str, Any]], title: str, bundle: Bundle, written: bool, output: Output
) -> None:
    rows: list[list[str]] = []
    for document in documents:
        name = document["file"]
        if embedding := document.get("embedding"):
            length = sum(value * value for value in embedding) ** 0.5
            rows.append([name, str(len(embedding)), f"{length:.2f}"])
        for place, found in enumerate(document.get("classes", ())):
            share = f"{100 * found['probability']:.1f} %"
            rows.append([name if place == 0 else "", found["name"], share])
        if shapes := document.get("shapes"):
            rows.append([name, *(" × ".join(map(str, shape)) for shape in shapes.values())])
    why = "The bundle gives no logits" if bundle.spec.classes else "The model has no classes"
    if documents and "embedding" in documents[0]:
        output.table(["image", "channels", "length"], rows, title)
        told = f"{why}: it gives embeddings; --output embedding FILE writes them."
    elif documents and "shapes" in documents[0]:
        output.table(["image", *documents[0]["shapes"]], rows, title)
        told = f"{why}: it gives tokens; --output tokens FILE writes them."
    else:
        output.table(["image", "class", "probability"], rows, title)
        return
    if not written:
        output.note(told)


@contextmanager
def _write(file: Path, count: int, form: Form, output: Output) -> Iterator[Callable[[Any], Any]]:
    """An array (count, ...) that is written row by row, by what is called with each."""
    from numpy.lib import format as npy

    from tocom_export.io.atomic import replace_file

    shape = (count, *form.shape)
    with replace_file(file) as beside, beside.open("wb") as stream:
        kind = {"float32": "<f4", "int32": "<i4"}[form.dtype]
        npy.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
        yield lambda row: stream.write(row.astype(kind, copy=False).tobytes())
    output.note(f"Wrote {file}: {' × '.join(map(str, shape))} {form.dtype}.")


def _name_file(file: Path) -> Path:
    return file if file.suffix == ".npy" else file.with_name(f"{file.name}.npy")

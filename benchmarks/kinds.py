"""A model of each kind that timm has, fp32: against timm's own forward, and merged and pruned.

Alone it prints what was seen of each model, as JSON: ``python benchmarks/kinds.py [NAME ...]``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from common import Row
from parity import Case, Found, compare
from safetensors.torch import save_file

from tocom_export.compression.bank import ToComBank
from tocom_export.compression.method import Method
from tocom_export.engines.verify import sample_images
from tocom_export.graph.writer import write_graph
from tocom_export.io.json_codec import parse_json
from tocom_export.io.tensors import read_header
from tocom_export.model.catalogue import ASSETS, known_model
from tocom_export.model.spec import VitSpec
from tocom_export.training.building import vit_from_spec
from tocom_export.training.lora import TrainableBank
from tocom_export.training.model import CompressedVit
from tocom_export.variant import Variant

LARGEST, LONGEST = 30e6, 600
"""Parameters, and tokens; of a kind without such a model, one is cut down."""
LAYERS, GRID = 3, 16
"""What is left of it: layers, and patches along each side."""
SIZES = (
    "model", "image_size", "patch_size", "width", "depth", "heads", "mlp_width", "channels", "eps",
    "relative_width", "pool_heads", "pool_mlp_width", "adapter_width",
)  # fmt: skip
"""Fields of a spec by which models of one kind differ."""
BATCHES = (1, 3)


def count_parameters(spec: VitSpec) -> int:
    """Of all tensors."""
    return sum(math.prod(shape) for shape in spec.weights().values())


def find_kind(spec: VitSpec) -> str:
    """All that a spec says but for sizes; of registers and a head, whether there are any."""
    fields = {key: value for key, value in asdict(spec).items() if key not in SIZES}
    fields |= {"classes": bool(spec.classes), "registers": bool(spec.registers)}
    if spec.rotary:
        r = spec.rotary
        fields["rotary"] = (r.kind, r.half, r.indexing, bool(r.offset), bool(r.reference))
    return repr(fields)


def list_kinds() -> list[VitSpec]:
    """The smallest model of each kind, of those with pretrained weights if there are any.

    Those that take least come first.
    """
    kinds: dict[str, list[tuple[bool, int, VitSpec]]] = defaultdict(list)
    found: list[tuple[int, VitSpec]] = []
    for name, entry in parse_json((ASSETS / "models.json").read_bytes()).items():
        spec, _ = known_model(name)
        cost = count_parameters(spec) * spec.tokens
        kinds[find_kind(spec)].append((not entry["tags"], cost, spec))
    for models in kinds.values():
        spec = min(models, key=lambda each: each[:2])[2]
        if count_parameters(spec) > LARGEST or spec.tokens > LONGEST:
            sides = zip(spec.image_size, spec.patch_size, strict=True)
            height, width = (min(side, GRID * patch) for side, patch in sides)
            spec = dataclasses.replace(spec, depth=LAYERS, image_size=(height, width))
        found.append((count_parameters(spec) * spec.tokens, spec))
    return [spec for _, spec in sorted(found, key=lambda each: each[0])]


def label(spec: VitSpec) -> str:
    """The row of the table that a model is counted in."""
    words = {"vit": "ViT", "eva": "Eva", "beit": "Beit", "relpos": "relative positions"}
    parts = [words[spec.family]]
    if spec.rotary:
        parts.append({"cat": "rotary", "dinov3": "rotary (DINOv3)", "mixed": "rotary (mixed)"}[
            spec.rotary.kind
        ])  # fmt: skip
    if spec.norms == "rms":
        parts.append("RMSNorm")
    if spec.mlp != "plain":
        parts.append("SwiGLU")
    if spec.pool == "map":
        parts.append("attention pooling")
    return ", ".join(parts)


def open_engine(spec: VitSpec, variant: Variant, method: Method, file: Path) -> Any:
    """An engine of weights in a file, on one thread."""
    stored, _ = read_header(file)
    graph = write_graph(spec, variant.schedule(spec), method, stored, {})
    ir.save(graph, file.with_name("graph.onnx"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(file.with_name("graph.onnx")), options, providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run(None, {"images": images})[0]


def list_cases(spec: VitSpec, vit: Any, file: Path) -> Iterator[tuple[str, Case]]:
    """What is run of a model: whole, merged by a constant and by a falling list, and pruned."""
    width = spec.width
    falling = [20 - 20 * layer // (spec.depth - 1) for layer in range(spec.depth)]
    nothing = [np.zeros((spec.depth, 16, *c), np.float32) for c in ((1, width), (width, 1))]
    bank = TrainableBank.from_bank(ToComBank(*nothing * 2, method=Method("tome")), spec)
    merging = [("r0", 0), ("tome", 8), ("tome", falling)]
    plans = [(what, degrees, Method("tome")) for what, degrees in merging]
    if spec.class_token:
        plans.append(("evit", falling, Method("evit")))
    for what, degrees, method in plans:
        variant = Variant.of(spec, degrees, None if isinstance(degrees, int) else "falling",
                             compensated=False)  # fmt: skip
        run = open_engine(spec, variant, method, file)
        yield what, Case(variant, method, run, CompressedVit(vit, method, spec.model), bank)


@torch.no_grad()
def draw_weights(vit: torch.nn.Module) -> None:
    """Draw all weights anew, so that none is zero, and tokens differ that merging may mix up."""
    for name, tensor in vit.named_parameters():
        noise = torch.randn(tensor.shape)
        if "gamma" in name:
            tensor.copy_(1 + 0.2 * noise)
        elif name.endswith(("token", "pos_embed", "latent", "bias_table")):
            tensor.copy_(0.5 * noise)
        elif tensor.ndim == 1:
            tensor.copy_(0.1 * noise + name.endswith("weight"))
        elif not name.endswith("freqs"):
            tensor.copy_(noise / math.sqrt(tensor[0].numel()))


def measure_model(spec: VitSpec, folder: Path) -> dict[str, Any]:
    """One model, of random weights: largest |Δ| over the largest output, of each way to run.

    ``timm`` is the engine's at r = 0 against timm's own forward; ``moved`` is by how much merging
    or pruning changes the output at least, beside which the others are to be seen.
    """
    torch.manual_seed(0)
    vit: Any = vit_from_spec(spec)
    draw_weights(vit)
    file = folder / "weights.safetensors"
    save_file(vit.state_dict(), file)
    found: dict[str, Found] = defaultdict(Found)
    with torch.inference_mode():
        images = {batch: sample_images(spec, batch, seed=batch) for batch in BATCHES}
        whole = {batch: vit(torch.from_numpy(each)).numpy() for batch, each in images.items()}
    own, moved = 0.0, math.inf
    for what, case in list_cases(spec, vit, file):
        for batch in BATCHES:
            compare(case, batch, found[what])
        for batch in BATCHES if what == "r0" else BATCHES[:1]:
            away = case.run(images[batch]) - whole[batch]
            away = float(np.abs(away).max() / np.abs(whole[batch]).max())
            own, moved = (max(own, away), moved) if what == "r0" else (own, min(moved, away))
    file.unlink()
    ways = {what: asdict(each) for what, each in found.items()}
    return {"model": spec.model, "kind": label(spec), "layers": spec.depth,
            "parameters": count_parameters(spec), "tokens": spec.tokens,
            "timm": own, "moved": moved, **ways}  # fmt: skip


def measure_all(specs: Iterable[VitSpec]) -> Iterator[dict[str, Any]]:
    """Each model in turn, on one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for spec in specs:
            yield measure_model(spec, Path(folder))


def tabulate(rows: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """A row for each kind of positions, norms, MLPs and pooling."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    for kind, models in sorted(kinds.items()):
        worst = [f"timm {max(row['timm'] for row in models):.1e}"]
        least = min(row["moved"] for row in models)
        for what, name in (("tome", "ToMe"), ("evit", "EViT")):
            ways = [row[what] for row in models if what in row]
            if not ways:
                continue
            ties = [tie for way in ways for tie in way["ties"]]
            apart = f", apart from {len(ties)} images with a tie" if ties else ""
            worst.append(f"{name} {max(way['worst'] for way in ways):.1e}{apart}")
        worst.append(f"removing tokens changes {least:.1e} or more")
        yield f"{kind}: {len(models)} models", "; ".join(worst), "≤ 1e-4"


def measure() -> list[Row]:
    """What was seen of all kinds."""
    return list(tabulate(list(measure_all(list_kinds()))))


if __name__ == "__main__":
    named = sys.argv[1:]
    chosen = [spec for spec in list_kinds() if not named or spec.model in named]
    for seen in measure_all(chosen):
        print(json.dumps(seen), flush=True)

"""docs/models.md: which models build, from the lists in tocom_export/assets.

``scripts/list_models.py`` writes the lists and then the page; where only the words below have
changed, the page alone is written, at once:

    python scripts/models_page.py
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tocom_export.io.json_codec import parse_json
from tocom_export.model.catalogue import ASSETS, known_model
from tocom_export.model.huggingface.config import SUPPORTED
from tocom_export.model.spec import VitSpec

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
CLASSES = {
    "VisionTransformer": "plain ViTs, and those with a stem of convolutions",
    "VisionTransformerDistilled": "DeiT with a distillation token",
    "Eva": "rotary positions",
    "Beit": "tables of relative positions",
    "VisionTransformerRelPos": "relative positions, by tables or a small MLP",
    "VisionTransformerSAM": "Segment Anything",
    "NaFlexVit": "images of varying size",
    "DeepseekVitClassifier": "of a language model that sees",
    "DeepseekVitEncoder": "the same, without a head",
    "Gemma4VitClassifier": "of a language model that sees",
    "Gemma4VitEncoder": "the same, without a head",
    "Qwen3VitClassifier": "of a language model that sees",
    "Qwen3VitEncoder": "the same, without a head",
}
"""timm's classes of ViTs, those whose tokens are of one grid from the first layer to the last."""
KINDS = {
    "DeiT": (r"^deit_", "deit_tiny_patch16_224", "deit_base_distilled_patch16_384"),
    "DeiT III": (r"^deit3_", "deit3_small_patch16_224", "deit3_base_patch16_384"),
    "AugReg and the first ViTs": (r"\.(augreg2?|orig)_", "vit_tiny_patch16_224",
                                  "vit_base_patch16_384"),
    "FlexiViT": (r"^flexivit_", "flexivit_small", "flexivit_base"),
    "MAE": (r"\.mae$", "vit_base_patch16_224", "vit_huge_patch14_224"),
    "DINO": (r"\.dino$", "vit_small_patch16_224", "vit_base_patch8_224"),
    "I-JEPA": (r"_ijepa$", "vit_huge_patch14_gap_224", "vit_giant_patch16_gap_224"),
    "DINOv2, also with registers": (r"_dinov2\b", "vit_small_patch14_dinov2",
                                    "vit_base_patch14_reg4_dinov2"),
    "DINOv3": (r"_dinov3", "vit_small_patch16_dinov3", "vit_base_patch16_dinov3_qkvb"),
    "CLIP (OpenAI, LAION, DataComp, MetaCLIP, DFN, TinyCLIP)": (
        r"^vit_.*_clip_", "vit_base_patch16_clip_224", "vit_large_patch14_clip_336"),
    "SigLIP": (r"siglip.*\.webli", "vit_base_patch16_siglip_224", "vit_so400m_patch14_siglip_384"),
    "SigLIP 2": (r"siglip.*\.v2_webli", "vit_base_patch16_siglip_256",
                 "vit_so400m_patch16_siglip_384"),
    "PaliGemma": (r"\.pali", "vit_so400m_patch14_siglip_gap_224"),
    "TIPSv2": (r"_tipsv2", "vit_base_patch14_reg1_tipsv2"),
    "EVA": (r"^eva_", "eva_large_patch14_196", "eva_giant_patch14_clip_224"),
    "EVA-02, also EVA02-CLIP": (r"^eva02_", "eva02_tiny_patch14_336", "eva02_base_patch14_448",
                                "eva02_large_patch14_clip_336"),
    "BEiT, BEiT v2": (r"^beit(v2)?_", "beit_base_patch16_224", "beitv2_large_patch16_224"),
    "BEiT-3": (r"^beit3_", "beit3_base_patch16_224"),
    "AIMv2": (r"^aimv2_", "aimv2_large_patch14_224"),
    "Perception Encoder": (r"_pe_", "vit_pe_core_base_patch16_224",
                           "vit_pe_spatial_tiny_patch16_512"),
    "RADIO": (r"_radio_", "vit_base_patch16_radio_v3"),
    "InternViT": (r"_intern300m_", "vit_intern300m_patch14_448"),
    "LingBot": (r"_lingbot", "vit_small_patch16_lingbot"),
    "Sapiens 2": (r"_sapiens2", "vit_base_patch16_sapiens2"),
    "RoPE-ViT": (r"_rope_.*naver", "vit_small_patch16_rope_224", "vit_base_patch16_rope_mixed_224"),
    "relative positions (timm's)": (r"_s?relpos_", "vit_relpos_base_patch16_224",
                                    "vit_srelpos_small_patch16_224"),
    "timm's small recipes (sbb)": (r"\.sbb", "vit_little_patch16_reg4_gap_256",
                                   "vit_so150m2_patch16_reg1_gap_384"),
}  # fmt: skip
"""What people call them: a pattern of ``name.tag``, and names to show."""
FOLDERS = {
    "vit": "google/vit-base-patch16-224",
    "deit": "facebook/deit-base-distilled-patch16-224",
    "dinov2": "facebook/dinov2-base",
    "dinov2_with_registers": "facebook/dinov2-with-registers-base",
    "dinov3_vit": "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "clip": "openai/clip-vit-base-patch32",
    "siglip": "google/siglip-base-patch16-224",
    "vit_mae": "facebook/vit-mae-base",
    "beit": "microsoft/beit-base-patch16-224",
    "data2vec-vision": "facebook/data2vec-vision-base",
}
"""model_type → a repository of the hub that people know."""
OTHERS = ("vit_base_patch16_224_miil", "vit_medium_patch16_gap_256", "vit_base_patch16_rpn_224")
HEAD = """\
<!-- Written by scripts/models_page.py from tocom_export/assets. -->
# Which models build

{names} names of timm {version} build, for which timm has {tags} pretrained weights; which files are
read says [checkpoints.md](checkpoints.md). Every other name of timm's is refused by the part that
can't be expressed, whether timm is installed or not:

```console
$ tocom-export build --model vit_small_r26_s32_224 --bank none
Error: vit_small_r26_s32_224: patch embedding HybridEmbed (convolutions) is not supported.
```
"""

ON_FOLDERS = """\
## A folder of Hugging Face's

Its `config.json` has a `model_type`. These are read as they lie, by `--checkpoint FOLDER`, and so
are folders that timm saved ([checkpoints.md](checkpoints.md#hugging-face-folders)). Of kinds below
that are not among them (AIMv2, EVA-02, I-JEPA, Perception Encoder, ...) timm's weights build.
"""


@dataclass(frozen=True)
class Lists:
    """What the files in the assets say."""

    version: str
    built: Mapping[str, tuple[VitSpec, tuple[str, ...]]]
    """Name → its spec and its pretrained tags."""
    refused: Mapping[str, Mapping[str, Mapping[str, int]]]
    """Class → part → name → how many pretrained weights it has."""

    @classmethod
    def read(cls) -> Lists:
        """Those that are there."""
        models: dict[str, Any] = parse_json((ASSETS / "models.json").read_bytes())
        others = parse_json((ASSETS / "unsupported_models.json").read_bytes())
        built = {name: (known_model(name)[0], tuple(models[name]["tags"])) for name in models}
        return cls(others["timm"], built, others["classes"])


def find_class(spec: VitSpec) -> str:
    """The class that timm makes a model of."""
    if spec.distilled:
        return "VisionTransformerDistilled"
    names = {"vit": "VisionTransformer", "eva": "Eva", "beit": "Beit"}
    return names.get(spec.family, "VisionTransformerRelPos")


def list_parts(spec: VitSpec) -> Iterator[str]:
    """What a model has beside a plain ViT's parts."""
    yield from ["distillation token"] * spec.distilled + ["registers"] * bool(spec.registers)
    yield from ["no class token"] * (not spec.class_token) + ["norm in front"] * spec.pre_norm
    if spec.rotary:
        learned = " (learned)" if spec.rotary.kind == "mixed" else ""
        yield f"rotary positions{learned}"
    if spec.relative:
        yield "relative positions" + " (MLP)" * (spec.relative != "table")
    yield from ["RMSNorm"] * (spec.norms == "rms") + ["SwiGLU"] * (spec.mlp != "plain")
    yield from ["LayerScale"] * spec.layer_scale + ["q and k normed"] * spec.qk_norm
    yield from ["norms behind the branches"] * spec.post_norm
    yield from ["norms within the branches"] * (spec.attention_norm or spec.mlp_norm)
    yield from ["attention pooling"] * (spec.pool == "map")


def format_table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(map(str, row)) for row in rows]
    titles = list(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *lines])


def format_kinds(lists: Lists) -> str:
    """A row for each kind that has a name of its own; the rest in the last one."""
    whole = {
        f"{name}.{tag}" if tag else name: name
        for name, (_, tags) in lists.built.items()
        for tag in tags or ("",)
    }
    rows, left = [], dict(whole)
    for kind, (pattern, *examples) in KINDS.items():
        found = {each: name for each, name in whole.items() if re.search(pattern, each)}
        rows.append(_describe_kind(lists, kind, found, examples))
        left = {each: name for each, name in left.items() if each not in found}
    rows.append(_describe_kind(lists, "others", left, OTHERS))
    return format_table(("kind", "names", "weights", "for example", "some or all have"), rows)


def _describe_kind(
    lists: Lists, kind: str, found: Mapping[str, str], examples: Iterable[str]
) -> list[object]:
    names = sorted({*found.values()})
    counts = Counter(part for name in names for part in list_parts(lists.built[name][0]))
    shown = ", ".join(f"`{name}`" for name in examples)
    weights = sum("." in each for each in found)
    return [kind, len(names), weights, shown, ", ".join(counts)]


def format_classes(lists: Lists) -> str:
    """A row for each of timm's classes of ViTs."""
    built: dict[str, list[int]] = defaultdict(list)
    for spec, tags in lists.built.values():
        built[find_class(spec)].append(len(tags))
    rows = []
    for kind, words in CLASSES.items():
        parts = lists.refused.get(kind, {})
        refused = sum(map(len, parts.values()))
        rows.append([f"`{kind}`", words, len(built[kind]) + refused, len(built[kind]),
                     sum(built[kind]), refused])  # fmt: skip
    titles = ("timm's class", "what it is", "names", "build", "weights of these", "refused")
    return format_table(titles, rows)


def format_refused(lists: Lists) -> str:
    """A row for each part for which a ViT is refused."""
    rows = []
    for kind in CLASSES:
        for part, names in sorted(lists.refused.get(kind, {}).items()):
            shown = ", ".join(f"`{name}`" for name in sorted(names))
            rows.append([part, len(names), sum(names.values()), shown])
    return format_table(("refused for", "names", "weights", "which"), rows)


def format_folders() -> str:
    """A row for each type of folder that is read."""
    return format_table(
        ("`model_type`", "such as"),
        [(f"`{kind}`", f"`{FOLDERS[kind]}`" if kind in FOLDERS else "") for kind in SUPPORTED],
    )


def format_page(lists: Lists | None = None) -> str:
    """The page, of the lists that are there."""
    lists = lists or Lists.read()
    tags = sum(len(tags) for _, tags in lists.built.values())
    others = {kind: parts for kind, parts in lists.refused.items() if kind not in CLASSES}
    count = sum(len(names) for parts in others.values() for names in parts.values())
    return "\n".join([
        HEAD.format(names=len(lists.built), tags=tags, version=lists.version),
        ON_FOLDERS,
        format_folders(),
        "",
        "## By kind\n",
        "`NAME.TAG` names weights, as in timm; a name may have weights of several kinds.\n",
        format_kinds(lists),
        "\n## By class\n",
        format_classes(lists),
        f"\nAnother {count} names are of {len(others)} other classes (ResNet, ConvNeXt, Swin, "
        "CaiT, XCiT, Hiera, ...),\nby which they are refused.\n",
        "## Refused ViTs\n",
        format_refused(lists),
        "\n## All names that build\n",
        ", ".join(f"`{name}`" for name in sorted(lists.built)) + ".",
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    PAGE.write_text(format_page(), "utf-8")

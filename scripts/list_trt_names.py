"""Write tests/engines/tensorrt/nvidia_names.json: of what we use, what NVIDIA's modules offer.

    python scripts/list_trt_names.py MODULE [NAME ...]

puts in the version of a module that can be imported here, for the names that the file has and
those given (``Builder.create_network``), which count as absent from other versions until these are
put in again. The module is tensorrt, tensorrt_rtx, or tensorrt_bindings out of a wheel of
``tensorrt-cu12-bindings``, which imports without TensorRT's libraries wherever others of their
names define the symbols that it looks for.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent.parent / "tests" / "engines" / "tensorrt" / "nvidia_names.json"
SIGNATURE = re.compile(r"^(?:\d+\. )?\w*\((?P<takes>.*)\) -> (?P<gives>.+)$", re.MULTILINE)
Names = dict[str, str | None]
"""A name → what it is: ``class``, ``-> bool`` (an attribute), ``(network, config) -> IHostMemory``
(a method; overloads are separated by ``|``, a parameter that may be left out has ``=``); None: it
isn't there."""


def describe(trt: Any, name: str) -> str | None:
    """What a name stands for in a module, by its docstring; see :data:`Names`."""
    found = trt
    for part in name.split("."):
        if (found := getattr(found, part, None)) is None:
            return None
    if isinstance(found, type):
        return "class"
    if not callable(found) and not isinstance(found, property):
        return f"-> {type(found).__name__}"  # a member of an enumeration
    text = found.fget.__doc__ if isinstance(found, property) else found.__doc__
    forms = [(name_parameters(f["takes"]), f["gives"]) for f in SIGNATURE.finditer(text)]
    if isinstance(found, property):
        return f"-> {shorten(forms[0][1])}"
    return " | ".join(sorted(f"({', '.join(takes)}) -> {shorten(gives)}" for takes, gives in forms))


def name_parameters(text: str) -> list[str]:
    """``self: Builder, flags: int = 0`` → ``flags=``."""
    while (flat := re.sub(r"\[[^\[\]]*\]|<[^<>]*>", "", text)) != text:
        text = flat  # commas within types and defaults are gone
    found = [part.strip() for part in text.split(",") if part.strip()]
    return [part.partition(":")[0] + "=" * ("=" in part) for part in found if part[:4] != "self"]


def shorten(type_name: str) -> str:
    """``List[tensorrt.tensorrt.Dims]`` → ``list[Dims]``; C++'s name of a class → Python's."""
    short = re.sub(r"\w+\.", "", type_name.strip()).replace("List[", "list[")
    return short.replace("nvonnxparser::IParserError", "ParserError")


def read(module: str) -> dict[str, Names]:
    """A module's versions, ascending → all the names that the file has."""
    entry = json.loads(OUT.read_text("utf-8")).get(module, {}) if OUT.exists() else {}
    found: dict[str, Names] = {}
    for version in entry.get("versions", ()):
        known = {n: f[version] for n, f in entry["names"].items() if version in f}
        found[version] = {**next(reversed(found.values()), {}), **known}
    return found


def compress(found: dict[str, Names]) -> dict[str, Any]:
    """An entry of the file: of each name the versions at which it changed."""
    versions = sorted(found, key=lambda v: [int(number) for number in re.findall(r"\d+", v)])
    names: dict[str, Names] = {}
    for name in sorted({name for known in found.values() for name in known}):
        forms = [found[version].get(name) for version in versions]
        changed = [True, *(now != before for before, now in pairwise(forms))]
        names[name] = {v: f for v, f, new in zip(versions, forms, changed, strict=True) if new}
    return {"versions": versions, "names": names}


def format_lines(document: dict[str, Any]) -> str:
    """The file's text, a line for each name."""
    entries = []
    for module, entry in document.items():
        names = (f"{json.dumps(name)}: {json.dumps(f)}" for name, f in entry["names"].items())
        inner = ",\n".join(names)
        versions = json.dumps(entry["versions"])
        entries.append(f'"{module}": {{\n"versions": {versions},\n"names": {{\n{inner}\n}}}}')
    return "{\n" + ",\n".join(entries) + "\n}\n"


def main(module: str, *new: str) -> None:
    """Put one version in; the others know nothing of the new names."""
    trt = importlib.import_module(module)
    entry = module.removesuffix("_bindings")
    found = read(entry)
    names = {*new, *(name for known in found.values() for name in known)}
    found[trt.__version__] = {name: describe(trt, name) for name in sorted(names)}
    document = json.loads(OUT.read_text("utf-8")) if OUT.exists() else {}
    document[entry] = compress(found)
    OUT.write_text(format_lines(document), "utf-8")
    print(f"{OUT.name}: {entry} {trt.__version__}, {len(names)} names")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What our code asks of NVIDIA's modules, held against what each version of them offers.

The table, nvidia_names.json, was read from NVIDIA's own modules by scripts/list_trt_names.py.
"""

from __future__ import annotations

import ast
import json
import re
import runpy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tocom_export.engines.tensorrt import building, refitter
from tocom_export.engines.tensorrt.building import PlanOptions

ROOT = Path(__file__).parents[3]
ROOM = sorted((ROOT / "engines" / "tensorrt").glob("*.py"))
FILES = [*ROOM, ROOT / "scripts" / "gpu_forms.py"]
TABLE = json.loads(Path(__file__).with_name("nvidia_names.json").read_text("utf-8"))

THEIRS = {
    "nvidia": "Nvidia", "trt": "trt", "builder": "Builder", "config": "IBuilderConfig",
    "engine": "ICudaEngine",
}  # fmt: skip
"""What parameters of ours stand for."""
OURS = {
    "open_library": "Nvidia", "open_engine": "ICudaEngine", "open_refitter": "Refitter",
    "_parse_graph": "INetworkDefinition", "_deserialize": "ICudaEngine",
    "refitter.open_engine": "ICudaEngine", "_configure": ("IBuilderConfig", ""),
}  # fmt: skip
"""What functions of ours return."""
OUR_OWN = {"ILogger.errors", "ILogger.tell"}
"""What our logger has beside theirs."""
NOT_THEIRS = {"severity", "cuda", "stream", "text", "status", "arguments", "later"}
"""Parameters that can be anything and aren't of their modules."""
SINCE = {
    "INetworkDefinition.mark_weights_refittable": (10, 2),
    "BuilderFlag.REFIT_INDIVIDUAL": (10, 2),
    "SerializationFlag.INCLUDE_REFIT": (10, 14),
}
"""Names that TensorRT has since a version, before which our code asks for none of them."""
RTX_ALONE = ("lane.py", "_configure")
"""A file and a function of it that only TensorRT-RTX gets to."""


@dataclass(frozen=True)
class Use:
    """A name of theirs in our code; of a call, also how it is called."""

    where: str
    name: str
    rtx_alone: bool
    positional: int | None = None
    keywords: tuple[str, ...] = ()
    starred: bool = False


def list_versions(module: str) -> list[tuple[str, dict[str, str | None]]]:
    """Each version, ascending, and what each name is there."""
    names: dict[str, str | None] = {}
    found = []
    for version in TABLE[module]["versions"]:
        names = names | {n: f[version] for n, f in TABLE[module]["names"].items() if version in f}
        found.append((version, names))
    return found


CASES = [(module, *version) for module in TABLE for version in list_versions(module)]
LATEST = {name: form for module in TABLE for name, form in list_versions(module)[-1][1].items()}
each_version = pytest.mark.parametrize(
    "module, version, names", CASES, ids=[f"{m} {v}" for m, v, _ in CASES]
)


def result_of(name: str) -> str | None:
    """What a method or an attribute gives, if that is a class of theirs."""
    gives = re.split(r" ?-> ", LATEST.get(name) or "")[-1]
    return gives if LATEST.get(gives) == "class" else None


class Collector(ast.NodeVisitor):
    """The uses in one file, found by following what each name stands for."""

    def __init__(self, file: Path) -> None:
        self.file, self.function = file, ""
        self.uses: list[Use] = []
        self.types: dict[str, str] = {}
        self.fields: dict[str, str] = {}
        self.visit(ast.parse(file.read_text("utf-8")))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.types |= {alias.asname or alias.name: "" for alias in node.names}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = self.types, self.function
        self.types, self.function = dict(self.types), node.name
        for argument in (*node.args.args, *node.args.kwonlyargs):
            self.types[argument.arg] = THEIRS.get(argument.arg, "")
        self.generic_visit(node)
        self.types, self.function = outer

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in filter(None, map(self.type_of, node.bases)):
            for inner in node.body:  # what they call must take what they give
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    name = f"{base.removeprefix('class ')}.{inner.name}"
                    self.note(inner, name, len(inner.args.args) - 1)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            several = target.elts if isinstance(target, ast.Tuple) else [target]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                found = [self.type_of(value) for value in node.value.elts]
            else:
                gives = self.type_of(node.value)
                found = gives if isinstance(gives, tuple) else [gives] * len(several)
            for name, value in zip(several, found, strict=True):
                place = self.fields if isinstance(name, ast.Attribute) else self.types
                place[ast.unparse(name)] = value or ""

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        owner = self.type_of(node.value)
        if owner and owner != "Nvidia" and self.join(owner, node.attr) not in OUR_OWN:
            self.note(node, self.join(owner, node.attr))

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        found = self.type_of(node.func) or ""
        kind, _, name = found.partition(" ")
        if kind in ("class", "method"):
            positional = sum(not isinstance(part, ast.Starred) for part in node.args)
            starred = positional < len(node.args)
            keywords = tuple(str(part.arg) for part in node.keywords)
            if kind == "class":
                name = f"{name}.__init__"
            elif name.endswith(".__init__"):
                positional -= 1  # of a class that is derived from theirs, self
            self.note(node, name, positional, keywords, starred)

    def note(self, node: ast.expr | ast.stmt, name: str, *how: Any) -> None:
        where, alone = f"{self.file.name}:{node.lineno}", (self.file.name, self.function)
        self.uses.append(Use(where, name, alone == RTX_ALONE, *how))

    def join(self, owner: str, attribute: str) -> str:
        return attribute if owner == "trt" else f"{owner.removeprefix('class ')}.{attribute}"

    def type_of(self, node: ast.AST) -> Any:
        """``class Builder``, ``Builder`` of an instance, ``method Builder.create_network``.

        A tuple of such for a function of ours that returns several; None of anything else.
        """
        text = ast.unparse(node)
        if isinstance(node, ast.IfExp):
            return self.type_of(node.body) or self.type_of(node.orelse)
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in OURS:
                return OURS[ast.unparse(node.func)]
            kind, _, name = (self.type_of(node.func) or "").partition(" ")
            return {"class": name, "method": result_of(name)}.get(kind)
        for known in (self.types, self.fields):
            if text in known:
                return known[text] or None
        if not isinstance(node, ast.Attribute) or not (owner := self.type_of(node.value)):
            return None
        if owner == "Nvidia":
            return {"trt": "trt", "logger": "ILogger"}.get(node.attr)
        name = self.join(owner, node.attr)
        form = LATEST.get(name) or ""
        if form == "class":
            return f"class {name}"
        return result_of(name) if form.startswith("->") else f"method {name}" if form else None


USES = [use for file in FILES for use in Collector(file).uses]


def fits(form: str, use: Use) -> bool:
    """Whether one of a method's overloads takes a call."""
    for overload in form.split(" | "):
        takes = [part for part in overload[1 : overload.rindex(")")].split(", ") if part]
        needed = sum(not part.endswith("=") for part in takes)
        given = use.positional + len(use.keywords)
        rest = {part.rstrip("=") for part in takes[use.positional :]}
        enough = use.starred or needed <= given
        if enough and given <= len(takes) and rest.issuperset(use.keywords):
            return True
    return False


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


@each_version
def test_all_that_we_ask_for_is_there(module: str, version: str, names: dict[str, str | None]):
    for use in USES:
        if module == "tensorrt" and (use.rtx_alone or number(version) < SINCE.get(use.name, (0,))):
            continue
        form = names.get(use.name)
        assert form, f"{use.where}: {module} {version} has no {use.name}"
        if use.positional is not None:
            assert fits(form, use), f"{use.where}: {module} {version} has {use.name}{form}"


@each_version
def test_what_we_ask_for_by_a_text(module: str, version: str, names: dict[str, str | None]):
    asked = {flag for refit in ("qkv", "all", "none", "identical") for flag in
             building._flags(PlanOptions(refit, strip=True, version_compatible=True))}  # fmt: skip
    assert len(asked) == 4
    wanted = {f"BuilderFlag.{flag}" for flag in asked}
    wanted |= {f"DataType.{kind}" for kind in refitter._TYPES.values()}
    for name in wanted:
        if module == "tensorrt-rtx" or number(version) >= SINCE.get(name, (0,)):
            assert names[name], name


def test_what_came_later_came_when_we_say():
    for version, names in list_versions("tensorrt"):
        for name, since in SINCE.items():
            assert bool(names[name]) == (number(version) >= since), (version, name)


def test_the_versions_that_we_claim_are_there():
    minors = {number(version) for version in TABLE["tensorrt"]["versions"]}
    assert minors >= {(10, minor) for minor in range(17)} | {(11, minor) for minor in range(5)}
    assert {number(version) for version in TABLE["tensorrt_rtx"]["versions"]} == {(1, 7)}


@pytest.mark.parametrize("module", TABLE)
def test_the_installed_module_is_as_the_table_says(module: str):
    trt = pytest.importorskip(module, exc_type=ImportError)
    script = runpy.run_path(str(ROOT / "scripts" / "list_trt_names.py"))
    known = dict(list_versions(module))
    if trt.__version__ not in known:
        pytest.skip(f"{trt.__version__} is none of {', '.join(known)}")
    for name, form in known[trt.__version__].items():
        assert script["describe"](trt, name) == form, name


def test_every_object_of_theirs_is_known():
    """A parameter that may be anything could hide one, whose uses would not be seen."""
    for file in ROOM:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.arg) and node.annotation is not None:
                loose = ast.unparse(node.annotation) == "Any"
                assert not loose or node.arg in {*THEIRS, *NOT_THEIRS}, (file.name, node.arg)


def test_a_wrong_use_is_seen(tmp_path: Path):
    file = tmp_path / "wrong.py"
    file.write_text(
        "def build(nvidia, config):\n"
        "    builder = nvidia.trt.Builder(nvidia.logger, 3)\n"
        "    config.set_flags(nvidia.trt.BuilderFlag.FP16)\n"
        "    parser = nvidia.trt.OnnxParser(builder.create_network(flag=1), logger=nvidia.logger)\n"
        "    return parser.parse_from_file('x').get\n"
    )
    found = {use.name: use for use in Collector(file).uses if use.positional is None}
    assert {"IBuilderConfig.set_flags", "BuilderFlag.FP16"} <= found.keys()
    calls = {use.name: use for use in Collector(file).uses if use.positional is not None}
    right = {name: fits(LATEST[name], use) for name, use in calls.items()}
    assert right == {
        "Builder.__init__": False, "Builder.create_network": False, "OnnxParser.__init__": True,
        "OnnxParser.parse_from_file": True,
    }  # fmt: skip


def test_the_collector_sees_what_we_do():
    found = {(use.where.split(":")[0], use.name) for use in USES}
    assert found >= {
        ("building.py", "Builder.__init__"), ("building.py", "Builder.create_network"),
        ("building.py", "INetworkDefinition.mark_weights_refittable"),
        ("building.py", "OnnxParser.parse_from_file"), ("building.py", "ParserError.desc"),
        ("building.py", "IBuilderConfig.progress_monitor"), ("building.py", "BuilderFlag.TF32"),
        ("building.py", "ITimingCache.serialize"),
        ("building.py", "IOptimizationProfile.set_shape"),
        ("building.py", "IProgressMonitor.step_complete"), ("library.py", "ILogger.log"),
        ("engine.py", "ICudaEngine.get_tensor_profile_shape"), ("engine.py", "DataType.FLOAT"),
        ("refitter.py", "Refitter.set_named_weights"), ("refitter.py", "Weights.size"),
        ("refitter.py", "ISerializationConfig.clear_flag"), ("refitter.py", "Weights.__init__"),
        ("refitter.py", "Runtime.engine_host_code_allowed"),
        ("lane.py", "IRuntimeConfig.cuda_graph_strategy"),
        ("lane.py", "IExecutionContext.execute_async_v3"),
        ("gpu_forms.py", "EngineInspector.get_engine_information"),
    }  # fmt: skip


def test_the_stand_in_offers_nothing_else(nvidia):
    """What it has that they don't would let wrong code pass everywhere else."""
    logger = nvidia.trt.ILogger()
    builder = nvidia.trt.Builder(logger)
    network, config = builder.create_network(2), builder.create_builder_config()
    stood_for = {"Builder": builder, "INetworkDefinition": network, "IBuilderConfig": config}
    parts = {f"{name}.{part}" for name, made in stood_for.items() for part in vars(type(made))}
    for part, made in vars(type(nvidia.trt)).items():
        members = vars(made) if isinstance(made, SimpleNamespace) else ()
        parts |= {part, *(f"{part}.{member}" for member in members)}
    for name in parts:
        if not name.rpartition(".")[2].startswith("_"):
            assert LATEST.get(name), name

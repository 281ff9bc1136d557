"""docs/models.md, held against the lists that it is made of."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm

from tocom_export.model.catalogue import known_model

ROOT = Path(__file__).parent.parent


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that writes the page."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("models_page")


def test_the_page_is_what_the_lists_give(page: ModuleType):
    written = page.PAGE.read_text("utf-8")
    assert written == page.format_page(), "run scripts/models_page.py"
    assert page.FOLDERS.keys() <= {*page.SUPPORTED}
    for linking in ("README.md", "docs/checkpoints.md"):
        assert "models.md" in (ROOT / linking).read_text("utf-8")


def test_every_model_is_counted_once(page: ModuleType):
    lists = page.Lists.read()
    refused = [n for parts in lists.refused.values() for names in parts.values() for n in names]
    names = [*lists.built, *refused]
    assert len(names) == len(set(names)) > 1000
    assert {page.find_class(spec) for spec, _ in lists.built.values()} <= page.CLASSES.keys()
    assert lists.refused.keys() & page.CLASSES.keys() >= {"VisionTransformer", "Eva", "NaFlexVit"}


def test_the_weights_are_timm_s(page: ModuleType):
    lists = page.Lists.read()
    if timm.__version__ != lists.version:
        pytest.skip(f"the lists are of timm {lists.version}")
    known = timm.list_pretrained()
    built = {f"{name}.{tag}" for name, (_, tags) in lists.built.items() for tag in tags}
    assert built == {each for each in known if each.split(".")[0] in lists.built}
    for parts in lists.refused.values():
        for names in parts.values():
            for name, count in names.items():
                assert count == sum(each.split(".")[0] == name for each in known)


def test_kinds_and_their_examples_are_there(page: ModuleType):
    rows = [line.split(" | ") for line in page.format_kinds(page.Lists.read()).splitlines()[2:]]
    assert len(rows) == len(page.KINDS) + 1
    for row in rows:
        assert int(row[1]) > 0, row[0]
    for name in (*page.OTHERS, *(name for _, *shown in page.KINDS.values() for name in shown)):
        assert known_model(name)[0].model == name


def test_another_list_is_another_page(page: ModuleType):
    lists = page.Lists.read()
    fewer = dict(list(lists.built.items())[1:])
    changed: Callable[..., Any] = page.Lists
    assert page.format_page(changed(lists.version, fewer, lists.refused)) != page.format_page()
    assert page.format_page(changed("9.9.9", lists.built, lists.refused)) != page.format_page()

"""Broken requests of all kinds; scripts/fuzz_server.py sends more of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tocom_export.bundle.opening import Bundle

SCRIPT = Path(__file__).parents[4] / "scripts" / "fuzz_server.py"


def test_broken_requests(bundle: Bundle):
    spec = importlib.util.spec_from_file_location("fuzz_server", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    said: list[str] = []
    found = script.fuzz(bundle.path, 300, say=said.append)
    assert said == []
    assert found["wrong"] == 0
    assert found["200"] > 20
    assert found["400"] > 50

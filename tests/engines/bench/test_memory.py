from __future__ import annotations

import json
import sys

import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.bench import memory
from tocom_export.engines.bench.memory import measure_variant
from tocom_export.engines.onnx.engine import OnnxEngine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says it")


def test_a_process_that_runs_one_variant(bundle: Bundle):
    taken = measure_variant(bundle.path, "r08", 2, threads=1)
    assert taken is not None
    assert 20_000_000 < taken < 200_000_000  # PyTorch alone would be more
    assert measure_variant(bundle.path, "r12", 2) is None  # no such variant


@pytest.mark.parametrize("threads", [None, 1])
def test_what_runs_in_it(bundle: Bundle, monkeypatch, capsys, threads: int | None):
    opened, ran = [], []

    class Engine(OnnxEngine):
        def __init__(self, *arguments, threads: int | None, **options) -> None:
            super().__init__(*arguments, threads=threads, **options)
            opened.append((self.variant.name, threads))

        def run(self, images):
            ran.append(images.shape)
            return super().run(images)

    monkeypatch.setattr("tocom_export.engines.onnx.engine.OnnxEngine", Engine)
    more = () if threads is None else (json.dumps({"threads": threads}),)
    monkeypatch.setattr(sys, "argv", ["memory", str(bundle.path), "r16", "3", *more])
    memory.main()
    assert int(capsys.readouterr().out) > 0
    assert opened == [("r16", threads)]
    assert ran == [(3, 3, 56, 56)]

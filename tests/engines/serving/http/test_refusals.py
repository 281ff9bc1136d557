"""What is said of this machine's paths: nothing."""

from __future__ import annotations

import pytest

from tocom_export.engines.serving.http.refusals import hide_paths, refuse
from tocom_export.errors import BundleError, ImageError, PoolError


@pytest.mark.parametrize(
    "text, said",
    [
        ("/a/b/c.safetensors: no such file.", "c.safetensors: no such file."),
        ("it is in '/a/b/c', not (/d/e).", "it is in 'c', not (e)."),
        ("C:\\a\\b\\c.onnx is damaged.", "c.onnx is damaged."),
        ("/srv/my models/x has no plan", "deit has no plan"),
        ("and/or 1/2 of models/x", "and/or 1/2 of models/x"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
    ],
)
def test_paths(text: str, said: str):
    assert hide_paths(text, {"/srv/my models/x": "deit"}) == said


def test_statuses():
    assert refuse(ImageError("`x` is wrong")).status == 400
    assert refuse(ImageError("`x` is wrong")).text == "'x' is wrong"
    assert refuse(PoolError("closed")).status == 409
    assert refuse(BundleError("gone")).status == 500

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tocom_export.errors import DataError
from tocom_export.training.data.opening import open_images

# timm leaves image files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def test_one_class_only(tmp_path: Path, image_folder: Callable[..., Path]):
    with pytest.raises(DataError, match=r"one class only \('a'\).*of the class folders\?"):
        open_images(image_folder(tmp_path / "images", ("a",)))


def test_a_path_goes_before_a_name(
    tmp_path: Path, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    image_folder(tmp_path / "torch" / "flowers", each=1)
    monkeypatch.chdir(tmp_path)
    assert len(open_images("torch/flowers")) == 2

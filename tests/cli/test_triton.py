from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from click.testing import Result
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

Run = Callable[..., Result]
PAGE = (Path(__file__).parents[2] / "docs" / "triton.md").read_text("utf-8")


def config_of(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), pb.ModelConfig())


def test_a_repository(succeeds: Run, bundle: Path, here: Path):
    result = succeeds("triton", bundle, "models", "--json")
    document = json.loads(result.stdout)
    assert (document["bundle"], document["repository"]) == (str(bundle), "models")
    assert document["backend"] == "onnxruntime"
    eight = document["models"][1]
    assert [model["name"] for model in document["models"]] == ["tiny_r04", "tiny_r08"]
    assert (eight["variant"], eight["max_batch"]) == ("r08", 32)
    assert eight["files"] == {
        f"tiny_r08/{name}": (here / "models" / "tiny_r08" / name).stat().st_size
        for name in (
            "1/model.onnx", "1/r08.safetensors", "1/weights.safetensors", "config.pbtxt",
            "labels.txt",
        )
    }  # fmt: skip
    assert config_of(here / "models" / "tiny_r04").backend == "onnxruntime"
    assert "Wrote models" in result.stderr


def test_the_options_reach_the_configuration(succeeds: Run, bundle: Path, here: Path):
    succeeds(
        "triton", bundle, "models", "--variants", "8", "--name", "mine", "--device", "gpu",
        "--max-batch", 16, "--instances", 2, "--max-delay-ms", 2.5,
    )  # fmt: skip
    (model,) = (here / "models").iterdir()
    found = config_of(model)
    assert (model.name, found.name, found.max_batch_size) == ("mine_r08", "mine_r08", 16)
    (group,) = found.instance_group
    assert (group.count, group.kind) == (2, pb.ModelInstanceGroup.KIND_GPU)
    assert found.dynamic_batching.max_queue_delay_microseconds == 2500
    succeeds(
        "triton", bundle, "models", "--variants", 8, "--threads", 3, "--force", "--name", "mine"
    )
    found = config_of(model)
    assert found.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU
    assert found.parameters["intra_op_thread_count"].string_value == "3"


def test_a_variant_with_a_degree_per_layer(succeeds: Run, model, here: Path):
    succeeds("build", *model, "--targets", "8", "--schedule", "fast=6,2,1,0", "--out", "named")
    document = json.loads(succeeds("triton", "named", "models", "--json").stdout)
    assert [(m["name"], m["variant"]) for m in document["models"]] == [
        ("tiny_r08", "r08"), ("tiny_fast", "fast")
    ]  # fmt: skip
    assert config_of(here / "models" / "tiny_fast").name == "tiny_fast"
    succeeds("triton", "named", "models", "--variants", "fast", "--force")
    assert [folder.name for folder in (here / "models").iterdir()] == ["tiny_fast"]


def test_a_repository_of_a_pool(succeeds: Run, bundle: Path, here: Path):
    result = succeeds(
        "triton", bundle, "models", "--backend", "python", "--slo-ms", 50, "--control",
        "--runtime", "onnx", "--threads", 1, "--json",
    )  # fmt: skip
    document = json.loads(result.stdout)
    assert document["backend"] == "python"
    (model,) = document["models"]
    assert (model["name"], model["variant"], model["max_batch"]) == ("tiny", None, 32)
    assert "tiny/1/bundle/manifest.json" in model["files"]
    values = {k: v.string_value for k, v in config_of(here / "models/tiny").parameters.items()}
    given = {"slo_ms": "50", "control": "on", "runtime": "onnx", "threads": "1"}
    assert given.items() <= values.items()
    plain = succeeds("triton", bundle, "some", "--backend", "python", "--variants", 8)
    assert "by request" in plain.stdout
    assert not (here / "some/tiny/1/bundle/r04.onnx").exists()


def test_how_much_is_said(succeeds: Run, bundle: Path):
    plain = succeeds("triton", bundle, "plain")
    (row,) = (line for line in plain.stdout.splitlines() if line.startswith("tiny_r08"))
    assert row.split()[:3] == ["tiny_r08", "r08", "32"]
    assert "model.onnx" not in plain.stderr
    assert "loud/tiny_r08/1/model.onnx" in succeeds("triton", bundle, "loud", "-v").stderr
    assert succeeds("triton", bundle, "quiet", "-q").stderr == ""


def test_another_repository_in_its_place(succeeds: Run, fails: Run, bundle: Path, here: Path):
    succeeds("triton", bundle, "models")
    fails("triton", bundle, "models", says=("models exists", "--force"))
    succeeds("triton", bundle, "models", "--variants", "4", "--force")
    assert [folder.name for folder in (here / "models").iterdir()] == ["tiny_r04"]
    (here / "models" / "mine.txt").touch()
    fails("triton", bundle, "models", "--force", says=("models holds other files", "remove it"))


@pytest.mark.parametrize(
    "options, says",
    [
        (("--variants", "8,12"), ("no variant r12", "r04, r08")),
        (("--variants", "x"), ("no variant x", "r04, r08")),
        (("--variants", "8,"), ("--variants",)),
        (("--backend", "tensorrt"), ("no plan for r04", "tocom-export build")),
        (("--backend", "tensorrt", "--device", "cpu"), ("--device cpu", "GPU")),
        (("--backend", "tensorrt", "--threads", 2), ("--threads is for graphs on a CPU",)),
        (("--device", "gpu", "--threads", 2), ("--threads is for a CPU", "--device cpu")),
        (("--runtime", "onnx"), ("--runtime is for --backend python",)),
        (("--slo-ms", 5), ("--slo-ms is for --backend python",)),
        (("--control",), ("--control is for --backend python",)),
        (("--backend", "python", "--slo-ms", 0), ("--slo-ms 0",)),
        (("--backend", "python", "--instances", 2), ("--instances 2", "--threads")),
        (("--backend", "python", "--runtime", "tensorrt"), ("no plan for r04",)),
        (("--name", "a b"), ("--name 'a b'",)),
        (("--max-batch", 0), ("--max-batch",)),
        (("--max-batch", 2**31), ("--max-batch",)),
        (("--instances", 0), ("--instances",)),
        (("--threads", 0), ("--threads",)),
        (("--max-delay-ms", "inf"), ("--max-delay-ms inf", "a minute")),
    ],
    ids=str,
)
def test_bad_input(fails: Run, bundle: Path, here: Path, options: Any, says: tuple[str, ...]):
    fails("triton", bundle, "models", *options, says=says)
    assert list(here.iterdir()) == []


def test_no_bundle(fails: Run):
    fails("triton", "none", "models", says=("none is not a bundle",))


def test_without_tritonclient(fails: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "tritonclient.grpc")
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    says = ("tritonclient is not installed", "pip install 'tocom-export[triton]'")
    fails("triton", bundle, "models", says=says)


class Server:
    """A Triton that answers from a repository, by ONNX Runtime."""

    def __init__(self, folder: Path, run_graph: Callable[..., Any]) -> None:
        self._folder, self._run = folder, run_graph

    def get_model_config(self, model: str) -> Any:
        return SimpleNamespace(config=config_of(self._folder / model))

    def infer(self, model: str, inputs: Any, outputs: Any) -> Any:
        config, (images,), (wanted,) = config_of(self._folder / model), inputs, outputs
        assert (images.name(), wanted.name()) == (config.input[0].name, config.output[0].name)
        assert images.datatype() == "FP32"
        assert images.shape()[1:] == list(config.input[0].dims)
        content = np.frombuffer(images._get_content(), np.float32).reshape(images.shape())
        logits = self._run(self._folder / model / "1" / "model.onnx", content)
        count = wanted._get_tensor().parameters["classification"].int64_param
        file = self._folder / model / config.output[0].label_filename
        labels = file.read_text("utf-8").splitlines()
        rows = [
            [f"{row[i]}:{i}:{labels[i]}".encode() for i in row.argsort()[::-1][:count]]
            for row in logits
        ]
        return SimpleNamespace(as_numpy={wanted.name(): np.array(rows, object)}.get)


def test_the_page_s_commands_and_client(
    succeeds: Run, photos: Path, here: Path, capsys, run_graph, monkeypatch: pytest.MonkeyPatch
):
    """What the client prints is what ``run`` says of the same image."""
    for line in re.findall(r"^\$ tocom-export (.*)$", PAGE, re.M):
        extra = ["--no-verify"] if line.startswith("build") else []
        succeeds(*shlex.split(line), *extra)
    (photos / "a" / "0.png").rename(here / "cat.png")
    document = succeeds("run", "reference-source0", "--variant", "8", "cat.png", "--json").stdout
    classes = json.loads(document)["images"][0]["classes"]

    server = Server(here / "models", run_graph)
    monkeypatch.setattr(triton, "InferenceServerClient", lambda url: server)
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    exec(compile(example, "docs/triton.md", "exec"), {})
    lines = [line.split(":") for line in capsys.readouterr().out.splitlines()]
    assert [(int(i), name) for _, i, name in lines] == [(c["index"], c["name"]) for c in classes]

"""NVIDIA's Triton without a container or a GPU, from the package nvidia-pytriton.

The package (0.7.0; Linux on x86-64, glibc 2.35 or later) holds Triton 2.51 with its Python backend
and no other. The environment that it is in is the one that models run in::

    python3 -m venv triton-env
    triton-env/bin/pip install nvidia-pytriton==0.7.0 'numpy<2' '.[cpu,triton]'

TOCOM_TRITON=triton-env names it to tests/engines/serving/test_triton_server.py.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).parents[1]
_LOOK = """
import importlib.metadata, json, sys
files = importlib.metadata.files("nvidia-pytriton")
binary = next(f for f in files if f.name == "tritonserver" and f.parent.name == "bin").locate()
print(json.dumps([str(binary), ".".join(map(str, sys.version_info[:2]))]))
"""


class Missing(Exception):
    """There is no Triton to run here, and why."""


@dataclass(frozen=True)
class Server:
    """A Triton that runs."""

    http: str
    grpc: str
    metrics: str
    process: subprocess.Popen[bytes]
    log: Path

    def find_model_processes(self) -> list[int]:
        """Those of the Python backend."""
        task = Path(f"/proc/{self.process.pid}/task")
        children = [file.read_text().split() for file in task.glob("*/children")]
        return [int(pid) for found in children for pid in found]


def find_environment() -> Path:
    """The environment that TOCOM_TRITON names, or this one; Missing where it holds no Triton."""
    named = os.environ.get("TOCOM_TRITON")
    environment = Path(named).absolute() if named else Path(sys.prefix)
    find_binary(environment)
    return environment


def find_binary(environment: Path) -> tuple[Path, str]:
    """The server's program, and the environment's version of Python."""
    python = environment / "bin" / "python"
    done = subprocess.run([python, "-c", _LOOK], capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"{environment} has no nvidia-pytriton; scripts/triton_server.py says how")
    binary, version = json.loads(done.stdout)
    return Path(binary), version


@contextmanager
def run_triton(
    environment: Path, repository: Path, folder: Path, *options: str, seconds: float = 120
) -> Iterator[Server]:
    """Triton on a repository, ready.

    Args:
        folder: for its log and its backends, an own one.
        options: of ``tritonserver``.
        seconds: how long it may take to be ready.

    Raises:
        Missing: no such package.
        RuntimeError: it ended, or isn't ready in time; the end of its log.
    """
    binary, version = find_binary(environment)
    home = binary.parents[1]  # with Python's backend apart from what runs it, one for each version
    backends = folder / "backends"
    shutil.copytree(home / "backends", backends)
    stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy2(stub, backends / "python")
    http, grpc, metrics = _find_ports(3)
    command = [
        binary, f"--model-repository={repository}", f"--backend-directory={backends}",
        "--http-address=127.0.0.1", f"--http-port={http}",
        "--grpc-address=127.0.0.1", f"--grpc-port={grpc}",
        "--metrics-address=127.0.0.1", f"--metrics-port={metrics}",
        f"--backend-config=python,shm-region-prefix-name=tocom{os.getpid()}_{http}",
        *options,
    ]  # fmt: skip
    env = {
        **os.environ,
        "LD_LIBRARY_PATH": str(binary.parents[3] / "nvidia_pytriton.libs"),
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    log = folder / "triton.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=env, stdout=stream, stderr=subprocess.STDOUT,
            cwd=ROOT,  # models import from it before all else, and ignore PYTHONPATH
        )  # fmt: skip
    local = "127.0.0.1"
    server = Server(f"{local}:{http}", f"{local}:{grpc}", f"{local}:{metrics}", process, log)
    try:
        _wait(server, seconds)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: Server, seconds: float) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            urlopen(f"http://{server.http}/v2/health/ready", timeout=5).close()
            return
        except (URLError, OSError):
            if server.process.poll() is not None or time.monotonic() > until:
                text = server.log.read_text("utf-8", "replace")
                raise RuntimeError(f"Triton isn't ready:\n{text[-4000:]}") from None
            time.sleep(0.1)


def _find_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    found = [socket.socket() for _ in range(count)]
    for each in found:
        each.bind(("127.0.0.1", 0))
    ports: list[int] = [each.getsockname()[1] for each in found]
    for each in found:
        each.close()
    return ports

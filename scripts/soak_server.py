"""A server under more load than it can serve, with clients that misbehave, for a while.

python scripts/soak_server.py [--seconds 600] [--clients 12] [--queue 32]

Serves the model inside the package by `tocom-export serve`. Clients ask without pause: most of them
properly, and each answer is held against an engine of the variant, source and scale that it says it
is of; others hang up while they wait, or send what is no request. An administrator switches, refits
(some of which must fail) and reloads. Prints what was counted as JSON, and exits with 1 if an
answer was wrong, a request got none within a minute, the queue was longer than it may be, the
server's own memory grew by more than a hundredth, or it didn't end at SIGTERM.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tritonclient.http as triton

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.verify import sample_images
from tocom_export.exporting import export
from tocom_export.io.memory import read_own_memory

GROWTH = 0.01
TARGETS, SCALES = (0, 8, 16), (0.1, 0.2)
PATIENCE = 60.0
"""Seconds that an answer may take."""
TOKEN = "soak-server-token"
OTHERS = {503, 504}
"""Statuses that a proper request may get in place of an answer."""


class Soak:
    """What is asked, what must come back, and what was counted."""

    def __init__(self, folder: Path, queue: int) -> None:
        self.folder, self.queue = folder, queue
        self.images = sample_images(Bundle.open(self._build(SCALES[0])).spec, 2)
        self.wanted: dict[tuple[str, float], np.ndarray[Any, Any]] = {}
        for scale in SCALES:
            bundle = Bundle.open(self._build(scale))
            for name in bundle.variants:
                self.wanted[name, scale] = bundle.engine(name, threads=1).run(self.images)
        self.count: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.failures: list[str] = []
        self.memory: list[int] = []
        self.longest = 0

    def _build(self, scale: float) -> Path:
        place = self.folder / f"scale{scale:g}"
        if not place.exists():
            export(out=place, targets=TARGETS, scale=scale, verify=False)
        return place

    def start(self) -> None:
        """Start the server, and wait until it is ready."""
        token = self.folder / "token"
        token.write_text(TOKEN)
        line = [
            sys.executable,
            "-m",
            "tocom_export.cli.main",
            "serve",
            f"m={self._build(SCALES[0])}",
        ]
        line += ["--port", "0", "--queue", str(self.queue), "--slo-ms", "50", "--threads", "1"]
        line += ["--admin-token-file", str(token), "-q"]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = next(said for said in self.process.stdout if said.startswith("Serving "))
        self.address = said.split("//")[1].strip()
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        tensor = triton.InferInput("images", list(self.images.shape), "FP32")
        tensor.set_data_from_numpy(self.images)
        wanted = triton.InferRequestedOutput("logits", binary_data=False)
        self.body, length = triton.InferenceServerClient.generate_request_body(
            [tensor], outputs=[wanted]
        )
        self.length = str(length)

    def ask(self, until: float, seed: int) -> None:
        """One client: mostly proper requests, some that are broken, some that hang up."""
        dice, count = random.Random(seed), Counter[str]()
        while time.monotonic() < until:
            kind = dice.choices(("proper", "broken", "gone"), (0.86, 0.07, 0.07))[0]
            try:
                count[getattr(self, f"_ask_{kind}")(dice)] += 1
            except Exception as error:
                count["lost"] += 1
                self.failures.append(f"{kind}: {type(error).__name__}: {error}")
        with self.lock:
            self.count.update(count)

    def _post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE)
        try:
            connection.request("POST", path, body, headers)
            found = connection.getresponse()
            return found.status, json.loads(found.read())
        finally:
            connection.close()

    def _ask_proper(self, dice: random.Random) -> str:
        version = dice.choice(("", "", "/versions/r08"))
        headers = {"Inference-Header-Content-Length": self.length}
        status, answer = self._post(f"/v2/models/m{version}/infer", self.body, headers)
        if status != 200:
            return "refused" if status in OTHERS else self._fail(f"status {status}: {answer}")
        told, (output,) = answer["parameters"], answer["outputs"]
        logits = np.reshape(output["data"], output["shape"])
        wanted = self.wanted[told["variant"], told["scale"]]
        right = np.allclose(logits, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
        return "right" if right else self._fail(f"wrong logits of {told}", "wrong")

    def _ask_broken(self, dice: random.Random) -> str:
        cut = self.body[: dice.randrange(1, len(self.body))]
        status, answer = self._post("/v2/models/m/infer", cut, {"Content-Type": "application/json"})
        if 400 <= status < 500 or status in OTHERS:
            return "broken ones refused"
        return self._fail(f"a broken request got status {status}: {answer}")

    def _ask_gone(self, dice: random.Random) -> str:
        host, port = self.address.split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
            head = f"POST /v2/models/m/infer HTTP/1.1\r\nHost: {host}\r\n"
            head += f"Inference-Header-Content-Length: {self.length}\r\n"
            head += f"Content-Length: {len(self.body)}\r\n\r\n"
            whole = head.encode() + self.body
            connection.sendall(whole if dice.random() < 0.5 else whole[: len(whole) // 2])
            time.sleep(dice.random() * 0.02)
        return "hung up"

    def _fail(self, text: str, kind: str = "wrong statuses") -> str:
        self.failures.append(text)
        return kind

    def rule(self, until: float) -> None:
        """The administrator; it also looks at the queue and at the server's memory."""
        dice = random.Random(0)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        rollup = Path(f"/proc/{self.process.pid}/smaps_rollup")
        while time.monotonic() < until:
            time.sleep(dice.expovariate(2))
            what = dice.choice(("switch", "switch", "steer", "refit", "refit", "fail", "reload"))
            body = {
                "switch": {"variant": dice.choice(("r00", "r08", "r16"))},
                "steer": {"variant": None}, "refit": {"scale": dice.choice(SCALES)},
                "fail": {"checkpoint": "/nowhere"}, "reload": {},
            }[what]  # fmt: skip
            name = {"steer": "switch", "fail": "refit"}.get(what, what)
            place = f"/admin/models/m/{name}"
            status, answer = self._post(place, json.dumps(body).encode(), headers)
            if (status == 200) == (what == "fail"):
                self.failures.append(f"{what}: status {status}: {answer}")
            self.count[what] += 1
            if (memory := read_own_memory(rollup)) is not None:
                self.memory.append(memory)
            connection = http.client.HTTPConnection(self.address, timeout=PATIENCE)
            connection.request("GET", "/stats")
            (model,) = json.loads(connection.getresponse().read())["models"]
            connection.close()
            self.longest = max(self.longest, model["queue"]["images"])

    def stop(self) -> int:
        """The server's exit status, once it was told to end."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


def main() -> int:
    """Run, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--queue", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), options.queue)
        soak.start()
        try:
            until = time.monotonic() + options.seconds
            threads = [
                threading.Thread(target=soak.ask, args=(until, seed))
                for seed in range(options.clients)
            ]
            threads.append(threading.Thread(target=soak.rule, args=(until,)))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(options.seconds + 2 * PATIENCE)
            stuck = sum(thread.is_alive() for thread in threads)
        finally:
            status = soak.stop()
    parts = min(10, len(soak.memory))
    ends = [len(soak.memory) * n // parts for n in range(parts + 1)]
    tenths = [median(soak.memory[start:end]) for start, end in pairwise(ends)]
    growth = tenths[-1] / tenths[1] - 1 if len(tenths) > 2 else None
    print(
        json.dumps(
            {
                **soak.count, "stuck clients": stuck, "longest queue": soak.longest,
                "own memory, MB, by tenths": [round(t / 1e6, 1) for t in tenths],
                "growth": growth, "exit status": status, "failures": soak.failures[:20],
            },
            indent=1,
        )
    )  # fmt: skip
    bad = soak.failures or stuck or soak.longest > options.queue + len(soak.images)
    return int(bool(bad or status != 130 or (growth or 0) > GROWTH))


if __name__ == "__main__":
    sys.exit(main())

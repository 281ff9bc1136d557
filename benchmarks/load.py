"""Load for a server of the Open Inference Protocol: ours, NVIDIA's Triton, KServe's.

python benchmarks/load.py http://127.0.0.1:8000 --model reference-source0 --rate 20 --slo-ms 250
       [--shape poisson|gamma|burst|ramp|diurnal] [--cv 4] [--duration 60] [--seed 0]
       [--trace FILE] [--record FILE] [--bundle DIR] [--timeout 30] [--json]

Requests of one image are sent when their time has come, whatever has become of those before (open
loop), and latency counts from that time on. burst, ramp and diurnal are multiples of --rate: 0.5
and 1.5 in turns, 0.2 to 1.7, 0.1 to 1.2 and back. A trace holds a time of arrival in seconds on
each line; with --rate it is stretched to that. --record writes one, of when requests were sent.

A request that fails, or isn't answered within --timeout, is not in time. What answered is read
from the answer's parameters (``variant``), else from the end of the model's name
(``reference_r08``). The exit status is 1 where no request was answered.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.serving.arrivals import (
    TRACES,
    Arrivals,
    draw_gamma,
    draw_poisson,
    read_arrivals,
)
from tocom_export.engines.serving.simulation import summarise_requests
from tocom_export.errors import TocomError

SHAPES = ("poisson", "gamma", "burst", "ramp", "diurnal")
LENGTH = "Inference-Header-Content-Length"
IMAGES = 8
"""Different images that are sent in turns."""


@dataclass(frozen=True)
class Answer:
    """What became of a request."""

    sent: float
    """Seconds since the beginning."""
    latency: float
    """Seconds since it was due; infinite where it failed."""
    variant: str = ""
    failure: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Send, and print what became of it."""
    options = parse(arguments)
    try:
        arrivals = draw(options)
        accuracy = Bundle.open(options.bundle).accuracy if options.bundle else {}
    except TocomError as error:
        sys.exit(str(error))
    if not len(arrivals):
        sys.exit("no request is due in that time; raise --rate or --duration.")
    answers = asyncio.run(send(options, arrivals))
    if options.record:
        times = sorted(answer.sent for answer in answers)
        options.record.write_text("".join(f"{t - times[0]:.6f}\n" for t in times), "utf-8")
    found = summarise(answers, arrivals, options.slo_ms / 1000, accuracy)
    try:
        print(json.dumps(found, indent=1) if options.json else describe(found, options.slo_ms))
        sys.stdout.flush()
    except BrokenPipeError:  # as of ``| head``; or Python would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if found["answered"] else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--model", required=True)
    parser.add_argument("--shape", choices=SHAPES, default="poisson")
    parser.add_argument("--rate", type=float, help="requests a second")
    parser.add_argument("--cv", type=float, default=4.0, help="of gamma: 1 is poisson")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slo-ms", type=float, required=True, help="latency wanted")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds")
    parser.add_argument("--trace", type=Path, help="arrivals, seconds, one a line")
    parser.add_argument("--record", type=Path, help="write such a file")
    parser.add_argument("--bundle", type=Path, help="whose accuracies are known")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.rate is None and options.trace is None:
        parser.error("--rate or --trace says when requests are sent")
    numbers = (
        "duration",
        "slo_ms",
        "timeout",
        "cv",
        *(["rate"] if options.rate is not None else []),
    )
    for name in numbers:
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} is a positive number")
    return options


def draw(options: argparse.Namespace) -> Arrivals:
    """When requests are due, seconds from the beginning."""
    rate, seconds, seed = options.rate, options.duration, options.seed
    if options.trace:
        times = read_arrivals(options.trace)
        return times if rate is None else times * len(times) / (rate * max(times[-1], 1e-9))
    if options.shape == "gamma":
        return draw_gamma(rate, options.cv, seconds, seed)
    multiple = TRACES.get(options.shape, np.ones_like)
    return draw_poisson(lambda t: rate * multiple(t), seconds, seed)


async def send(options: argparse.Namespace, arrivals: Arrivals) -> list[Answer]:
    """Send each request at its time; done when all have been answered or have failed."""
    place = f"{options.url.rstrip('/')}/v2/models/{options.model}"
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=options.timeout)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        bodies = await make_bodies(session, place, options.seed)
        begin, tasks = time.perf_counter(), []
        for number, due in enumerate(arrivals.tolist()):
            await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
            head, body = bodies[number % len(bodies)]
            task = ask(session, f"{place}/infer", head, body, begin, due)
            tasks.append(asyncio.create_task(task))
        return list(await asyncio.gather(*tasks))


async def make_bodies(
    session: aiohttp.ClientSession, place: str, seed: int
) -> list[tuple[dict[str, str], bytes]]:
    """Headers and bodies of some requests, as the model's metadata ask for them."""
    try:
        async with session.get(place) as answer:
            if answer.status == 404:
                sys.exit(f"{place}: no such model; {await list_models(session, place)}.")
            answer.raise_for_status()
            (wanted,) = json.loads(await answer.read())["inputs"]
    except (aiohttp.ClientError, asyncio.TimeoutError, KeyError, ValueError) as error:
        sys.exit(f"{place}: no metadata of a model with one input: {error or type(error)}.")
    if wanted["datatype"] != "FP32" or any(size < 1 for size in wanted["shape"][1:]):
        sys.exit(f"{place}: FP32 of a known shape is expected: {wanted}.")
    shape, rng, bodies = [1, *wanted["shape"][1:]], np.random.default_rng(seed), []
    for _ in range(IMAGES):
        data = rng.standard_normal(shape, np.float32).tobytes()
        tensor = {"name": wanted["name"], "shape": shape, "datatype": "FP32"}
        tensor["parameters"] = {"binary_data_size": len(data)}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        headers = {LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}
        bodies.append((headers, head + data))
    return bodies


async def list_models(session: aiohttp.ClientSession, place: str) -> str:
    """What a server has, as far as it says."""
    index = f"{place.rpartition('/models/')[0]}/repository/index"
    async with session.post(index, data=b"{}") as answer:
        if answer.status != 200:
            return "the server doesn't say which there are"
        names = dict.fromkeys(entry["name"] for entry in json.loads(await answer.read()))
    return f"there are {', '.join(names) or 'none'}"


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    begin: float,
    due: float,
) -> Answer:
    """One request."""
    sent = time.perf_counter() - begin
    try:
        async with session.post(url, data=body, headers=headers) as answer:
            content = await answer.read()
            latency = time.perf_counter() - begin - due
            if answer.status != 200:
                return Answer(sent, math.inf, failure=f"status {answer.status}")
            document = json.loads(content[: int(answer.headers.get(LENGTH, len(content)))])
            return Answer(sent, latency, find_variant(document))
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
        return Answer(sent, math.inf, failure=type(error).__name__)


def find_variant(document: Mapping[str, Any]) -> str:
    """What answered."""
    named = (document.get("parameters") or {}).get("variant")
    return str(named or document.get("model_name", "?").rpartition("_")[2])


def summarise(
    answers: Sequence[Answer], arrivals: Arrivals, slo: float, accuracy: Mapping[str, float]
) -> dict[str, Any]:
    """Shares and latencies are of requests that were answered, ``met`` of all."""
    answered = [answer for answer in answers if not answer.failure]
    lags = [answer.sent - due for answer, due in zip(answers, arrivals.tolist(), strict=True)]
    found: dict[str, Any] = {
        "sent": len(answers),
        "answered": len(answered),
        "failures": dict(Counter(answer.failure for answer in answers if answer.failure)),
        "rate": len(answers) / max(float(arrivals[-1]), 1e-9),
        "lag_ms": 1000 * float(np.quantile(lags, 0.99)),
    }
    if answered:
        latencies, variants = [a.latency for a in answered], [a.variant for a in answered]
        outcome = dataclasses.asdict(summarise_requests(latencies, variants, slo, accuracy))
        del outcome["requests"]
        found |= outcome
        found["met"] *= len(answered) / len(answers)
    return found


def describe(found: Mapping[str, Any], slo_ms: float) -> str:
    """A few lines."""
    failures = ", ".join(f"{count} of {name}" for name, count in found["failures"].items())
    sent = f"{found['sent']} requests, {found['rate']:.1f} a second"
    lines = [f"{sent}; failed: {failures or 'none'}"]
    if found["answered"]:
        shares = ", ".join(f"{name} {share:.1f} %" for name, share in found["shares"].items())
        times = ", ".join(f"{share} % {found[f'p{share}_ms']:.1f}" for share in (50, 95, 99))
        lines += [
            f"within {slo_ms:g} ms: {found['met']:.2f} %",
            f"ms within which were answered: {times}",
            f"by: {shares}; {found['switches']} changes",
        ]
        if found["accuracy"] is not None:
            lines.append(f"mean accuracy of what answered: {found['accuracy']:.2f} %")
    if found["lag_ms"] > 5:
        lines.append(f"The client was late itself by {found['lag_ms']:.0f} ms (99 %): it is busy.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""``tocom-export serve``."""

from __future__ import annotations

import ipaddress
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from ..options import FILE, FiniteFloat, common_options, take_output
from ..output import Command, make_harmless
from ..runtime_options import run_options

POLICIES = ("steering", "slackfit", "fixed")


@click.command("serve", cls=Command)
@click.argument("bundles", nargs=-1, required=True, metavar="[NAME=]BUNDLE...")
@click.option("--host", default="127.0.0.1", help="Address; 0.0.0.0 is all of this machine's.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="0 is any free one.")
@click.option(
    "--slo-ms",
    type=FiniteFloat(),
    metavar="T",
    help="Latency wanted; default of a policy by load: six times what the slowest variant takes.",
)
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    help="What chooses the variant; default: steering, or fixed with --variant.",
)
@click.option("--variant", help="The one to serve; default of --policy fixed: of the most MACs.")
@click.option(
    "--max-batch", type=click.IntRange(1, 1024), default=8, help="Images that run together."
)
@click.option(
    "--max-delay-ms",
    type=FiniteFloat(0),
    default=0.0,
    help="How long a request waits for others to run with.",
)
@click.option(
    "--queue", type=click.IntRange(1), default=128, help="Images that may wait, of each model."
)
@click.option(
    "--max-image-mb",
    type=click.IntRange(1, 1024),
    default=32,
    help="Of the image files in a request.",
)
@click.option(
    "--admin-token-file", type=FILE, help="Lets who knows the token in it switch and refit."
)
@click.option("--tls-cert", type=FILE, help="A certificate (PEM); serves HTTPS.")
@click.option("--tls-key", type=FILE, help="Its private key, without a password.")
@run_options
@common_options
def serve_command(
    bundles: tuple[str, ...],
    host: str,
    port: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    admin_token_file: Path | None,
    max_image_mb: int,
    **options: Any,
) -> None:
    """Serve bundles over HTTP, by the protocol of Triton and KServe (Open Inference Protocol v2).

    A model is called as its folder is, or NAME. Its variants are its versions; where a request
    names none, the variant is chosen by load. It prints "Serving http://HOST:PORT" when it is
    ready, after some seconds in which it measures how fast the variants are, and ends at Ctrl-C or
    SIGTERM once all that were taken have their answers. Its log is on stderr, with -v each request.

    \b
    Examples:
      tocom-export serve reference-source0
      tocom-export serve deit=models/deit-source0 reference-source0 --slo-ms 100 --port 8080
      curl -s --data-binary @cat.png localhost:8000/v2/models/reference-source0/classify
    """
    from tocom_export.engines.serving.http.opening import check_installed, name_bundles

    output = take_output(options)
    check_installed()
    from tocom_export.engines.serving.http.admin import is_open_to_others, read_token
    from tocom_export.engines.serving.http.opening import open_services
    from tocom_export.engines.serving.http.serve_options import ServeOptions
    from tocom_export.engines.serving.http.server import bind, check_tls, serve
    from tocom_export.engines.serving.http.site import Site
    from tocom_export.engines.serving.http.telling import set_levels

    start_log()
    set_levels(output.verbosity)
    slo_ms = options.pop("slo_ms")
    settings = ServeOptions(
        policy=options.pop("policy"),
        slo=None if slo_ms is None else slo_ms / 1000,
        variant=options.pop("variant"),
        max_batch=options.pop("max_batch"),
        max_delay=options.pop("max_delay_ms") / 1000,
        queue=options.pop("queue"),
    )
    named = name_bundles(bundles)
    check_tls(tls_cert, tls_key)
    token = read_token(admin_token_file) if admin_token_file else None
    if admin_token_file and is_open_to_others(admin_token_file):
        output.note(f"`admin_token_file` {admin_token_file}: others of this machine may read it.")
    with bind(host, port) as listener:
        if not (tls_cert or is_loopback(listener.getsockname()[0])):
            output.note(f"`host` {host}: who reaches it may ask, and what is sent can be read.")
        services = open_services(
            named,
            settings,
            lambda name: output.note(f"{name}: measuring how fast its variants are ..."),
            **options,
        )
        for service in services.values():
            output.note(service.about)

        def tell(address: str) -> None:
            output.document({"url": address, "models": list(services)})
            if not output.as_json:
                click.echo(f"Serving {address}")

        serve(Site(services, token, max_image_mb * 2**20), listener, tell, tls_cert, tls_key)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


class _Lines(logging.Handler):
    """The server's log on stderr, a line each, but for the traces of faults."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        with suppress(OSError, ValueError):  # stderr was closed: it serves all the same
            click.echo(make_harmless(self.format(record)), err=True)


def start_log() -> None:
    """Show what the server logs."""
    handler = _Lines()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("tocom_export.serve")
    log.handlers = [handler]

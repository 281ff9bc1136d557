"""Serving until a signal comes: sockets, TLS, and an end that leaves nobody without an answer."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from tocom_export.errors import InputError

from .app import build_app
from .connections import Connection
from .site import Site

_CONNECTIONS = 2048
_IDLE = 75
"""Seconds that a connection stays open between requests: longer than load balancers keep theirs."""
_GOODBYE = 3
"""Seconds that connections have to close."""
_HEADERS = 65_536
"""Bytes of a request's headers."""


class Server(uvicorn.Server):
    """Stops at a signal once all that were taken have their answers; at a second one, at once.

    Until then new requests are refused, and a load balancer sees that it isn't ready.

    Args:
        site: what is served.
        tell: called with the server's address when it can be talked to.
    """

    def __init__(self, config: uvicorn.Config, site: Site, tell: Callable[[], None]) -> None:
        super().__init__(config)
        self._site, self._tell = site, tell

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As Uvicorn's, but what whoever started us has ignored stays so, as in other commands.

        A shell does that with Ctrl-C for what it runs in the background. Uvicorn would end at it
        and raise it again at the end, in vain: the exit status would be 0.
        """
        ignored = [n for n in HANDLED_SIGNALS if signal.getsignal(n) is signal.SIG_IGN]
        with super().capture_signals():
            if threading.current_thread() is threading.main_thread():
                for number in ignored:
                    signal.signal(number, signal.SIG_IGN)
            yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by :meth:`serve`."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._tell()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal's handler."""
        if self._site.stopping:
            self.should_exit = self.force_exit = True
            self._loop.call_soon_threadsafe(self._cut_off)
        self._captured_signals.append(sig)
        self._site.stop()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        return await super().on_tick(counter) or self._site.tick()

    def _cut_off(self) -> None:
        """Tell those that wait for an answer; from Python 3.12 on a server waits for them else."""
        for task in self.server_state.tasks:
            task.cancel()


def bind(host: str, port: int) -> socket.socket:
    """A socket of an address, which doesn't listen yet.

    Raises:
        InputError: there is no such address, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise InputError(f"`host` {host}: there is no such address.") from None
    found = socket.socket(family, kind, protocol)
    if os.name == "posix":  # elsewhere it lets another process take the port as well
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        raise InputError(
            f"`port` {port} of {host} can't be had: {error.strerror}; choose another (0: any)."
        ) from None
    return found


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Raise InputError where a certificate and its key can't be used."""
    if (certificate is None) != (key is None):
        raise InputError("`tls_cert` and `tls_key` go together.")
    if certificate is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password is not asked for: nobody may be there to type it.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError as error:
        reason = error.reason or "damaged"
        raise InputError(f"`tls_cert` {certificate}, {key}: can't be used ({reason}).") from None
    except OSError as error:
        raise InputError(
            f"`tls_cert` {certificate}, {key}: can't be read: {error.strerror}."
        ) from None


def serve(
    site: Site,
    listener: socket.socket,
    tell: Callable[[str], None],
    certificate: Path | None = None,
    key: Path | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, whose handlers are called afterwards.

    Args:
        listener: as :func:`bind` gives it.
        tell: called with the server's address when it can be talked to.
        certificate: of TLS, and its ``key``; None speaks plain HTTP.
    """
    server = make_server(site, listener, tell, certificate, key)
    try:
        server.run([listener])
    finally:
        site.close()


def make_server(
    site: Site,
    listener: socket.socket,
    tell: Callable[[str], None],
    certificate: Path | None = None,
    key: Path | None = None,
) -> Server:
    """What :func:`serve` runs."""
    host, port = listener.getsockname()[:2]
    scheme = "http" if certificate is None else "https"
    address = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    config = uvicorn.Config(
        build_app(site),
        loop="asyncio",
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_GOODBYE,
        h11_max_incomplete_event_size=_HEADERS,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    return Server(config, site, lambda: tell(address))

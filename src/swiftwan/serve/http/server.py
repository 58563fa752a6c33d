"""Run the application until it is told to stop, then let running jobs end."""

from __future__ import annotations

import logging
import socket
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from swiftwan.errors import RequestError
from swiftwan.serve.http.guard import LOOPBACK
from swiftwan.serve.jobs.service import Service

_log = logging.getLogger(__name__)

MIN_KEY = 16


class DrainingServer(uvicorn.Server):
    """The first signal stops admission, and the port stays open until running jobs have ended; the second ends now."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            self.should_exit = self.force_exit = True
            return
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        _log.info("stopping: running jobs have %g s", self.service.settings.grace_s)
        self.service.drain()
        self.should_exit = True


def take_port(host: str, port: int) -> socket.socket:
    """Take a port before anything starts; it listens once calls can be answered.

    Raises:
        RequestError: it cannot be had.
    """
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise RequestError(f"port {port} of '{host}' cannot be had: {error.strerror}; choose another --port.") from None
    return taken


def serve(app: FastAPI, service: Service, port: socket.socket) -> None:
    """Answer calls until a signal comes; the service is started by the caller."""
    config = uvicorn.Config(
        app,
        access_log=False,  # addresses of users are not ours to keep
        server_header=False,
        timeout_graceful_shutdown=5,
        log_level="info",
    )
    DrainingServer(config, service).run(sockets=[port])


def check_safe(host: str, key: str | None) -> None:
    """Refuse what would open the server to others without a key.

    Raises:
        RequestError: says how to give one.
    """
    if key is not None and (len(key) < MIN_KEY or not key.isascii() or not key.isprintable()):
        raise RequestError(f"the key has {len(key)} characters; it needs {MIN_KEY} or more, printable ASCII.")
    if host not in LOOPBACK and key is None:
        raise RequestError(
            f"host is '{host}', which others can reach, and there is no key; set SWIFTWAN_API_KEY or give --key-file, "
            "or leave --host out for this machine alone."
        )

"""A slow link on one machine: a proxy for one TCP connection at a time that lets so many bytes a second through."""

import contextlib
import socket
import threading
import time
from types import TracebackType
from typing import Final, Self

_BUFFER_BYTES: Final = 4096
"""Small, so that bytes wait at the sender, where it can see how slow the link is, and not in the proxy."""
_TICK_S: Final = 0.02


class SlowLink:
    """Listens on `port` of the loopback interface and passes everything on, each way at the link's rate."""

    def __init__(self, target_port: int, bits_per_s: float) -> None:
        self._target_port = target_port
        self._bytes_per_s = bits_per_s / 8
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                near, _ = self._listener.accept()
                far = socket.socket()
                for each in (near, far):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
                far.connect(("127.0.0.1", self._target_port))
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        chunk_bytes = max(1, min(int(self._bytes_per_s * _TICK_S), 65536))
        free_at = time.monotonic()
        with contextlib.suppress(OSError):  # one of the ends is gone
            while data := source.recv(chunk_bytes):
                free_at = max(free_at, time.monotonic()) + len(data) / self._bytes_per_s
                time.sleep(max(0.0, free_at - time.monotonic()))
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

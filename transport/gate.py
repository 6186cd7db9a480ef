"""The gate: answers libzmq's question, once per handshake, whether a client key may enter (ZAP, RFC 27).

It runs inside the coordinator's own loop, so nothing can be served while it is down; and were it down, no handshake
would complete (`ZAP_ENFORCE_DOMAIN`). Whom it admits, others decide.
"""

from collections.abc import Callable
from typing import Final

import zmq

ZAP_DOMAIN: Final = b"zo"
_ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"


class Gate:
    """A ZAP handler for CURVE. It fails closed: a question that cannot be answered is answered with no."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", admits: Callable[[bytes], bool]) -> None:
        """Open.

        Args:
            context: of the sockets that ask.
            admits: whether a client's public key, (32,) bytes, may complete the handshake.
        """
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_ZAP_ENDPOINT)
        self._admits = admits

    def answer(self) -> None:
        """Answer all questions that wait. Raises whatever `admits` raises, after a no."""
        while self.socket.poll(0):
            parts = self.socket.recv_multipart()
            user = b""
            try:
                if self._is_admitted(parts):
                    user = parts[6].hex().encode()
            finally:
                request = parts[1] if len(parts) > 1 else b""
                status, text = (b"200", b"OK") if user else (b"400", b"no access")
                self.socket.send_multipart([b"1.0", request, status, text, user, b""])

    def _is_admitted(self, parts: list[bytes]) -> bool:
        """Whether a question is one of ours, about a key that may enter."""
        if len(parts) != 7 or parts[0] != b"1.0" or parts[2] != ZAP_DOMAIN or parts[5] != b"CURVE":
            return False
        return len(parts[6]) == 32 and self._admits(parts[6])

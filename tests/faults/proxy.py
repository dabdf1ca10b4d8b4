"""A way to a service that can be made bad: it stalls, cuts messages in two, resets, or leaves one end untold.

One process has both ends here, so its kernel acknowledges whatever comes, and no TCP timeout of the service or its
clients acts. An end that is told nothing is therefore reset after a time that the caller gives, as TCP_USER_TIMEOUT
would have it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

PIECE = 1 << 16


class _Link:
    """One connection: the client's end and the service's."""

    def __init__(self, proxy: Proxy, client: socket.socket, service: socket.socket) -> None:
        self.proxy, self.client, self.service = proxy, client, service
        self.cut = False
        """the next piece goes on its way by half, then both ends are closed"""
        self.untold: socket.socket | None = None
        """the end that does not hear of the other's going"""
        self.ends = (client, service)

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE):
                self.proxy.open.wait()
                if self.untold is source:
                    continue  # what it says goes nowhere
                if self.cut:
                    sink.sendall(piece[: len(piece) // 2])
                    break
                sink.sendall(piece)
        if self.untold is None:
            self.close()

    def close(self, reset: bool = False) -> None:
        with self.proxy.lock:  # a reader that a reset wakes must not part in peace before it
            if self not in self.proxy.links:
                return
            self.proxy.links.discard(self)
        for end in self.ends:
            _close(end, reset)


def _close(end: socket.socket, reset: bool = False) -> None:
    with contextlib.suppress(OSError):
        if reset:  # no time to linger: the other side gets RST, what was under way is thrown away
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.shutdown(socket.SHUT_RD)  # wakes our own reader, without which the socket would stay; tells nobody
        else:
            end.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        end.close()


class Proxy:
    """Listens on a port of 127.0.0.1 and passes on to another; whose service may be away and come back."""

    def __init__(self, port: int) -> None:
        self.target = ("127.0.0.1", port)
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self.listening.getsockname()[1]
        self.links: set[_Link] = set()
        self.lock = threading.Lock()
        self.open = threading.Event()
        self.open.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self.open.wait()
        try:
            service = socket.create_connection(self.target, 5)
        except OSError:
            _close(client, reset=True)
            return
        service.settimeout(None)
        for end in (client, service):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = _Link(self, client, service)
        with self.lock:
            self.links.add(link)
        threading.Thread(target=link.pump, args=(service, client), daemon=True).start()
        link.pump(client, service)

    def _now(self) -> list[_Link]:
        with self.lock:
            return list(self.links)

    def stall(self, seconds: float) -> None:
        """Nothing passes for so long, in neither direction; connections are taken and wait."""
        self.open.clear()
        try:
            time.sleep(seconds)
        finally:
            self.open.set()

    def truncate(self) -> int:
        """Of each connection that is open, the next message ends in its middle. Returns how many there are."""
        links = self._now()
        for link in links:
            link.cut = True
        return len(links)

    def reset(self) -> int:
        """Break off all connections. Returns how many."""
        links = self._now()
        for link in links:
            link.close(reset=True)
        return len(links)

    def half_open(self, untold: str, seconds: float) -> int:
        """One end of each connection is closed, and the other (`client` or `service`) told nothing for so long. New
        connections are as always. Returns how many links that were."""
        links = self._now()
        for link in links:
            link.untold = link.client if untold == "client" else link.service
            _close(link.service if untold == "client" else link.client)
        timer = threading.Timer(seconds, lambda: [link.close(reset=True) for link in links])
        timer.daemon = True
        timer.start()
        return len(links)

    def close(self) -> None:
        self.open.set()
        _close(self.listening)
        self.reset()

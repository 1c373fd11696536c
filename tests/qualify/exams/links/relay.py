"""A TCP relay between two network namespaces which delivers everything some milliseconds later. Not a test itself.

`python relay.py NAMESPACE_A NAMESPACE_B ADDRESS_A ADDRESS_B DELAY_MS LOSS_EVERY_BYTES PORT...`: in namespace A it
listens on B's address and takes what comes there to B, and the other way about, on each of the ports. Once in so many
bytes of a connection something is lost (0: never): TCP sends it again after its shortest time-out, and what follows
waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import select
import socket
import sys
import threading
import time

CLONE_NEWNET = 0x40000000
SENT_AGAIN_S = 0.2  # TCP_RTO_MIN of Linux
libc = ctypes.CDLL(None, use_errno=True)


def enter(namespace: str) -> None:
    """Sockets that this thread makes from now on belong to the namespace."""
    handle = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(handle, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    finally:
        os.close(handle)


def pump(source: socket.socket, target: socket.socket, delay_s: float, loss_every: int) -> None:
    line: queue.Queue[tuple[float, bytes]] = queue.Queue()

    def deliver() -> None:
        while True:
            due, chunk = line.get()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                if not chunk:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(chunk)
            except OSError:
                return

    threading.Thread(target=deliver, daemon=True).start()
    since_loss = 0
    while True:
        try:
            chunk = source.recv(1 << 18)
        except OSError:
            chunk = b""
        since_loss += len(chunk)
        is_lost = 0 < loss_every <= since_loss
        line.put((time.monotonic() + delay_s + (SENT_AGAIN_S if is_lost else 0.0), chunk))
        since_loss = 0 if is_lost else since_loss
        if not chunk:
            return


def main() -> None:
    space_a, space_b, address_a, address_b, delay_ms, loss_every, *ports = sys.argv[1:]
    ways: dict[socket.socket, tuple[str, str, int]] = {}  # listener -> namespace and address to go on to
    for here, there, address in ((space_a, space_b, address_b), (space_b, space_a, address_a)):
        enter(here)
        for port in map(int, ports):
            listener = socket.create_server((address, port))
            ways[listener] = (there, address, port)
    print("ready", flush=True)
    while True:
        for listener in select.select(list(ways), [], [])[0]:
            one, _ = listener.accept()
            space, address, port = ways[listener]
            enter(space)
            try:
                other = socket.create_connection((address, port), timeout=10)
            except OSError:
                one.close()  # the one who asks will ask again
                continue
            other.settimeout(None)
            for each in (one, other):
                with contextlib.suppress(OSError):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, target in ((one, other), (other, one)):
                arguments = (source, target, float(delay_ms) / 1e3, int(loss_every))
                threading.Thread(target=pump, args=arguments, daemon=True).start()


if __name__ == "__main__":
    main()

"""Under which address the other groups reach this machine, and over which interface."""

from __future__ import annotations

import fcntl
import socket
import struct
from urllib.parse import urlsplit

from crosschip.train.outer.errors import GroupsError

__all__ = ["interface_of", "own_address_towards"]

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def own_address_towards(lighthouse: str) -> str:
    """This machine's IPv4 address on the way to the lighthouse (`http://HOST:PORT`), on which its peers are as well.

    A host's name is no use for that: inside a container or a network namespace nobody else can resolve it.

    Raises:
        GroupsError: the address is none, or there is no way there.
    """
    try:
        parts = urlsplit(lighthouse)
        host, port = parts.hostname, parts.port
        if parts.scheme != "http" or host is None or port is None:
            raise ValueError("it should look like http://HOST:PORT")
        target = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_DGRAM)[0][4]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing; the kernel chooses the way
            return str(probe.getsockname()[0])
    except (ValueError, OSError) as error:
        raise GroupsError(
            f"the lighthouse's address is {lighthouse!r}: {error}", "give groups.lighthouse as http://HOST:PORT"
        ) from None


def interface_of(address: str) -> str | None:
    """The network interface that has the IPv4 address; None where the system cannot tell."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None

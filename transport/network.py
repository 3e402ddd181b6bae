"""Addresses of this node, and the rule that replication uses the cluster network only.

There is no fallback: a node without an address on the cluster network does not listen and does not dial.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path

from replicator.errors import ClusterNetworkError, PeerUnreachable

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

_SIOCGIFCONF = 0x8912  # linux/sockios.h
_IFREQ = struct.Struct("16s16s8x") if struct.calcsize("P") == 8 else struct.Struct("16s16s")
_MAX_INTERFACES = 4096
_IF_INET6 = Path("/proc/net/if_inet6")
_LOOPBACK = IPv4Network("127.0.0.0/8")
BACKLOG = 64


def local_addresses() -> tuple[IPAddress, ...]:
    """Every address of this node's interfaces that are up, in the kernel's order (IPv4, then IPv6).

    From the SIOCGIFCONF ioctl (netdevice(7)) and /proc/net/if_inet6.
    """
    found: list[IPAddress] = []
    buffer = bytearray(_IFREQ.size * _MAX_INTERFACES)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        view = memoryview(buffer)
        address = _address_of(view)
        answer = fcntl.ioctl(probe, _SIOCGIFCONF, struct.pack("iP", len(buffer), address))
        size = struct.unpack("iP", answer)[0]
        for _name, raw in _IFREQ.iter_unpack(view[:size]):
            found.append(IPv4Address(raw[4:8]))
    if _IF_INET6.exists():
        for line in _IF_INET6.read_text().splitlines():
            found.append(IPv6Address(int(line.split()[0], 16)))
    return tuple(found)


def _address_of(view: memoryview) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def cluster_address(network: IPNetwork, preferred: IPAddress | None = None) -> IPAddress:
    """This node's address on the cluster network; ``preferred`` (the configured one) if given.

    :raises ClusterNetworkError: there is none, or the preferred one is not of this node or not on the network
    """
    own = local_addresses()
    if preferred is not None:
        check_on_network(preferred, network, "this node's listen address")
        # Every address of 127.0.0.0/8 is this node's, though no interface lists it.
        if preferred in own or preferred in _LOOPBACK:
            return preferred
    for address in own:
        if preferred is None and address in network:
            return address
    shown = ", ".join(str(a) for a in own if not a.is_loopback) or "none"
    wanted = f" {preferred}" if preferred is not None else ""
    raise ClusterNetworkError(
        f"this node has no address{wanted} on the cluster network {network}; its addresses are: {shown}",
        hint="bring the interface of the cluster network up, or correct [network] in replicator.toml; "
        "no other network is ever used",
    )


def check_on_network(address: IPAddress, network: IPNetwork, what: str) -> IPAddress:
    """:raises ClusterNetworkError: the address is not on the cluster network"""
    if address not in network:
        raise ClusterNetworkError(
            f"{what} {address} is not on the cluster network {network}",
            hint="correct the address or [network] cluster in replicator.toml; no other network is ever used",
        )
    return address


def listen(network: IPNetwork, address: IPAddress, port: int) -> socket.socket:
    """A listening socket on this node's address of the cluster network; port 0 chooses one.

    :raises ClusterNetworkError: no such address here, or the port is taken
    """
    cluster_address(network, address)
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        return socket.create_server((str(address), port), family=family, backlog=BACKLOG, reuse_port=False)
    except OSError as error:
        raise ClusterNetworkError(
            f"cannot listen on {address} port {port}: {error.strerror}",
            hint="see which process has the port: ss -ltnp; or correct [network] listen",
        ) from None


def dial(
    network: IPNetwork, peer: str, address: IPAddress, port: int, *, timeout: float, source: IPAddress | None = None
) -> socket.socket:
    """A TCP connection to a peer from this node's address on the cluster network.

    :raises ClusterNetworkError: the peer, or this node, is not on the cluster network
    :raises PeerUnreachable: no answer within ``timeout`` seconds, or refused
    """
    check_on_network(address, network, f"the address of node {peer},")
    own = cluster_address(network, source)
    try:
        return socket.create_connection((str(address), port), timeout=timeout, source_address=(str(own), 0))
    except OSError as error:
        reason = error.strerror or str(error) or "no answer"
        raise PeerUnreachable(
            f"node {peer} cannot be reached at {address} port {port} from {own}: {reason}",
            hint=f"check that `replicator serve` runs on {peer} and that the cluster network between the two is up",
        ) from None


def parse_address(text: str) -> tuple[IPAddress, int]:
    """``10.99.0.1:8571`` or ``[fd00::1]:8571``. :raises ValueError: neither"""
    host, colon, port = text.rpartition(":")
    number = int(port) if port.isascii() and port.isdigit() else 0
    if not colon or not 0 < number < 65536:
        raise ValueError(f"{text!r} is not ADDRESS:PORT")
    bracketed = host.startswith("[") and host.endswith("]")
    address = ip_address(host[1:-1] if bracketed else host)
    if bracketed != (address.version == 6):
        raise ValueError(f"{text!r} is not ADDRESS:PORT")
    return address, number

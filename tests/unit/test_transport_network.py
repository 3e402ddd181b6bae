"""Addresses and the rule that there is no fallback."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address

import pytest

from replicator.errors import ClusterNetworkError, PeerUnreachable
from transport import network

NOWHERE = IPv4Network("203.0.113.0/24")  # RFC 5737: for documentation, so of no interface
LOOPBACK = IPv4Network("127.0.0.0/8")


def test_loopback_is_among_the_local_addresses() -> None:
    assert IPv4Address("127.0.0.1") in network.local_addresses()


def test_without_an_address_there_is_no_fallback() -> None:
    with pytest.raises(ClusterNetworkError, match=r"no address on the cluster network 203\.0\.113\.0/24") as raised:
        network.cluster_address(NOWHERE)
    assert "no other network" in raised.value.hint
    with pytest.raises(ClusterNetworkError, match=r"no address 203\.0\.113\.9"):
        network.cluster_address(NOWHERE, IPv4Address("203.0.113.9"))


def test_the_configured_address_must_be_on_the_network() -> None:
    with pytest.raises(ClusterNetworkError, match="is not on the cluster network"):
        network.cluster_address(NOWHERE, IPv4Address("127.0.0.1"))


def test_every_loopback_address_is_ours() -> None:
    address = IPv4Address("127.9.8.7")
    assert network.cluster_address(LOOPBACK, address) == address


def test_a_peer_outside_the_network_is_not_dialled() -> None:
    with pytest.raises(ClusterNetworkError, match="address of node two"):
        network.dial(LOOPBACK, "two", IPv4Address("203.0.113.9"), 8571, timeout=1)


def test_dialling_uses_the_given_source_and_says_who_is_not_there() -> None:
    with network.listen(LOOPBACK, IPv4Address("127.0.0.2"), 0) as listener:
        port = listener.getsockname()[1]
        source = IPv4Address("127.0.0.3")
        with network.dial(LOOPBACK, "two", IPv4Address("127.0.0.2"), port, timeout=5, source=source):
            accepted, address = listener.accept()
            accepted.close()
            assert address[0] == "127.0.0.3"
        with pytest.raises(ClusterNetworkError, match="cannot listen"):
            network.listen(LOOPBACK, IPv4Address("127.0.0.2"), port)
    with pytest.raises(PeerUnreachable, match="node two cannot be reached"):
        network.dial(LOOPBACK, "two", IPv4Address("127.0.0.2"), port, timeout=5)


@pytest.mark.parametrize("text", ["10.0.0.1:8571", "[fd00::1]:8571"])
def test_addresses_with_ports(text: str) -> None:
    address, port = network.parse_address(text)
    assert (address, port) == (ip_address(text.rpartition(":")[0].strip("[]")), 8571)


@pytest.mark.parametrize(
    "text", ["10.0.0.1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "fd00::1:8571", "[10.0.0.1]:1", "host:1"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        network.parse_address(text)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6_loopback_is_found_where_there_is_one() -> None:
    found = [a for a in network.local_addresses() if isinstance(a, IPv6Address)]
    assert all(isinstance(a, IPv6Address) for a in found)

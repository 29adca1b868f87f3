"""Which proxy stands before an endpoint: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, in capitals or not.

What runs on this machine gets its requests directly: a proxy elsewhere could not reach it.
"""

import dataclasses
import ipaddress
import os
import re
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from rlver_jax.config.credentials import Secret

# As distributions write them into /etc/hosts.
_LOCAL = ("localhost", "localhost.localdomain", "localhost6", "ip6-localhost", "ip6-loopback")


@dataclasses.dataclass(frozen=True)
class Proxy:
    """A proxy for an endpoint.

    Attributes:
        url: with user and password, if it has them; not to be shown.
        variable: that names it.
        host: of the endpoint.
        tunnel: it hands on bytes that it cannot read (https), so what is answered is the endpoint's.
    """

    url: str = dataclasses.field(repr=False)
    variable: str
    host: str
    tunnel: bool

    def __str__(self) -> str:
        # Of an address that cannot be read any part may be a password.
        location = "" if self.fault else f"{urlsplit(self.url).netloc.rpartition('@')[2]} "
        return f"the proxy {location}({self.variable})"

    @property
    def fault(self) -> str:
        """What is wrong with its address; nothing of it is repeated, since it may hold a password. Empty: nothing."""
        try:
            parts = urlsplit(self.url)
            if parts.hostname and parts.port != 0:
                return ""
        except ValueError:  # a port that is none, brackets without their other half
            pass
        return (
            "no host and port can be read from it; in a user's name or a password write / as %2F, # as %23, "
            "? as %3F and @ as %40"
        )

    @property
    def remedy(self) -> str:
        """What to do about a proxy that doesn't let a request through."""
        return f"have it let requests to {self.host} through, or put {self.host} into NO_PROXY to ask it directly"


def proxy_of(url: str) -> Proxy | None:
    """The proxy that requests to `url` go through; None where they go directly."""
    parts, known = urlsplit(url), getproxies()
    host = parts.hostname or ""
    known = {kind: address.strip() for kind, address in known.items()}
    address = known.get(parts.scheme) or known.get("all")
    if not address or is_loopback(host) or _is_exempt(host, parts.port, known.get("no", "")):
        return None
    kind = parts.scheme if known.get(parts.scheme) else "all"
    names = [name for name in (f"{kind}_proxy", f"{kind}_proxy".upper()) if os.environ.get(name)]
    address = address if "://" in address else f"http://{address}"
    return Proxy(Secret(address), [*names, "the system's settings"][0], host, parts.scheme == "https")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine: localhost, its own name, 127.0.0.0/8, ::1, or every address (0.0.0.0, ::)."""
    address = _address(host)
    if address is None:
        name = host.rstrip(".").lower()
        return name in (*_LOCAL, socket.gethostname().lower()) or name.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None) or address
    return mapped.is_loopback or mapped.is_unspecified


def _is_exempt(host: str, port: int | None, no_proxy: str) -> bool:
    """Whether NO_PROXY names a host: itself, a domain that it is in, its network, or all; with a port or without."""
    address = _address(host)
    for entry in re.split(r"[,\s]+", no_proxy.lower()):
        if entry == "*":
            return True
        network = _network(entry.strip("[]"))
        if network is not None:
            if address is not None and address in network:
                return True
            continue
        name, _, wanted = entry.split("://")[-1].partition(":")
        domain = name.removeprefix("*").strip(".")
        fits = domain and (host == domain or host.endswith(f".{domain}"))
        if fits and (not wanted or wanted == str(port)):
            return True
    return False


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host)) if re.fullmatch(r"[\da-fx.]+", host) else None  # 127.1
    except OSError:
        return None


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None

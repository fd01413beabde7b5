"""Read the addresses of servers, and tell which of them are this machine."""

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

DEFAULT_PORTS = {"http": 80, "https": 443}
LOCAL_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Name the place of a server. `host` is ASCII, as a connection is made to it: an IPv6 address has no brackets."""

    scheme: str
    host: str
    port: int
    path: str


def read_address(url: str, path: str = "") -> Address:
    """Return where `path`, seen from the server at `url`, is.

    Raises `ValueError` if that is no http or https address, or more than one: with a query, a fragment or a name in it.
    """
    try:
        if not re.fullmatch(r"(?i)https?://[^\s\\%?#@\x00-\x1f]+", url):
            raise ValueError
        parts = urlsplit(urljoin(url + "/", path) if path else url)
        host = (parts.hostname or "").encode("idna").decode()
        if not re.fullmatch(r"[\x21-\x7e]+", host) or not re.fullmatch(r"[\x21-\x7e]*", parts.path):
            raise ValueError
        port = DEFAULT_PORTS[parts.scheme] if parts.port is None else parts.port
    except ValueError:  # UnicodeError is one
        raise ValueError(f"not the address of a server (got '{url}'); write it as http://host:port/v1") from None
    return Address(scheme=parts.scheme, host=host, port=port, path=parts.path)


def is_this_machine(host: str) -> bool:
    """Tell whether what is sent to `host` stays on this machine."""
    name = host.lower().removesuffix(".")
    if name in LOCAL_NAMES:
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback

"""Whether an address is of this machine: the one answer for those who connect to us, and for servers that we are led to."""

import ipaddress
import re
import socket

_IN_NUMBERS = re.compile(r"[0-9a-fx]+(?:\.[0-9a-fx]+){0,3}")  # 127.1, 2130706433, 0x7f000001: addresses for systems, too


def is_here(address: str, *, also_link_local: bool = False) -> bool:
    """Whether an IP address is of this machine itself; `localhost` and its names are, other names are not.

    With `also_link_local`, addresses of the link that the machine is on count too (169.254.0.0/16, fe80::/10): there
    clouds answer with the secrets of a machine, so nobody may lead us there. Whoever connects to us from such an
    address is another machine.
    """
    name = address.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        found = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        if not _IN_NUMBERS.fullmatch(name):
            return False
        try:
            found = ipaddress.ip_address(socket.inet_aton(name))
        except OSError:
            return False
    found = getattr(found, "ipv4_mapped", None) or found
    return bool(found.is_loopback or found.is_unspecified or (also_link_local and found.is_link_local))

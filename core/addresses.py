"""Whether an address is of this machine: the one answer for those who connect to us, and for servers that we are led to."""

import ipaddress


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
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    found = getattr(found, "ipv4_mapped", None) or found
    return bool(found.is_loopback or found.is_unspecified or (also_link_local and found.is_link_local))

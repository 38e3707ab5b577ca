"""Other web sites whose pages may call the API: those that were added in the page, kept in the settings."""

from urllib.parse import urlsplit

from ..core.errors import BadParameter
from .settings import Settings

_KEY = "cors_origins"
_MOST = 50
EVERY = "*"


def kept(settings: Settings) -> list[str]:
    """Origins such as `https://example.org`; `*` stands for every site."""
    none: list[str] = []
    return [each for each in settings.get(_KEY, none) if isinstance(each, str)]


def add(settings: Settings, text: str) -> str:
    """Remember the origin of an address that somebody typed, and return it. Raises BadParameter."""
    found, before = origin_of(text), kept(settings)
    if found in before:
        raise BadParameter(f"{found} is already in the list. Nothing needs to change.")
    if len(before) >= _MOST:
        raise BadParameter(f"The list has {_MOST} sites, which is its limit. Remove one first.")
    settings.put(_KEY, [*before, found])
    return found


def remove(settings: Settings, origin: str) -> None:
    settings.put(_KEY, [each for each in kept(settings) if each != origin])


def origin_of(text: str) -> str:
    """`https://Example.org/page` -> `https://example.org`, as browsers send it. Raises BadParameter."""
    typed = text.strip()
    if typed == EVERY:
        return EVERY
    try:
        parts = urlsplit(typed if "://" in typed else f"https://{typed}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not host or " " in typed or not typed.isascii() or "," in typed or "*" in host:
        raise BadParameter("Type the address of a web site, for example https://lite.koboldai.net, or * for every site.")
    usual = {"https": 443, "http": 80}.get(parts.scheme)
    name = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{name}" + (f":{port}" if port is not None and port != usual else "")

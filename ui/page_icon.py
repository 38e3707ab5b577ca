"""The page on a phone's home screen: its manifest, and its icon, which is computed here."""

import json
import struct
import zlib

from .theme import TITLE

SIZES = (180, 192, 512)  # pixels: Apple's, Android's, Android's start screen
_TEAL, _WHITE = (15, 118, 110), (255, 255, 255)
_BARS = (0.30, 0.62, 0.46, 0.78)  # heights of four bars, as shares: weights on a few levels


def manifest() -> bytes:
    """The web app manifest (W3C), with which a browser offers to install the page."""
    return json.dumps(
        {
            "name": TITLE,
            "short_name": TITLE,
            "description": "Chat with GPTQ models",
            "start_url": ".",
            "scope": ".",
            "display": "standalone",
            "background_color": "#f8fafc",
            "theme_color": "#0f766e",
            "icons": [
                {"src": icon_path(size), "sizes": f"{size}x{size}", "type": "image/png", "purpose": "any maskable"}
                for size in SIZES
            ],
        }
    ).encode()


def icon_path(size: int) -> str:
    return f"gw-icon-{size}.png"


def icon(size: int) -> bytes:
    """A PNG of that many pixels a side."""
    edges = []  # (first column, column after the last, first row) of each bar
    width = size * 0.11
    for at, height in enumerate(_BARS):
        left = size * (0.215 + at * 0.1533)
        edges.append((round(left), round(left + width), round(size * (0.80 - 0.6 * height))))
    bottom = round(size * 0.80)
    rows: dict[tuple[bool, ...], bytes] = {}
    data = bytearray()
    for y in range(size):
        filled = tuple(top <= y < bottom for _left, _right, top in edges)
        if filled not in rows:
            line, x = bytearray(b"\0"), 0  # a row begins with its filter: none
            for (left, right, _top), on in zip(edges, filled, strict=True):
                line += bytes(_TEAL) * (left - x) + bytes(_WHITE if on else _TEAL) * (right - left)
                x = right
            rows[filled] = bytes(line + bytes(_TEAL) * (size - x))
        data += rows[filled]
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(data), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )

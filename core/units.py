"""Numbers as people read them. Bytes are decimal (1 GB = 10^9), as on the Hub and on disk labels."""

_SIZES = ((10**12, "TB", 2), (10**9, "GB", 2), (10**6, "MB", 1), (10**3, "KB", 1))


def format_bytes(count: int) -> str:
    """4160000000 -> '4.16 GB', 999 -> '999 bytes'."""
    for size, unit, digits in _SIZES:
        if abs(count) >= 0.99995 * size:  # 999,950 bytes would be rounded to 1000.0 KB
            return f"{count / size:.{digits}f} {unit}"
    return plural(count, "byte")


def format_rate(bytes_per_s: float) -> str:
    """52300000.0 -> '52.3 MB/s'."""
    return f"{format_bytes(int(bytes_per_s))}/s"


def format_duration(seconds: float) -> str:
    """5.2 -> '5 s', 75 -> '1 min 15 s', 7500 -> '2 h 5 min'."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plural(count: int, noun: str) -> str:
    """(1, 'file') -> '1 file', (3, 'file') -> '3 files'."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

"""Names of requests and answers. They are no secrets: the system's random source takes longer than all else that makes one."""

import random


def new_id(byte_count: int = 12) -> str:
    """So many random bytes in hexadecimal."""
    return random.getrandbits(byte_count * 8).to_bytes(byte_count, "big").hex()

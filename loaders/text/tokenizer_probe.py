"""A program: reads a tokenizer.json and some texts with the library tokenizers, and says how that went.

Runs as a child process, since a hostile file can end its process (Rust aborts when memory is short) or hold it for ever.
Imports nothing of this package.
"""

import json
import sys
from typing import Any


def main(memory_bytes: int) -> None:
    """Answer requests {"file": path} and {"text": text} with {"count": n} or {"error": why}; JSON, one a line."""
    _limit_memory(memory_bytes)
    from tokenizers import Tokenizer

    tokenizer: Any = None
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "file" in request:
                tokenizer = Tokenizer.from_file(request["file"])
                answer = {"count": tokenizer.get_vocab_size()}
            else:
                ids = tokenizer.encode(request["text"], add_special_tokens=False).ids
                tokenizer.decode(ids)
                answer = {"count": len(ids)}
        except MemoryError:
            answer = {"error": "it takes too much memory"}
        except BaseException as error:  # PanicException is no Exception
            answer = {"error": str(error)[:2000]}
        print(json.dumps(answer), flush=True)


def _limit_memory(memory_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent looks at the memory
        return
    for name in ("RLIMIT_AS", "RLIMIT_DATA"):
        _soft, hard = resource.getrlimit(getattr(resource, name))
        try:
            resource.setrlimit(getattr(resource, name), (memory_bytes, hard))
        except (OSError, ValueError):  # macOS
            continue


if __name__ == "__main__":
    main(int(sys.argv[1]))

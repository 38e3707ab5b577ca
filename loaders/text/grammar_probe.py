"""A program: compiles grammars of requests with llguidance, and says that it could.

Runs as a child process, since some grammars of forty bytes take minutes and gigabytes, and no thread can be ended. Imports
nothing of this package; grammar_matcher.py takes `source_of` from here.
"""

import json
import sys
from typing import Any

_WHITE = r"[ \n\r\t]{1,20}"  # between the parts of JSON: small models would write spaces without end


def source_of(kind: Any, text: str) -> str:
    """What llguidance compiles. Raises ValueError, RuntimeError, and what is no Exception: its panics."""
    from llguidance import LLMatcher, grammar_from

    if kind == "json_schema":
        made: str = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITE})
        return made
    return str(grammar_from(kind, text))


def compile_once(words: Any, kind: str, text: str) -> None:
    from llguidance import LLMatcher

    matcher = LLMatcher(words, source_of(kind, text), log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()


def main(memory_bytes: int) -> None:
    """Answer requests {"kind": kind, "text": text} with {}; JSON, one a line. What is wrong with a grammar is not said here."""
    from llguidance import LLTokenizer

    _limit_memory(memory_bytes)
    words = LLTokenizer("byte")  # how long compiling takes hardly depends on the model's words
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = {}
        try:
            compile_once(words, request["kind"], request["text"])
        except MemoryError:
            answer = {"memory": True}
        except BaseException:  # PanicException is no Exception
            answer = {}
        print(json.dumps(answer), flush=True)


def _limit_memory(memory_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent looks at the memory
        return
    _soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, hard))
    except (OSError, ValueError):  # macOS
        return


if __name__ == "__main__":
    main(int(sys.argv[1]))

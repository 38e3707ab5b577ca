"""A program: reads a tokenizer's file and some texts with the library that it is for, and says how that went.

Runs as a child process, since a hostile file can end its process (Rust aborts when memory is short) or hold it for ever.
Imports nothing of this package.
"""

import base64
import json
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

_LONGEST = 2000  # characters of a token of sentencepiece, or of an added one; real ones have up to 128
_MOST_RUNS = 90  # letters and words of its patterns
_MOST = 500_000  # such tokens; the largest models have 262,000
_MOST_TIMES = 64  # as long as it was: what the file may make of a text; real ones leave the length, but for Unicode's forms
_MOST_ADDED = 4096  # characters, or ids, that it may add to each text; real ones add one or two


def main(memory_bytes: int) -> None:
    """Answer requests {"file": path} and {"text": text} with {"count": n} or {"error": why}; JSON, one a line."""
    _limit_memory(memory_bytes)
    tokenizer: Any = None
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "file" in request:
                tokenizer = _SentencePiece(request["file"]) if request["file"].endswith(".model") else _Json(request["file"])
                answer = {"count": tokenizer.size, "runs": tokenizer.runs}
            else:
                answer = {"count": tokenizer.count(request["text"])}
        except _NotRead as error:
            answer = {"not_read": str(error)[:2000]}
        except MemoryError:
            answer = {"error": "it takes too much memory"}
        except BaseException as error:  # PanicException is no Exception
            answer = {"error": str(error)[:2000]}
        print(json.dumps(answer), flush=True)


class _NotRead(Exception):
    """No file for this library; another one may read it."""


class _Json:
    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(path)
        self.runs = _runs_of([self._tokenizer.normalizer, self._tokenizer.pre_tokenizer, self._tokenizer.decoder])
        for part in (self._tokenizer.normalizer, self._tokenizer.decoder, self._tokenizer.post_processor):
            if part is not None:
                _require_small(*_growth(json.loads(part.__getstate__())))
        self.size = self._tokenizer.get_vocab_size()
        if self.size > _MOST:
            raise ValueError(f"it has {self.size} tokens, and at most {_MOST} were expected")
        longest = max((len(each.content) for each in self._tokenizer.get_added_tokens_decoder().values()), default=0)
        if longest > _LONGEST:  # transformers takes minutes for one of megabytes
            raise ValueError(f"one of its added tokens has {longest} characters, and at most {_LONGEST} were expected")

    def count(self, text: str) -> int:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        self._tokenizer.decode(ids)
        return len(ids)


def _runs_of(parts: list[Any]) -> list[str]:
    """The letters and words of the patterns in a tokenizer's parts, of which texts are tried that only they would be slow on."""
    found: dict[str, None] = {}
    for pattern in _patterns(json.loads(each.__getstate__()) for each in parts if each is not None):
        found |= dict.fromkeys(each for each in pattern if each.isprintable())
        found |= dict.fromkeys(re.findall(r"\w{2,8}", pattern))
    return sorted(found, key=len)[:_MOST_RUNS]


def _patterns(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, dict):
            if isinstance(value.get("Regex"), str):
                yield value["Regex"][:_LONGEST]
            yield from _patterns(value.values())
        elif isinstance(value, list):
            yield from _patterns(value)


def _growth(part: dict[str, Any]) -> tuple[float, float]:
    """(how many times as long a text can become, what is added to it) by a normalizer, a decoder or a post-processor.

    A text that is tried may not have the letter that a chain of them makes a million of.
    """
    times, added = 1.0, 0.0
    for inner in (each for key in ("normalizers", "decoders", "processors") for each in part.get(key) or ()):
        more, new = _growth(inner)
        times, added = times * more, added * more + new
    if part.get("type") == "Replace":
        pattern, content = part["pattern"], part["content"]
        times = max(1.0, len(content) / max(1, len(pattern["String"])) if "String" in pattern else 1.0 + len(content))
    elif part.get("type") == "Precompiled":
        times = _longest_of(base64.b64decode(part["precompiled_charsmap"]))
    elif part.get("type") == "Prepend":
        added = float(len(part["prepend"]))
    elif part.get("type") == "TemplateProcessing":
        ids = {name: len(each["ids"]) for name, each in part["special_tokens"].items()}
        times = float(sum("Sequence" in each for each in part["single"]))
        added = float(sum(ids.get(each["SpecialToken"]["id"], 0) for each in part["single"] if "SpecialToken" in each))
    return times, added


def _longest_of(charsmap: bytes) -> float:
    """The longest text that a letter becomes by a table of sentencepiece: size of a trie, the trie, texts that end in 0."""
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return float(max((len(each.decode("utf-8", "ignore")) for each in texts.split(b"\0")), default=0)) or 1.0


def _require_small(times: float, added: float) -> None:
    """Raises ValueError."""
    if times > _MOST_TIMES:
        raise ValueError(f"it makes a text up to {times:.3g} times as long, and at most {_MOST_TIMES} times was expected")
    if added > _MOST_ADDED:
        raise ValueError(f"it adds {added:.3g} letters or tokens to each text, and at most {_MOST_ADDED} were expected")


class _SentencePiece:
    runs: tuple[str, ...] = ()

    def __init__(self, path: str) -> None:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        # transformers reads the tokens itself, also of files that sentencepiece refuses
        formats: Any = sentencepiece_model_pb2
        model = formats.ModelProto()
        with open(path, "rb") as file:
            data = file.read()
        try:
            model.ParseFromString(data)
        except MemoryError:
            raise
        except Exception as error:
            raise _NotRead(str(error)) from None
        self.size = len(model.pieces)
        if self.size > _MOST:
            raise ValueError(f"it has {self.size} tokens, and at most {_MOST} were expected")
        longest = max((len(each.piece) for each in model.pieces), default=0)
        if longest > _LONGEST:  # transformers looks at every way to part each of them
            raise ValueError(f"one of its tokens has {longest} characters, and at most {_LONGEST} were expected")
        _require_small(_longest_of(model.normalizer_spec.precompiled_charsmap), 0.0)
        del model, data
        self._tokenizer: Any = SentencePieceProcessor()
        try:
            self._tokenizer.Load(path)
        except (RuntimeError, OSError, ValueError) as error:
            raise _NotRead(str(error)) from None

    def count(self, text: str) -> int:
        ids = self._tokenizer.EncodeAsIds(text)
        self._tokenizer.DecodeIds(ids)
        return len(ids)


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

"""What an error of another library says, in words for a sentence of ours. Its class and its traceback are for the log.

The texts of libraries name their classes, their own code and its path, and often the wrong cure ("pass
ignore_mismatched_sizes"). `in_words` gives what was found, in at most 200 characters of one line.
"""

import errno
import json
import re
import traceback
from collections.abc import Mapping
from types import ModuleType

from .errors import GptqWebuiError
from .folder_files import printable

_MOST = 200
_FULL = "the disk is full"
_SILENT = "no reason was given"
_UNFORESEEN = "it met something that it was not made for; the log has the details"

# Texts of libraries that users have met -> what they mean: what was found, what was wanted.
_KNOWN = tuple(
    (re.compile(pattern, re.IGNORECASE), words)
    for pattern, words in (
        (r"out of memory|cannot allocate memory|not enough memory|DefaultCPUAllocator|CUBLAS_STATUS_ALLOC_FAILED|bad_?alloc",
         "there is not enough memory"),
        (r"no kernel image is available|sm_\d+ is not compatible", "this build of torch has no program code for this GPU"),
        (r"device-side assert|illegal memory access|misaligned address|unspecified launch failure",
         "the GPU stopped at an error; it works again after a restart of this program"),
        (r"Torch not compiled with CUDA|no NVIDIA driver|CUDA driver version|libcuda|CUDA is not available|no CUDA GPUs",
         "no GPU can be used: the driver is missing, or this torch was built without GPUs"),
        (r"ignore_mismatched_sizes|size mismatch for|shape '?\[.*is invalid for input|shapes? .*(?:do not|don't|cannot) .*match"
         r"|broadcast a dimension|must match the size of tensor",
         "tensors in its files have other shapes than config.json says; one of them belongs to another model"),
        (r"Unrecognized configuration class", "the type of model that config.json names writes no text"),
        (r"Unrecognized model in|does not recognize this architecture|should have a .?model_type",
         "config.json names a type of model that the installed transformers does not know"),
        (r"AddedToken|TextEncodeInput|TextInputSequence",
         "a special token is no text; tokenizer_config.json or special_tokens_map.json is damaged"),
        (r"Error while initializing|tiktoken.{0,4}is required|Couldn't instantiate the backend tokenizer"
         r"|Converting from SentencePiece|model_file or model_proto",
         "the files that have its vocabulary are missing or damaged"),
        (r"No space left on device|os error 28\b|disk quota exceeded|database or disk is full", _FULL),
        (r"Error while deserializing header|header too \w+|InvalidHeader|MetadataIncompleteBuffer|incomplete metadata",
         "a .safetensors file is cut short or damaged"),
        (r"PytorchStreamReader|failed finding central directory|invalid load key|pickle data was truncated",
         "a file of weights is cut short or damaged"),
        (r"weights_only|Unsupported (?:global|operand \d)", "a file of weights holds more than tensors, and was not opened"),
        (r"trust_remote_code|custom code", "its folder brings program code of its own, which is not run unless you allow it"),
        (r"maximum recursion depth|recursion limit", "something in its files is nested too deeply"),
        (r"for integer string conversion", "a number in its files has thousands of digits"),
        (r"couldn't connect to|offline mode|LocalEntryNotFound|Can't load tokenizer for",
         "a file that it needs is not in the folder"),
        (r"certificate verify failed|CERTIFICATE_VERIFY", "the certificate of the other side is not accepted"),
        (r"Name or service not known|getaddrinfo|name resolution|nodename nor servname", "there is no computer of that name"),
    )
)  # fmt: skip
# Errors whose text is about Python code, or says nothing without their class.
_OF_CODE: Mapping[type[BaseException], str] = {
    RecursionError: "something in its files is nested too deeply",
    MemoryError: "there is not enough memory",
    json.JSONDecodeError: "a file that must be JSON is not",
    UnicodeError: "text in its files is not UTF-8",
    TimeoutError: "there was no answer in time",
    ConnectionError: "the connection was cut",
    EOFError: "a file ends too early",
    OverflowError: "a number is too large",
    SystemExit: "it ended by itself",
    AssertionError: _UNFORESEEN,
}
_CODE = re.compile(
    r"<class|<function|<bound method| object at 0x|NoneType|has no attribute|not subscriptable|not callable|not iterable"
    r"|is not a mapping"
    r"|positional argument|keyword argument|unsupported operand|unhashable|argument of type|referenced before assignment"
    r"|is not defined|\b(?:List|Union|Dict|Optional)\[|\bself\.|__\w+__"
    r"|has no setter|\b[A-Z]\w*Config\b"
    r"|takes (?:\d+|at|from|no|exactly) |missing \d+ required|local variable"
)
_CLASS = re.compile(r"\b(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Warning|Panic|Interrupt)\b:?\s*")
_PATH = re.compile(r"""(?<![\w.])(?:[A-Za-z]:)?[\\/][^\s'"`,;:()]*[\\/]([^\s'"`,;:()\\/]*)""")
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_WEB = re.compile(r"https?://\S+")
_NO_USE = re.compile(r"^(?:Traceback \(most recent|File \"|\^+$|~+\^|-+$|=+$|During handling of)")


def in_words(error: BaseException) -> str:
    """What `error` says, to stand in a sentence: one line, no class name, no path, no address, no full stop at its end."""
    if isinstance(error, GptqWebuiError):
        return str(error).rstrip(". ")
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {printable(error.name.partition('.')[0])} is not installed"
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        return f"there is no {printable(str(error.name))[:80]} in {printable(error.obj.__name__)}"
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return _of_the_system(error)
    for pattern, words in _KNOWN:
        if pattern.search(text[:20_000]):
            return words
    for kind, words in _OF_CODE.items():
        if isinstance(error, kind):
            return words
    if isinstance(error, KeyError) and not (error.args and " " in str(error.args[0]).strip()):
        return f"{printable(str(error.args[0]))[:80]!r} is missing" if error.args else _SILENT
    return _first_line(str(error.args[0]) if isinstance(error, KeyError) else text)


def of_the_disk(error: BaseException) -> str:
    """The sentence for a full disk, or for a file that cannot be read or written; "" for every other error."""
    said = in_words(error)
    if said == _FULL:
        return "The disk is full, so this could not be finished. Make room on it, then try again."
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"A file or a folder cannot be used ({said}). Check that it is there and yours, then try again."
    return ""


def trace(error: BaseException) -> str:
    """The traceback as text, for the log: a record that keeps the error keeps its frames, and those keep tensors."""
    return "".join(traceback.format_exception(error))


def _of_the_system(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return _FULL
    name = re.split(r"[\\/]", str(error.filename).rstrip("\\/"))[-1] if isinstance(error.filename, (str, bytes)) else ""
    said = (error.strerror or _SILENT).strip().rstrip(".")
    said = said[:1].lower() + said[1:]
    return _ended(f"{printable(name)}: {said}" if name else said)


def _first_line(text: str) -> str:
    lines = (printable(" ".join(_COLOUR.sub("", line).split())) for line in text[:20_000].splitlines())
    for line in lines:
        if not line or _NO_USE.search(line):
            continue
        line = _CLASS.sub("", _PATH.sub(r"\1", _WEB.sub("an address", line))).strip(" :")
        if line:
            return _UNFORESEEN if _CODE.search(line) else _ended(line)
    return _SILENT


def _ended(text: str) -> str:
    text = text.strip().rstrip(".:;, ")
    return text if len(text) <= _MOST else text[: _MOST - 1].rstrip() + "…"


def unexpected(what: str) -> str:
    """The sentence for an error that nobody foresaw; its details are in the log."""
    return (
        f"{what} failed because of a mistake in this program. Try it again; if it fails again, the terminal shows the "
        "details and the Model tab's report can be sent to its authors."
    )

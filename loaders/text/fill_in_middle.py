"""The prompt of a model that can fill in a text before a suffix: its own marks around what comes before and after."""

from dataclasses import dataclass

from ...core.errors import BadParameter
from .token_codec import TokenCodec


@dataclass(frozen=True)
class _Marks:
    before: str
    after: str
    middle: str  # the answer follows it; empty: it follows what comes before
    suffix_first: bool = False
    bare_suffix: bool = False  # the suffix has no mark of a word's beginning before it, as sentencepiece would put there


_FAMILIES = (
    _Marks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    _Marks("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite, StableCode
    _Marks("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    _Marks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    _Marks("▁<PRE>", "▁<SUF>", "▁<MID>", bare_suffix=True),  # CodeLlama
    _Marks("[PREFIX]", "[SUFFIX]", "", suffix_first=True),  # Codestral
)
_LETTER = "☺"  # no word begins with it
_ENDS = ("▁<EOT>", "<EOT>", "<|fim_pad|>", "<|file_sep|>", "<|file_separator|>", "<|repo_name|>")  # what follows a filled gap


def fill_in_middle(codec: TokenCodec, before: str, after: str) -> tuple[list[int], tuple[int, ...]]:
    """(ids of the prompt, ids that end the answer besides the model's own). Raises BadParameter for a model without the marks."""
    for marks in _FAMILIES:
        names = [each for each in (marks.before, marks.after, marks.middle) if each]
        found = {each: codec.id_of(each) for each in names}
        if any(id is None for id in found.values()):
            continue
        first = [found[marks.before], *codec.encode(before, bos=False)]
        second = [found[marks.after], *(_bare(codec, after) if marks.bare_suffix else codec.encode(after, bos=False))]
        parts = [*second, *first] if marks.suffix_first else [*first, *second, found[marks.middle]]
        ends = tuple(id for each in _ENDS if (id := codec.id_of(each)) is not None)
        return codec.with_bos([id for id in parts if id is not None]), ends
    raise BadParameter(
        "This model cannot fill in before a suffix: its tokenizer has no marks for it. Leave `suffix` out, or load a code model.",
        "suffix",
    )


def _bare(codec: TokenCodec, text: str) -> list[int]:
    """The ids of a text in the middle of another one: behind a letter that is taken away again, as CodeLlama's own code does."""
    letter = codec.encode(_LETTER, bos=False)
    ids = codec.encode(_LETTER + text, bos=False)
    return list(ids[len(letter) :]) if list(ids[: len(letter)]) == list(letter) else list(codec.encode(text, bos=False))

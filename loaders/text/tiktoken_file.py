"""A list of tokens with ranks, as tiktoken reads it, as a tokenizer of the library `tokenizers`.

Each line has a token's bytes in base64 and its rank. Of two neighbours that are a token together, those whose token has the
lowest rank are merged first.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from ...core.errors import BadFile

# what a text is cut into before its bytes are merged
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MOST_TOKENS = 500_000  # the largest lists known have 200,000
_LONGEST_BYTES = 1000
_ALL_BYTES = 8_000_000  # of all tokens together; Qwen's have one million


def ranks_of(data: bytes, name: str) -> dict[bytes, int]:
    """Token -> rank. `name`: of the file, for sentences. Raises BadFile for what is no such list."""
    ranks: dict[bytes, int] = {}
    for line in data.splitlines():
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise BadFile(f"{name} is no list of tokens: {len(ranks) + 1:,} of its lines were read. Download it again.") from None
        if len(ranks) > _MOST_TOKENS:
            raise BadFile(
                f"{name} has more than {_MOST_TOKENS:,} tokens. Download it again, or take the model from another author."
            )
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise BadFile(f"{name} does not give each token a rank of its own, from 0 on. Download it again.")
    if missing := [each for each in range(256) if bytes([each]) not in ranks]:
        raise BadFile(
            f"{name} has no token for the byte {missing[0]}, without which some texts cannot be read. Download it again."
        )
    longest = max(map(len, ranks))
    if longest > _LONGEST_BYTES or sum(map(len, ranks)) > _ALL_BYTES:
        raise BadFile(f"{name} has a token of {longest:,} bytes, or too many long ones. Choose another model.")
    return ranks


def tokenizer_of(ranks: Mapping[bytes, int], special: Sequence[str], words: str, *, composed: bool) -> Any:
    """`special`: texts of the tokens that follow the ranks. `composed`: whether letters and accents are put together (NFC)."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = _letters()
    written = {token: "".join(letters[each] for each in token) for token in ranks}
    merges = []
    for token, _rank in sorted(ranks.items(), key=lambda each: each[1]):
        for at in range(1, len(token)):
            before, after = token[:at], token[at:]
            if before in ranks and after in ranks:
                merges.append((written[before], written[after]))
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    tokenizer: Any = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC() if composed else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in special])
    return tokenizer


def _letters() -> dict[int, str]:
    """Byte -> the letter that stands for it in a byte-level vocabulary: itself if it prints, else one after the 255th."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {each: chr(each) for each in prints}
    others = (each for each in range(256) if each not in letters)
    return letters | {each: chr(256 + at) for at, each in enumerate(others)}

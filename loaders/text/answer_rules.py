"""From the parameters of an answer to rules about a model's ids (gptq/token_rules.py): words and texts become ids here."""

from collections.abc import Collection, Sequence

from ...core.params import GenerationParams
from ...gptq.token_rules import TokenRules
from .banned_text_finder import BannedTextFinder
from .token_codec import TokenCodec


def rules_of(codec: TokenCodec, params: GenerationParams, ends: Collection[int], prompt: Sequence[int]) -> TokenRules:
    """`ends`: the ids with which the model itself ends an answer; `prompt`: the ids before the answer. Raises BadParameter."""
    all_ends = frozenset(ends) | frozenset(params.stop_token_ids)
    banned = frozenset(params.custom_token_bans)
    if params.min_tokens >= params.max_new_tokens:
        banned |= all_ends
    elif params.ignore_eos:
        banned |= frozenset(ends)
    return TokenRules(
        ends=all_ends,
        banned=banned,
        bad_words=tuple(ids for each in params.bad_words for ids in _spellings(codec, each)),
        breakers=_last_tokens(codec, params.dry_sequence_breakers) if params.dry_multiplier > 0 else frozenset(),
        texts=BannedTextFinder(codec.tokenizer, prompt, params.banned_strings) if params.banned_strings else None,
    )


def _spellings(codec: TokenCodec, word: str) -> list[tuple[int, ...]]:
    """A word's ids alone and after a space, as vLLM takes them: the second only if it is as long and begins differently."""
    word = word.lstrip() or word
    plain, spaced = (tuple(codec.encode(each, bos=False)) for each in (word, " " + word))
    found = [plain] if plain else []
    if spaced and (not plain or (spaced[0] != plain[0] and len(spaced) == len(plain))):
        found.append(spaced)
    return found


def _last_tokens(codec: TokenCodec, texts: Sequence[str]) -> frozenset[int]:
    """The token that ends in each text, alone and glued to a letter: as text-generation-webui finds them."""
    encoded = [codec.encode(begin + each, bos=False) for each in texts for begin in ("", "a")]
    return frozenset(ids[-1] for ids in encoded if ids)

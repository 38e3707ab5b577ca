"""What text-generation-inference refuses, in its words, and the tokens of a text as it tells them."""

from collections.abc import Sequence
from typing import Any

from ..loaders.contract.base import LoadedModel
from .problems import Problem
from .service import Service, require_text
from .tgi_models import Parameters

MAX_STOP_SEQUENCES = 16
MAX_BEST_OF = 4
MAX_TOP_N_TOKENS = 5


def check(wish: Parameters) -> None:
    """Raises Problem."""
    strictly = {"temperature": wish.temperature, "repetition_penalty": wish.repetition_penalty, "top_k": wish.top_k}
    for name, value in {**strictly, "max_new_tokens": wish.max_new_tokens, "best_of": wish.best_of}.items():
        if value is not None and value <= 0:
            raise Problem("invalid", f"`{name}` must be strictly positive")
    for name, share in {"top_p": wish.top_p, "typical_p": wish.typical_p}.items():
        if share is not None and not 0 < share < 1:
            raise Problem("invalid", f"`{name}` must be > 0.0 and < 1.0")
    if wish.frequency_penalty is not None and not -2 <= wish.frequency_penalty <= 2:
        raise Problem("invalid", "`frequency_penalty` must be >= -2.0 and <= 2.0")
    if len(wish.stop or ()) > MAX_STOP_SEQUENCES:
        raise Problem("invalid", f"`stop` supports up to {MAX_STOP_SEQUENCES} stop sequences. Given: {len(wish.stop or ())}")
    if (wish.best_of or 1) > MAX_BEST_OF:
        raise Problem("invalid", f"`best_of` must be > 0 and <= {MAX_BEST_OF}. Given: {wish.best_of}")
    if not 0 <= (wish.top_n_tokens or 0) <= MAX_TOP_N_TOKENS:
        raise Problem("invalid", f"`top_n_tokens` must be >= 0 and <= {MAX_TOP_N_TOKENS}. Given: {wish.top_n_tokens}")
    if wish.truncate is not None and wish.truncate < 1:
        raise Problem("invalid", "`truncate` must be strictly positive")
    if wish.decoder_input_details:
        raise Problem(
            "unsupported", "`decoder_input_details` is not supported: the prompt's log-probabilities are not computed here"
        )
    if wish.adapter_id:
        raise Problem("unsupported", "`adapter_id` is not supported: LoRA adapters are not loaded here")
    if wish.watermark:
        raise Problem("unsupported", "`watermark` is not supported")


def tokens_of(service: Service, loaded: LoadedModel, text: str, special: bool) -> Sequence[dict[str, Any]]:
    """Ids, texts and places. A token that is part of a character has that character's place."""
    if loaded.is_remote:
        raise Problem("unsupported", "The loaded model's tokens are not known here: it runs in another program.")
    require_text(text)
    if (found := loaded.codec.encode_with_offsets(text)) is not None:
        ids, places = found
    else:
        ids, places, at = loaded.encode(text, bos=False), [], 0
        for id in ids:
            length = len(service.pieces(loaded).text(id))
            places.append((min(at, len(text)), min(at + length, len(text))))
            at += length
    whole = loaded.codec.with_bos(ids) if special else ids
    tokens = [{"id": id, "text": text[a:b], "start": a, "stop": b} for id, (a, b) in zip(ids, places, strict=True)]
    added = whole[: len(whole) - len(ids)]
    return [*({"id": id, "text": service.pieces(loaded).text(id), "start": 0, "stop": 0} for id in added), *tokens]

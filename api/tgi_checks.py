"""What text-generation-inference refuses, in its words, and the tokens of a text as it lists them."""

from collections.abc import Sequence
from typing import Any

from .problems import Problem
from .prompt_fit import FittedPrompt
from .service import Service
from .tgi_models import Parameters

MAX_STOP_SEQUENCES = 16
MAX_BEST_OF = 4
MAX_TOP_N_TOKENS = 5


def check(parameters: Parameters) -> None:
    """Raises Problem."""
    strictly = {
        "temperature": parameters.temperature,
        "repetition_penalty": parameters.repetition_penalty,
        "top_k": parameters.top_k,
    }
    for name, value in {**strictly, "max_new_tokens": parameters.max_new_tokens, "best_of": parameters.best_of}.items():
        if value is not None and value <= 0:
            raise Problem("invalid", f"`{name}` must be strictly positive")
    for name, share in {"top_p": parameters.top_p, "typical_p": parameters.typical_p}.items():
        if share is not None and not 0 < share < 1:
            raise Problem("invalid", f"`{name}` must be > 0.0 and < 1.0")
    if parameters.frequency_penalty is not None and not -2 <= parameters.frequency_penalty <= 2:
        raise Problem("invalid", "`frequency_penalty` must be >= -2.0 and <= 2.0")
    if len(parameters.stop or ()) > MAX_STOP_SEQUENCES:
        raise Problem(
            "invalid", f"`stop` supports up to {MAX_STOP_SEQUENCES} stop sequences. Given: {len(parameters.stop or ())}"
        )
    if (parameters.best_of or 1) > MAX_BEST_OF:
        raise Problem("invalid", f"`best_of` must be > 0 and <= {MAX_BEST_OF}. Given: {parameters.best_of}")
    if not 0 <= (parameters.top_n_tokens or 0) <= MAX_TOP_N_TOKENS:
        raise Problem("invalid", f"`top_n_tokens` must be >= 0 and <= {MAX_TOP_N_TOKENS}. Given: {parameters.top_n_tokens}")
    if parameters.truncate is not None and parameters.truncate < 1:
        raise Problem("invalid", "`truncate` must be strictly positive")
    if parameters.watermark:
        raise Problem("unsupported", "`watermark` is not supported")


def tokens_of(service: Service, prompt: FittedPrompt, special: bool) -> Sequence[dict[str, Any]]:
    """Ids, texts and positions. A token that is part of a character has that character's position."""
    loaded, text = prompt.loaded, prompt.prompt.text
    if loaded.is_remote:
        raise Problem("unsupported", "The loaded model's tokens are not known here: it runs in another program.")
    texts = service.token_texts(loaded)
    if (found := loaded.codec.encode_with_offsets(text)) is not None:
        ids, positions = found
    else:
        ids, positions, at = loaded.encode(text, bos=False), [], 0
        for id in ids:
            length = len(texts.text(id))
            positions.append((min(at, len(text)), min(at + length, len(text))))
            at += length
    all_ids = loaded.codec.with_bos(ids) if special else ids
    tokens = [{"id": id, "text": text[a:b], "start": a, "stop": b} for id, (a, b) in zip(ids, positions, strict=True)]
    added = all_ids[: len(all_ids) - len(ids)]
    return [*({"id": id, "text": texts.text(id), "start": 0, "stop": 0} for id in added), *tokens]

"""The tokenizer of a model folder, for every loader that works with ids."""

from typing import Any

from ...core.errors import BadCheckpoint
from ...core.models import LocalModel


def read_tokenizer(model: LocalModel, *, trust_remote_code: bool = False) -> Any:
    """A transformers tokenizer. Raises BadCheckpoint with a sentence."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadCheckpoint(
            f"The tokenizer of {model.name} cannot be read ({why}). Download the model again; what is complete is kept."
        ) from error


def end_ids(*sources: Any) -> set[int]:
    """Every id that ends an answer, from generation settings and tokenizers: whatever has an `eos_token_id`."""
    ids: set[int] = set()
    for source in sources:
        found = source.get("eos_token_id") if isinstance(source, dict) else getattr(source, "eos_token_id", None)
        ids.update(found if isinstance(found, (list, tuple)) else [found] if found is not None else [])
    return ids

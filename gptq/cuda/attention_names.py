"""Our attention of one token, under names in transformers' registry, while a model's graph is recorded."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

from torch import Tensor


class _Name(str):
    """A name of ours in the registry that equals the one it stands for as well. A forward that asks for its attention's name
    must be told the same: with another one some leave it to attention to hide the tokens that an indexer did not choose."""

    def __new__(cls, name: str, stands_for: str = "") -> "_Name":
        own = super().__new__(cls, name)
        own.stands_for = stands_for
        return own

    stands_for: str
    __hash__ = str.__hash__  # the registry finds it by its own name alone

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or str.__eq__(self.stands_for, other) is True

    def __ne__(self, other: object) -> bool:
        """transformers 4 and 5.0 look into the registry only for a name that is not "eager": ours is there."""
        return (type(other) is str and other == "eager") or not self == other


_NAMES = {each: _Name(f"gptq_webui_{each}", each) for each in ("sdpa", "eager")}  # our attention beside transformers' own


class Decoder(Protocol):
    """Computes attention, of one token or of a prompt."""

    def decode(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, given: dict[str, Any]) -> Tensor | None:
        """[1, heads, T, D] -> [1, T, heads, D of the values]; None if it does not compute this."""


decoders: list[Decoder] = []  # whose graph is being recorded, or whose prompt is read


def configs_of(model: Any) -> list[Any]:
    """The configs that say which attention a model asks for; none of a model whose code calls torch's attention itself."""
    of_model = [each for each in model.modules() if hasattr(each, "config")]
    if not any(hasattr(sys.modules[type(each).__module__], "ALL_ATTENTION_FUNCTIONS") for each in of_model):
        return []
    return list({id(each.config): each.config for each in of_model}.values())


def name_attention(configs: list[Any], undo: ExitStack) -> None:
    """Put our attention before the model's own, until `undo` is closed."""
    for config in configs:
        own = getattr(config, "_attn_implementation", None)
        if own in _NAMES and _registered():
            config._attn_implementation_internal, before = _NAMES[own], config._attn_implementation_internal
            undo.callback(setattr, config, "_attn_implementation_internal", before)


def _attend(original: str) -> Callable[..., Any]:
    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **given: Any) -> Any:
        if decoders and (found := decoders[-1].decode(query, key, value, attention_mask, given)) is not None:
            return found, None
        if original == "eager":
            plain = sys.modules[type(module).__module__].eager_attention_forward
        else:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            plain = ALL_ATTENTION_FUNCTIONS[original]
        return plain(module, query, key, value, attention_mask, **given)

    return attend


def _registered() -> bool:
    """Whether transformers knows our attention; False for a version without its registry of attention and masks."""
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError:
        return False
    for original, name in _NAMES.items():
        if name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(name, _attend(original))
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return True

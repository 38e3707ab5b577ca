"""Caches of transformers that hold ids, while a stepper holds their keys and values (patched_forward.py).

Such a cache may be cut, copied, emptied and asked for its length. Whoever reads its layers fills it first: then it is a usual
cache again.
"""

import inspect
from collections.abc import Callable
from typing import Any

# What a cache says of itself without its keys and values.
_FACTS = (
    "is_compileable", "is_croppable", "is_dummy", "is_initialized", "is_linear", "is_recording_past", "is_sliding",
    "max_cache_len",
)  # fmt: skip
_QUESTIONS = ("get_max_cache_shape", "get_max_length", "activate_past_recording", "has_previous_state", "__len__", "__repr__")


def new_cache(config: Any) -> Any:
    """An empty one, as the model's own forward makes it."""
    from transformers import DynamicCache

    try:
        return DynamicCache(config=config)
    except (TypeError, AttributeError, KeyError, ValueError):
        return DynamicCache()


def kind_of_ids(usual: type, fill: Callable[[Any], None]) -> type:
    """The class of caches of ids for a usual class. `fill` makes one of them a usual cache with its keys and values."""

    def layers(self: Any) -> Any:
        if not vars(self).get("_asked"):
            fill(self)
        return vars(self)["layers"]

    def put(self: Any, value: Any) -> None:
        vars(self)["layers"] = value

    def asked(usual_one: Callable[..., Any]) -> Callable[..., Any]:
        def answer(self: Any, *positional: Any, **given: Any) -> Any:
            vars(self)["_asked"] = True
            try:
                return usual_one(self, *positional, **given)
            finally:
                vars(self).pop("_asked", None)

        return answer

    def get_seq_length(self: Any, *_: Any, **__: Any) -> int:
        return len(vars(self)["_ids"])

    def crop(self: Any, tokens: int) -> None:
        ids = vars(self)["_ids"]
        if tokens < 0:
            tokens = max(0, len(ids) + tokens)
        elif tokens == 0 and removes:
            return
        vars(self)["_ids"] = ids[:tokens]

    def reset(self: Any) -> None:
        vars(self).pop("_ids")
        self.__class__ = usual
        self.reset()

    removes = _crop_removes()
    own: dict[str, Any] = {"layers": property(layers, put), "get_seq_length": get_seq_length, "crop": crop, "reset": reset}
    for name in _FACTS:
        if isinstance(found := inspect.getattr_static(usual, name, None), property) and found.fget is not None:
            own[name] = property(asked(found.fget))
    for name in _QUESTIONS:
        if callable(found := getattr(usual, name, None)):
            own[name] = asked(found)
    return type(usual.__name__, (usual,), own)


def _crop_removes() -> bool:
    """Whether a cache's `crop` takes the number of tokens to remove, negative, as since transformers 5.24; else the length."""
    from transformers import DynamicCache

    return "tokens_to_remove" in inspect.signature(DynamicCache.crop).parameters

"""YAML of strangers: plain values, no references between parts, and numbers that are written as numbers usually are.

YAML 1.1 also knows numbers to the base 60 (`1:30`), dates, and anchors. In a hostile file, the first cost seconds of
computing and the last gigabytes, and nobody writes them in a character or a preset: they stay text or are refused.
"""

import functools
import re
from typing import Any

_WHOLE = re.compile(r"[-+]?\d{1,15}")
_NUMBER = re.compile(r"[-+]?(\d{1,30}(\.\d{0,30})?|\.\d{1,30})([eE][-+]?\d{1,3})?")


class NotPlainYaml(ValueError):
    """The text is no YAML."""


class YamlReferences(NotPlainYaml):
    """It refers to parts of itself (& and *): a few of these can stand for gigabytes."""


class YamlTooDeep(NotPlainYaml):
    """It is nested too deeply."""


def plain_yaml(text: str) -> Any:
    """The value of the first document. Raises NotPlainYaml."""
    import yaml

    try:
        return yaml.load(text, _loader())
    except NotPlainYaml:
        raise
    except RecursionError:
        raise YamlTooDeep from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, ArithmeticError, LookupError):
        raise NotPlainYaml from None


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.NodeEvent) and event.anchor is not None:  # an alias is one too
                raise YamlReferences
            return super().compose_node(parent, index)

    def number(loader: Any, node: Any) -> Any:
        text = str(loader.construct_scalar(node))
        if _WHOLE.fullmatch(text):
            return int(text)
        return float(text) if _NUMBER.fullmatch(text) else text

    def words(loader: Any, node: Any) -> str:
        return str(loader.construct_scalar(node))

    for kind, make in (("int", number), ("float", number), ("timestamp", words), ("binary", words)):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", make)
    return Loader

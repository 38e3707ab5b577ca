"""How full the context is, beside the box; and the prompt as the model gets it. Both as HTML."""

from collections.abc import Sequence
from html import escape

from ..engine.chat_context import ContextUse

_MOST_SHOWN = 400_000  # characters of a prompt


OWN = (
    '<button class="gw-act gw-own" value="tab Parameters" title="This conversation has parameters of its own. '
    'Press to see them.">own parameters</button>'
)


def meter_html(use: ContextUse | None, own: bool = False) -> str:
    """A bar and numbers; a click shows the prompt. `own`: the conversation has parameters of its own."""
    if use is None:
        return OWN if own else ""
    if use.too_long:
        words, kind = use.too_long, "gw-full"
    elif use.left_out:
        words = f"The model no longer reads the oldest {use.left_out} messages: they do not fit into its context."
        kind = "gw-full"
    elif use.used and use.room < 0.15 * use.limit:
        words, kind = f"After about {use.room:,} more tokens, the oldest messages are left out.", "gw-nearly"
    else:
        words, kind = f"Room for about {use.room:,} more tokens before the oldest messages are left out.", ""
    said = f'<span class="gw-meter-words">{escape(words)}</span>' if kind else ""
    title = escape(f"{words} Press to see the prompt as the model gets it.")
    return (
        f'{said}{OWN if own else ""}<button class="gw-act gw-meter {kind}" value="prompt" title="{title}">'
        f'<span class="gw-meter-bar"><i style="width:{use.share:.0%}"></i></span>{use.used:,} of {use.context:,}'
        '<span class="gw-wide"> tokens</span></button>'
    )


def prompt_html(pieces: Sequence[tuple[str, bool]]) -> str:
    """The prompt as the model gets it; special tokens stand out."""
    left = _MOST_SHOWN
    parts = []
    for text, is_special in pieces:
        shown = escape(text[: max(0, left)])
        left -= len(text)
        parts.append(f'<mark title="special token">{shown}</mark>' if is_special else shown)
    cut = f"<p>{-left:,} more characters are not shown.</p>" if left < 0 else ""
    close = '<button class="gw-act" value="close-prompt">Close</button>'
    head = f'<div class="gw-prompt-head"><b>The prompt as the model gets it</b>{close}</div>'
    return f'<div class="gw-prompt">{head}<pre tabindex="0">{"".join(parts)}</pre>{cut}</div>'

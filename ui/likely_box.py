"""The tokens of an answer, and what else was likely at each of them, as HTML. chat_script.py shows the list of a pressed one."""

import json
from collections.abc import Sequence
from html import escape

from ..engine.likely_tokens import MOST, AnswerToken

SCRIPT = r"""
  gw.likely = (button) => {
    const panel = button.closest('.gw-prompt'), place = find('.gw-others', panel);
    for (const each of panel.querySelectorAll('.gw-token[aria-pressed=true]')) each.setAttribute('aria-pressed', 'false');
    button.setAttribute('aria-pressed', 'true');
    const message = panel.dataset.message, at = button.dataset.at;
    const table = document.createElement('table'), rows = JSON.parse(button.dataset.others);
    for (const [text, share, special] of rows) {
      const row = table.insertRow(), word = row.insertCell(), size = row.insertCell(), more = row.insertCell();
      const code = document.createElement('code');
      code.textContent = text.replaceAll(' ', '·').replaceAll('\n', '↵'); word.append(code);
      const bar = document.createElement('span'), inner = document.createElement('i');
      bar.className = 'gw-share'; inner.style.width = share + '%'; bar.append(inner);
      size.append(bar, ' ' + share.toFixed(share < 1 ? 2 : 1) + ' %');
      if (text === button.dataset.text) { row.className = 'gw-taken'; more.textContent = 'taken'; }
      else if (at !== '' && !special) {
        const go = document.createElement('button');
        go.type = 'button'; go.className = 'gw-act'; go.textContent = 'Go on with this';
        go.value = JSON.stringify(['instead', message, at, text]); more.append(go);
      }
    }
    place.replaceChildren(table); place.scrollIntoView({block: 'nearest'});
  };
"""


def likely_html(message: int, tokens: Sequence[AnswerToken]) -> str:
    """Every token is a button; the less likely it was, the stronger its colour."""
    close = '<button class="gw-act" value="close-prompt">Close</button>'
    head = f'<div class="gw-prompt-head"><b>What else was likely</b>{close}</div>'
    hint = (
        "Press a word to see what else was likely there, as the loaded model sees it. The stronger the colour, the less likely."
    )
    cut = f" The first {MOST:,} tokens are shown." if len(tokens) >= MOST else ""
    words = "".join(_token(each) for each in tokens)
    return (
        f'<div class="gw-prompt" data-message="{message}">{head}<p class="gw-quiet">{hint}{cut}</p>'
        f'<div class="gw-tokens">{words}</div><div class="gw-others" role="status"></div></div>'
    )


def _token(each: AnswerToken) -> str:
    others = json.dumps([[one.text, round(100 * one.share, 3), one.is_special] for one in each.others])
    at = "" if each.at is None else each.at
    surprise = round(min(1.0, (1 - each.share) ** 2), 2)
    has_words = bool(each.text.strip())
    first, last = ("<br>" if has_words and "\n" in each.text else ""), "" if has_words else "<br>" * each.text.count("\n")
    shown = escape(each.text.replace("\n", "↵"))
    return (
        f'{first}<button type="button" class="gw-token" style="--gw-odd:{surprise}" title="{100 * each.share:.1f} %" '
        f'data-at="{at}" data-text="{escape(each.text)}" data-others="{escape(others)}" aria-pressed="false">{shown}</button>'
        f"{last}"
    )

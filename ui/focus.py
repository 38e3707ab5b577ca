"""Where the keyboard is after an action: on what comes next, never lost with a button that has gone."""

import json


def focus_script(*selectors: str) -> str:
    """JavaScript for an event: the keyboard goes to the first of these that can be seen, once it is there.

    Nothing happens if the visitor has moved on meanwhile: the keyboard is in a text that they type.
    """
    return (
        """() => {
  const until = performance.now() + 1500;
  const typing = document.activeElement?.matches('textarea, input:not([type=checkbox], [type=radio], [type=range])')
    ? document.activeElement : null;
  const look = () => {
    if (document.activeElement !== typing && document.activeElement?.matches('textarea, input')) return;
    for (const selector of SELECTORS) for (const place of document.querySelectorAll(selector)) {
      const at = place.matches('button, input, textarea, select, a') ? place
        : place.querySelector('textarea, input, button, select, [tabindex="0"]');
      if (at && !at.disabled && at.getClientRects().length) { at.focus(); return }
    }
    if (performance.now() < until) setTimeout(look, 50);
  };
  setTimeout(look, 30);
}"""
    ).replace("SELECTORS", json.dumps(selectors))

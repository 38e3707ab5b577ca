"""The keys of the Chat tab, the list of them under `?`, and where the keyboard is after a press."""

import json

KEYS = (
    ("Enter", "Send the message"),
    ("Shift+Enter", "New line"),
    ("Esc", "Stop the answer; close what is open"),
    ("↑ in the empty box", "Edit your last message"),
    ("Ctrl+Enter in an edited message", "Save it as a new version"),
    ("Alt+R", "Regenerate the last answer"),
    ("Alt+C", "Continue the last answer"),
    ("Alt+N", "New conversation"),
    ("Ctrl+K", "Search the conversations"),
    ("/", "Go to the message box"),
    ("?", "Show this list"),
)
BUTTON = (
    '<button class="gw-act" id="gw-keys-button" value="shortcuts" title="Keyboard shortcuts" aria-label="Keyboard shortcuts">'
    "?</button>"
)

# Inside of chat_script.py: it uses its `gw`, `find`, `press`, `box`, `phone` and `menus`.
SCRIPT = r"""
  const shown = (at) => at && at.getClientRects().length > 0;
  gw.keys = () => {
    let list = find('#gw-keys');
    if (!list) {
      list = document.createElement('dialog'); list.id = 'gw-keys'; list.setAttribute('aria-labelledby', 'gw-keys-title');
      const mac = /Mac|iPhone|iPad/.test(navigator.platform);
      const title = document.createElement('h2'); title.id = 'gw-keys-title'; title.textContent = 'Keyboard shortcuts';
      const close = document.createElement('button'); close.type = 'button'; close.textContent = 'Close';
      const table = document.createElement('dl');
      for (const [keys, what] of KEYS) {
        const name = document.createElement('dt'), words = document.createElement('dd');
        name.textContent = mac ? keys.replace('Alt+', '⌥ ').replace('Ctrl+', '⌘ ') : keys; words.textContent = what;
        table.append(name, words);
      }
      close.onclick = () => list.close();
      list.onclick = (event) => { if (event.target === list) list.close(); };
      list.append(title, table, close); root().append(list);
    }
    if (!list.open) list.showModal();
  };
  gw.search = () => {
    if (phone()) gw.drawer(true);
    const at = find('#gw-search textarea, #gw-search input');
    if (at) { at.focus(); at.select(); }
  };
  document.addEventListener('keydown', (event) => {
    if (!shown(find('#gw-main')) || event.isComposing || find('dialog[open]')) return;
    const at = event.target, typing = at.matches('input, textarea, select, [contenteditable=true]');
    const mod = event.ctrlKey || event.metaKey, alt = event.altKey && !mod && !event.shiftKey, plain = !mod && !event.altKey;
    let work = null;
    if (event.key === 'Escape') {
      if (shown(find('#gw-edit textarea'))) work = () => press('gw-edit-cancel');
      else if (!menus().length && !typing && find('#gw-prompt .gw-prompt')) work = () => gw.act('close-prompt');
      else if (!menus().length && !gw.typing && shown(find('#gw-stop'))) work = () => press('gw-stop');
    } else if (mod && event.code === 'KeyK' && !event.shiftKey) work = gw.search;
    else if (mod && event.key === 'Enter' && at === find('#gw-edit textarea')) work = () => press('gw-edit-send');
    else if (alt && event.code === 'KeyN') work = () => press('gw-new');
    else if (alt && event.code === 'KeyR') work = () => press('gw-regenerate');
    else if (alt && event.code === 'KeyC') work = () => press('gw-continue');
    else if (plain && event.key === '?' && !typing) work = gw.keys;
    else if (plain && event.key === '/' && !typing) work = () => box().focus();
    else if (plain && event.key === 'ArrowUp' && at === box() && !at.value) {
      const last = [...document.querySelectorAll('#gw-past .gw-of-user .gw-icon-edit')].pop();
      if (last) work = () => gw.act(...last.value.split(' '));
    }
    if (work) { event.preventDefault(); work(); }
  });
  // a button that goes away with its press does not take the keyboard along
  gw.refocus = (value) => {
    const until = performance.now() + 2500, began = performance.now();
    const look = () => {
      const now = document.activeElement;
      if (now && now !== document.body && shown(now) && !now.matches('.gw-hidden, .gw-hidden *')) {
        if (performance.now() < until) setTimeout(look, 120);
        return;
      }
      const same = value && [...document.querySelectorAll('button.gw-act')].find((each) => each.value === value && shown(each));
      if (same) same.focus({preventScroll: true});
      else if (performance.now() - began > 600) { if (!phone() && shown(box())) box().focus({preventScroll: true}); return; }
      if (performance.now() < until) setTimeout(look, 120);
    };
    setTimeout(look, 60);
  };
""".replace("KEYS", json.dumps([list(each) for each in KEYS], ensure_ascii=True))

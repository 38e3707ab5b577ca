"""The script of the Chat tab: it passes clicks on plain HTML buttons to the server, and keeps the view at the newest words.

Both Gradios run it when the page is loaded. A button of class gw-act holds an action in its value: words with spaces
between them, or a JSON list. The script puts it where the hidden button #gw-act finds it, and presses that button.
"""

from . import chat_files, chat_shortcuts, chat_turns, likely_box

_INSTALL = r"""
() => {
  if (window.gwChat) return;
  const gw = window.gwChat = {actions: [], asides: [], files: [], kept: '[]', stick: true, drafting: 0, measuring: 0};
  const find = (selector, within) => (within || document).querySelector(selector);
  const press = (id) => {
    const found = find('#' + id);
    if (found) (found.tagName === 'BUTTON' ? found : find('button', found)).click();
  };
  const phone = () => matchMedia('(max-width: 760px)').matches;
  const menus = () => [...document.querySelectorAll('details.gw-menu[open]')];
  // the toggle event comes too late: a list that changes before it would open the menu again
  const shut = (open) => { open.open = false; gw.menu = ''; };
  const box = () => find('#gw-message textarea');
  gw.attached = () => JSON.stringify(gw.files);
  gw.fresh = () => { // what is attached, '' if the server has it already
    const now = gw.attached(), before = gw.kept;
    gw.kept = now;
    return now === before ? '' : now;
  };
  gw.opened = () => {
    let id = '';
    try { id = sessionStorage.getItem('gptq-webui chat') || ''; } catch (error) {}
    let old = '';
    try {
      old = localStorage.getItem('gptq-webui chat') || '';
      if (old) { localStorage.removeItem('gptq-webui chat'); localStorage.setItem('gptq-webui chat (imported)', old); }
    } catch (error) {}
    return [id, old];
  };
  gw.keep = (id) => {
    try { sessionStorage.setItem('gptq-webui chat', id); if (id) sessionStorage.removeItem('gptq-webui draft'); } catch (error) {}
  };
  // the draft of a conversation that the server does not know yet
  const isNew = () => { try { return !sessionStorage.getItem('gptq-webui chat'); } catch (error) { return false; } };
  const newDraft = () => {
    try { return JSON.parse(sessionStorage.getItem('gptq-webui draft')) || ['', []]; } catch (error) { return ['', []]; }
  };
  gw.drafted = () => {
    try { if (isNew() && box()) sessionStorage.setItem('gptq-webui draft', JSON.stringify([box().value, gw.files])); }
    catch (error) {} // too long for the browser
    press('gw-draft');
  };
  const focus = () => { const at = box(); if (at && !phone() && !find('#gw-edit textarea')) at.focus(); };
  gw.drawer = (open) => { const at = find('#gw-house'); if (at) at.classList.toggle('gw-drawer-open', open); };
  const root = () => find('.gradio-container') || document.body;

  gw.await = (selector, until = performance.now() + 3000) => {
    const at = find(selector);
    if (at && at.getClientRects().length) { at.focus(); at.setSelectionRange(at.value.length, at.value.length); }
    else if (performance.now() < until) setTimeout(gw.await, 40, selector, until);
  };

TURNS
  // what the server wants the browser to do
  gw.obey = (text) => {
    if (!text || text === gw.obeyed) return;
    gw.obeyed = text;
    const it = JSON.parse(text);
    if (it.copy !== undefined) gw.copy(it.copy);
    if (it.download) {
      const link = document.createElement('a');
      link.href = URL.createObjectURL(new Blob([it.download[1]], {type: 'text/plain;charset=utf-8'}));
      link.download = it.download[0];
      document.body.append(link); link.click(); link.remove();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    }
    if (it.taken) gw.taken = true; // what the act took out of the box has arrived
    if (it.loaded && isNew()) [it.fill, it.files] = newDraft();
    if (it.fill || it.files?.length) {
      if (!gw.files.length) gw.kept = JSON.stringify(it.files || []);
      gw.fill(it.fill || '', it.files || []);
    }
    if (it.pictures) gw.seen(it.pictures);
    if (it.bottom) { gw.stick = true; gw.down(); }
    if (it.reveal) setTimeout(() => { const at = find('#gw-prompt'); if (at) at.scrollIntoView({block: 'nearest'}); }, 150);
    if (it.focus) setTimeout(focus, 60);
    if (it.edit) { gw.editing = ''; gw.await('#gw-edit textarea'); }
  };
  gw.copy = async (text) => {
    try { await navigator.clipboard.writeText(text); gw.say('Copied.'); return; } catch (error) {}
    const area = document.createElement('textarea');
    area.value = text; area.style.position = 'fixed'; area.style.opacity = '0';
    document.body.append(area); area.select();
    const done = document.execCommand('copy'); area.remove();
    gw.say(done ? 'Copied.' : 'The browser did not allow copying. Select the text and copy it.');
  };
  gw.say = (words) => {
    let note = find('#gw-toast');
    if (!note) {
      note = document.createElement('div'); note.id = 'gw-toast'; note.setAttribute('role', 'status');
      root().append(note);
    }
    note.textContent = words; note.classList.add('gw-on');
    clearTimeout(gw.toast); gw.toast = setTimeout(() => note.classList.remove('gw-on'), 1800);
  };

FILES
SHORTCUTS
LIKELY
  // a name or tags, typed in the list
  const type = (button, kind, id) => {
    if (gw.typing) gw.typing.end(true);
    const item = button.closest('.gw-item'); let old = find('.gw-open', item);
    const input = document.createElement('input');
    input.className = 'gw-rename'; input.maxLength = 120;
    input.value = kind === 'rename' ? old.textContent : (item.dataset.tags || '');
    input.setAttribute('aria-label', kind === 'rename' ? 'Name of the conversation' : 'Tags, with commas between them');
    input.placeholder = kind === 'rename' ? 'Name' : 'Tags, with commas between them';
    const end = (keep) => {
      if (!gw.typing || gw.typing.end !== end) return;
      gw.typing = null;
      const value = input.value;
      input.replaceWith(old);
      if (keep) gw.act(kind, id, value);
    };
    const stay = () => { // a list that is drawn anew keeps what one types in it
      if (input.isConnected) return;
      old = find(`.gw-item[data-id="${id}"] .gw-open`);
      if (!old) { gw.typing = null; return; }
      old.replaceWith(input); input.focus();
    };
    gw.typing = {end, stay};
    input.onkeydown = (event) => { if (event.key === 'Enter') end(true); if (event.key === 'Escape') end(false); };
    input.onblur = () => setTimeout(() => { if (document.activeElement !== input) end(true); }, 50);
    menus().forEach(shut);
    old.replaceWith(input); input.focus(); input.select();
  };

  document.addEventListener('click', (event) => {
    const away = event.target.closest && event.target.closest('.mermaid a'); // else it would open in the place of this page
    if (away) { away.setAttribute('target', '_blank'); away.setAttribute('rel', 'noopener noreferrer'); }
  }, true);
  document.addEventListener('click', (event) => {
    if (!event.isTrusted) return; // the script itself presses hidden buttons
    if (!event.target.closest || event.target.closest('.mermaid')) return; // nothing that a message draws is a button of ours
    const button = event.target.closest('button.gw-act');
    const token = event.target.closest('button.gw-token');
    if (token) return gw.likely(token);
    if (!button && event.target.closest('#gw-main button, #gw-new button, button#gw-new')) gw.refocus('');
    menus().forEach((open) => { if (!open.contains(event.target) || button) shut(open); });
    if (event.target.closest('#gw-shade, #gw-new')) gw.drawer(false);
    if (!button) return;
    event.preventDefault();
    const words = button.value.startsWith('[') ? JSON.parse(button.value) : button.value.split(' ');
    if (words[0] === 'shortcuts') return gw.keys();
    if (words[0] === 'picture') return gw.enlarge(button);
    if (words[0] === 'tab') {
      const tab = [...document.querySelectorAll('[role=tab]')].find((each) => each.textContent.trim() === words[1]);
      if (tab) tab.click();
      return;
    }
    if (words[0] === 'drawer') return gw.drawer(!find('#gw-house').classList.contains('gw-drawer-open'));
    if (words[0] === 'attach') return pick('text', gw.attach);
    if (words[0] === 'import') return pick('chats', (name, text) => gw.act('import', name, text));
    if (words[0] === 'rename' || words[0] === 'tags') return type(button, words[0], words[1]);
    if (['open', 'branch'].includes(words[0])) { gw.drawer(false); gw.stick = true; }
    gw.act(...words);
    gw.refocus(button.value);
  });
  document.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape') return;
    gw.drawer(false);
    menus().forEach(shut);
  });

  // a list that is drawn anew keeps its open menu
  document.addEventListener('toggle', (event) => {
    const item = event.target.closest && event.target.closest('.gw-item');
    if (!item) return;
    if (event.target.open) { gw.menu = item.dataset.id; find('div', event.target).scrollIntoView({block: 'nearest'}); }
    else if (gw.menu === item.dataset.id) gw.menu = '';
  }, true);
  const reopen = () => {
    if (gw.typing) gw.typing.stay();
    const item = gw.menu && find(`.gw-item[data-id="${gw.menu}"] > details`);
    if (item && !item.open) item.open = true;
  };

  // drafts, and the meter while one types
  document.addEventListener('input', (event) => {
    if (event.target !== box()) return;
    clearTimeout(gw.drafting); gw.drafting = setTimeout(gw.drafted, 800);
    gw.measure(700);
  });
  // until when one is under way: an older answer must not come after a newer one. An act that is on its way has taken what was
  // typed, and the page does not know yet where it is.
  let measures = 0;
  const measure = () => {
    if (busy || measures > performance.now()) { gw.remeasure = true; return; }
    measures = performance.now() + 20000; gw.remeasure = false; press('gw-measure');
  };
  gw.measure = (wait) => { clearTimeout(gw.measuring); gw.measuring = setTimeout(measure, wait || 120); };
  gw.measured = () => { measures = 0; if (gw.remeasure) measure(); };

  // the newest words stay in sight, unless one has scrolled up
  gw.down = () => {
    const talk = find('#gw-chat');
    if (talk) { talk.scrollTop = talk.scrollHeight; talk.gwTop = talk.scrollTop; }
  };
  const watch = () => {
    const talk = find('#gw-chat');
    if (!talk || talk.gwWatched) return;
    talk.gwWatched = true;
    const near = () => talk.scrollHeight - talk.scrollTop - talk.clientHeight < 90;
    talk.addEventListener('scroll', () => { // it may come after more words have come: they are not scrolled up to
      if (near()) gw.stick = true; else if (talk.scrollTop < (talk.gwTop ?? 0) - 1) gw.stick = false;
      talk.gwTop = talk.scrollTop;
    }, {passive: true});
    new ResizeObserver(() => { if (gw.stick) gw.down(); }).observe(talk); // as when the settings open beside it
    let asked = false;
    new MutationObserver(() => {
      if (asked) return;
      asked = true;
      for (const [who, name] of [['user', 'Your message'], ['bot', 'Answer']])  // Gradio reads out the HTML
        for (const at of talk.querySelectorAll(`[data-testid=${who}][aria-label*="<"]`)) at.setAttribute('aria-label', name);
      requestAnimationFrame(() => { asked = false; gw.pictures(); if (gw.stick) gw.down(); });
    }).observe(talk, {childList: true, subtree: true, characterData: true});
    gw.down(); gw.pictures();
    const list = find('#gw-list');
    if (list) new MutationObserver(reopen).observe(list, {childList: true, subtree: true});
  };

  gw.lost = (is) => {
    const note = find('#gw-lost');
    if (is && !note) {
      const made = document.createElement('div');
      made.id = 'gw-lost'; made.setAttribute('role', 'alert');
      made.textContent = 'The server does not answer. What is on this page stays, and goes on when the server is back.';
      root().append(made);
    }
    if (is || !note) return;
    note.remove();
    if ((window.gradio_config?.version || '').startsWith('4.')) location.reload(); // 6 does it by itself, 4 stays deaf
  };

  // what other pages and devices did
  const look = async () => {
    watch();
    const main = find('#gw-main');
    if (document.visibilityState !== 'visible' || !main || !main.offsetParent || gw.looking) return;
    gw.looking = true;
    try {
      await fetch(window.location.pathname, {method: 'HEAD', cache: 'no-store'});
      gw.lost(false);
      if (!gw.isBusy()) press('gw-look');
    } catch (error) {
      gw.lost(true);
    } finally { gw.looking = false; }
  };
  setInterval(look, 2000);
  document.addEventListener('visibilitychange', look);
  setTimeout(watch, 50);
}
"""

INSTALL = _INSTALL.replace("SHORTCUTS", chat_shortcuts.SCRIPT).replace("LIKELY", likely_box.SCRIPT)
INSTALL = INSTALL.replace("FILES\n", chat_files.SCRIPT).replace("TURNS\n", chat_turns.SCRIPT)
OPEN = "() => { (" + INSTALL + ")(); return window.gwChat.opening(); }"
TAKE_ASIDE = "(...given) => [window.gwChat.takeAside(), ...given.slice(1)]"
ATTACHED = "(...given) => [window.gwChat.attachedTexts(), ...given.slice(1)]"
KEEP = "(id) => { window.gwChat.keep(id); }"
OBEY = "(text) => { window.gwChat.obey(text); }"
MEASURE = "() => { window.gwChat.measure(); }"
MEASURED = "() => { window.gwChat.measured(); }"
ANSWERED = "(...now) => { window.gwChat.answered(...now); }"


def turn(act: str = "asked", at: int = 0) -> str:
    """For an event that takes its turn: `act` is a function of chat_turns.py, `at` where the Chat tab's inputs begin."""
    return f"(...given) => window.gwChat.{act}(given, {at})"

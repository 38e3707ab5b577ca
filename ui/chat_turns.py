"""The part of the Chat tab's script that keeps acts in order, and the user's words out of the way of late answers.

An act that may change what the page shows waits until the one before it is answered, and then tells the server what the page
shows by then. So a message that is sent right after "New conversation" is sent there, however slow the server is. What is
typed and attached belongs to the act that takes it at its press; an answer never empties the box, it only adds to it.
"""

# Inside of chat_script.py: it uses its `gw`, `find`, `press` and `box`.
SCRIPT = r"""
  const MOST_MS = 60000; // for an answer that never comes
  const CONVERSATION = ['#gw-chat', '#gw-edit', '#gw-setting'];
  const waiting = [];
  let busy = 0, count = 0, state = null, current = {};
  // parts of the page that the coming answer draws anew: what one would type there meanwhile would be lost
  const lock = (selectors) => selectors.map((each) => {
    const at = find(each), focused = document.activeElement;
    if (!at) return () => {};
    at.gwLocks = (at.gwLocks || 0) + 1; at.inert = true;
    return () => {
      at.inert = --at.gwLocks > 0;
      if (!at.inert && at.contains(focused) && document.activeElement === document.body) focused.focus({preventScroll: true});
    };
  });
  const write = (text) => {
    if (!box() || box().value === text) return;
    box().value = text; box().dispatchEvent(new Event('input', {bubbles: true}));
  };
  // what is typed and attached; the box is free for the next message from now on
  const compose = () => {
    const taken = {text: box() ? box().value : '', files: gw.files, kept: gw.kept};
    taken.fresh = gw.fresh();
    clearTimeout(gw.drafting);
    gw.files = []; gw.kept = '[]'; gw.chips(); write('');
    clearTimeout(gw.drafting); // `write` began it again
    return taken;
  };
  // what the server or a refused act gives comes before what was typed and attached meanwhile
  gw.fill = (text, files) => {
    if (files.length) {
      const have = gw.files.map((each) => JSON.stringify(each));
      gw.files = [...files.filter((each) => !have.includes(JSON.stringify(each))), ...gw.files]; gw.chips();
    }
    const typed = box() ? box().value : '';
    if (text && !typed.startsWith(text)) write(typed.trim() ? text + '\n' + typed : text);
  };
  const giveBack = (taken, until = performance.now() + MOST_MS) => {
    if (box()) { gw.fill(taken.text, taken.files); gw.kept = taken.kept; }
    else if (performance.now() < until) setTimeout(giveBack, 100, taken, until); // a page that comes back draws a new one
  };

  const over = (number) => {
    if (!busy || number !== busy) return;
    const {taken, locks} = current;
    busy = 0; current = {};
    if (taken && !gw.taken) giveBack(taken);
    locks.forEach((unlock) => unlock());
    if (taken && (box()?.value || gw.files.length)) gw.drafting = setTimeout(gw.drafted, 100); // its conversation is known now
    const next = waiting.shift();
    if (next) next.begin(true); else if (gw.remeasure) gw.measure();
  };
  // the page was drawn anew, as after a lost connection: what was on its way is not answered any more
  const lose = () => {
    const left = waiting.splice(0);
    over(busy);
    for (const {taken, locks} of left) { if (taken) giveBack(taken); locks.forEach((unlock) => unlock()); }
  };
  gw.isBusy = () => busy > 0;
  // `given`: what Gradio would send; the values of the Chat tab begin `at` that place. `first` is for the first of them.
  gw.asked = (given, at, {first, taken, closed = []} = {}) => new Promise((go) => {
    const locks = lock(closed);
    const begin = (waited) => {
      const mine = busy = ++count;
      current = {taken, locks}; gw.taken = false;
      setTimeout(over, MOST_MS, mine);
      const told = [...given];
      if (waited && state) told.splice(at + 1, state.length, ...state);
      if (taken) told[at + 4] = taken.text; else if (box() && told.length > at + 4) told[at + 4] = box().value;
      if (first) told[at] = first();
      go(told);
    };
    if (busy) waiting.push({begin, taken, locks}); else begin(false);
  });
  gw.answered = (...now) => { gw.obey(now.pop()); state = now; over(busy); };

  gw.send = (given) => {
    const taken = compose();
    gw.stick = true;
    return gw.asked(given, 0, {first: () => JSON.stringify(taken.files), taken});
  };
  gw.startNew = (given) => {
    const taken = compose();
    return gw.asked(given, 0, {first: () => taken.fresh, taken, closed: CONVERSATION});
  };
  gw.opening = () => { lose(); return gw.asked(gw.opened(), 0, {closed: CONVERSATION}); };
  gw.saveEdit = (given, at) => gw.asked(given, at, {closed: ['#gw-edit']});
  gw.play = (given, at) => gw.asked(given, at, {closed: CONVERSATION});
  gw.keepDraft = (given) => gw.asked(given, 0, {first: gw.fresh});

  // what plain buttons ask for. The first kind changes nothing that the page keeps, so it waits for nobody.
  const ASIDE = ['copy', 'prompt', 'close-prompt', 'likely', 'pictures', 'export', 'export-all'];
  const SWITCHES = ['open', 'branch', 'undelete', 'import'];
  const shownId = () => find('#gw-shown textarea, #gw-shown input')?.value || '';
  gw.act = (...words) => {
    if (ASIDE.includes(words[0])) { gw.asides.push(JSON.stringify(words)); press('gw-aside'); return; }
    if (words[0] === 'edit') { // what is typed there already stays
      const open = find('#gw-edit textarea');
      if (gw.editing === words[1]) return;
      if (open && open.getClientRects().length && find('#gw-edit-id textarea, #gw-edit-id input')?.value === words[1]) {
        open.focus(); return;
      }
      gw.editing = words[1];
    }
    const leaves = words[0] === 'delete' && words[1] === shownId();
    const taken = words[0] === 'open' || leaves ? compose() : undefined;
    if (taken) words.push(taken.fresh);
    gw.actions.push({words: JSON.stringify(words), taken, closed: leaves || SWITCHES.includes(words[0]) ? CONVERSATION : []});
    press('gw-act');
  };
  gw.takeAct = (given) => {
    const {words, taken, closed} = gw.actions.shift() || {words: '[]'};
    return gw.asked(given, 0, {first: () => words, taken, closed});
  };
  gw.takeAside = () => gw.asides.shift() || '[]';
"""

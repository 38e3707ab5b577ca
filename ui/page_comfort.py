"""What the whole page does in the browser alone: its colours and text size, the tab after a reload, a server that is gone.

All of it is one script in the page's head. The choices are kept in the browser.
"""

from .page_icon import SIZES, icon_path

ALIVE = "gw-alive"  # asked for now and then; any answer says that the server is there

_SCRIPT = """
(() => {
  const root = document.documentElement, keep = (key, value) => { try { localStorage.setItem(key, value) } catch {} };
  const kept = (key) => { try { return localStorage.getItem(key) || '' } catch { return '' } };
  const system = matchMedia('(prefers-color-scheme: dark)');
  const asked = new URLSearchParams(location.search).get('__theme');

  // colours: Gradio sets the class `dark` by the system; a choice made here comes after it
  const paint = () => {
    const look = kept('gptq-webui look') || asked || 'system', body = document.body;
    if (!body) return;
    const dark = look === 'dark' || (look !== 'light' && system.matches);
    if (body.classList.contains('dark') !== dark) body.classList.toggle('dark', dark);
    root.style.colorScheme = dark ? 'dark' : 'light';
  };
  const scales = {small: '0.9', large: '1.15', huge: '1.3'};
  const size = () => root.style.setProperty('--gw-scale', scales[kept('gptq-webui size')] || '1');
  const show = () => {
    for (const each of document.querySelectorAll('#gw-comfort select')) each.value = kept(each.dataset.key) || each.dataset.usual;
  };
  size();
  system.addEventListener('change', paint);
  addEventListener('storage', () => { paint(); size(); show() });
  document.addEventListener('change', (event) => {
    if (!event.target.matches?.('#gw-comfort select')) return;
    keep(event.target.dataset.key, event.target.value); paint(); size();
  });
  document.addEventListener('toggle', (event) => { if (event.target.id === 'gw-comfort') show() }, true);
  document.addEventListener('click', (event) => {
    const menu = document.querySelector('#gw-comfort[open]');
    if (menu && !menu.contains(event.target)) menu.open = false;
  });
  document.addEventListener('click', (event) => {
    const tab = event.target.closest?.('#gw-tabs [role=tab]');
    if (tab) {
      window.gwTab = tab.innerText.trim().toLowerCase();
      try { sessionStorage.setItem('gptq-webui tab', window.gwTab) } catch {}
    }
  }, true); // on its way down: Gradio 4.37 puts another button in place of the one that was pressed
  document.addEventListener('keydown', (event) => {
    const menu = document.querySelector('#gw-comfort[open]');
    if (event.key === 'Escape' && menu) { menu.open = false; menu.querySelector('summary').focus() }
  });

  // a server that is gone
  let bar = null;
  const say = (lost) => {
    if (lost && !bar) {
      bar = document.createElement('div');
      bar.id = 'gw-lost'; bar.setAttribute('role', 'alert');
      bar.textContent = 'The server does not answer. Is gptq-webui still running? This page goes on by itself when it is back.';
      document.body.prepend(bar);
    } else if (!lost && bar) { bar.remove(); bar = null }
  };
  const answers = async () => {
    try { await fetch('ALIVE', {cache: 'no-store', signal: AbortSignal.timeout(8000)}); return true } catch { return false }
  };
  const look = async () => {
    let lost = false;
    if (!document.hidden || bar) {
      lost = !(await answers()) && (bar !== null || !(await answers()));
      say(lost);
    }
    setTimeout(look, lost ? 1000 : 2500);
  };
  const begin = () => {
    paint(); show();
    new MutationObserver(paint).observe(document.body, {attributes: true, attributeFilter: ['class']});
    setTimeout(look, 2500);
  };
  document.body ? begin() : addEventListener('DOMContentLoaded', begin);
  addEventListener('offline', () => say(!['localhost', '127.0.0.1', '[::1]'].includes(location.hostname)));
})();
""".replace("ALIVE", ALIVE)

HEAD = f"""
<link rel="manifest" href="manifest.json">
<link rel="apple-touch-icon" href="{icon_path(SIZES[0])}">
<meta name="theme-color" content="#f8fafc" media="(prefers-color-scheme: light)">
<meta name="theme-color" content="#020617" media="(prefers-color-scheme: dark)">
<script>{_SCRIPT}</script>
"""

# JavaScript for the page's load event: the tab that was open before a reload, "" for a new page.
KEPT_TAB = "() => { try { return sessionStorage.getItem('gptq-webui tab') || '' } catch { return '' } }"

# After the server has chosen the first tab: one that was clicked while it chose comes before that.
CLICKED_TAB = """() => {
  const all = [...document.querySelectorAll('#gw-tabs [role=tab]')], name = (tab) => tab.innerText.trim().toLowerCase();
  const clicked = window.gwTab && all.find((tab) => name(tab) === window.gwTab);
  if (clicked && clicked.getAttribute('aria-selected') !== 'true') clicked.click();
}"""

MENU = """
<details id="gw-comfort">
  <summary aria-label="Colours and text size" title="Colours and text size">Aa</summary>
  <div>
    <label>Colours <select data-key="gptq-webui look" data-usual="system">
      <option value="system">As the system</option><option value="light">Light</option><option value="dark">Dark</option>
    </select></label>
    <label>Text size <select data-key="gptq-webui size" data-usual="normal">
      <option value="small">Small</option><option value="normal">Normal</option>
      <option value="large">Large</option><option value="huge">Very large</option>
    </select></label>
  </div>
</details>
"""

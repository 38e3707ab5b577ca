"""ui/message_markdown.py on a real page: what a Chatbot of either Gradio shows of a message."""

import pytest

from browser import WAIT_MS, chromium
from gptq_webui.core.chat import Message
from gptq_webui.ui import gradio_compat, theme
from gptq_webui.ui.message_markdown import message_markdown

pytestmark = pytest.mark.browser

TEXT = r"""<think>
Everything, then. <img src="http://outside.invalid/thought">

```py
never closed
</think>

| a | b |
|---|---|
| 1 | $x^2$ |

Inline \(a_1 < b_1\), $5 or $10.

$$
\int_0^1 x^2 \, dx
$$

\[ \begin{pmatrix} a & b \\ c & d \end{pmatrix} \]

```python
print("$x$ and <b>", 1)
```

```mermaid
graph TD
A[Start] --> B[End]
```

```mermaid
graph TD
C["<button class='gw-act' value='delete 1'>Own</button><br/><textarea id='gw-message'>Words</textarea>"]
C <--> D["<i id='gw-act'>x &lt;button class=gw-act>y"]
```

> ```mermaid
> graph TD
> E["<button class=gw-act>z</button>"]
> ```

```text
```

<script>document.title = "ran"</script> <img src=x onerror="document.title = 'ran'"> ![beacon](http://outside.invalid/a.png)
[bad](javascript:document.title='ran') [worse](data:text/html,<script>document.title='ran'</script>)
$\href{javascript:document.title='ran'}{y}$
"""


@pytest.fixture(scope="module")
def shown():
    messages = [
        Message("user", "hello"), Message("assistant", message_markdown(TEXT, thinking_s=12)), Message("user", "next"),
        Message("assistant", message_markdown("<think>\nstill $y$", live=True)),
    ]  # fmt: skip
    with gradio_compat.blocks("messages", theme.theme(), theme.CSS) as page:
        gradio_compat.chatbot(
            elem_id="gw-chat", render_markdown=True, sanitize_html=True, value=gradio_compat.to_display(messages)
        )
    launch = gradio_compat.launch_options(theme.theme(), theme.CSS)
    _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, **launch)
    with chromium() as browser:
        tab = browser.new_page()
        tab.set_default_timeout(WAIT_MS)
        fetched = []
        tab.on("request", lambda request: fetched.append(request.url))
        tab.goto(url)
        tab.wait_for_selector("#gw-chat details[open] .katex")
        tab.wait_for_selector("#gw-chat .token")
        yield tab, fetched, url
    page.close()


def test_formulas_of_every_kind_are_set_and_money_and_code_are_not(shown):
    tab, _fetched, _url = shown
    found = tab.eval_on_selector_all("#gw-chat annotation", "all => all.map(each => each.textContent.trim())")
    assert [each for each in found if "href" not in each] == [
        "x^2", "a_1 < b_1", r"\int_0^1 x^2 \, dx", r"\begin{pmatrix} a & b \\ c & d \end{pmatrix}", "y",
    ]  # fmt: skip
    assert tab.locator("#gw-chat .katex-display").count() == 2
    assert tab.locator("#gw-chat :text('$5 or $10')").count() and not tab.locator("#gw-chat pre .katex").count()


def test_code_has_its_language_and_a_copy_button_and_no_line_leaves_the_message(shown):
    tab, _fetched, _url = shown
    code = "#gw-chat code.language-python"
    assert tab.inner_text(code).strip() == 'print("$x$ and <b>", 1)'
    before = "each => [getComputedStyle(each, '::before').content, getComputedStyle(each).whiteSpace]"
    content, space = tab.eval_on_selector(code, before)
    assert "language-python" in content and space.startswith("pre-wrap")
    assert tab.locator("#gw-chat .code_wrap:has(code.language-python) button").count() == 1


def test_a_finished_thought_is_folded_with_its_time_and_nothing_else_is_in_it(shown):
    tab, _fetched, _url = shown
    first = tab.locator("#gw-chat details.gw-think >> nth=0")
    assert first.evaluate("each => each.open") is False
    assert first.locator("summary").inner_text() == "Thought for 12 s"
    assert not first.locator("table").count() and not tab.is_visible("#gw-chat :text('never closed')")
    first.locator("summary").click()
    assert tab.is_visible("#gw-chat :text('never closed')")


@pytest.mark.skipif(not gradio_compat.SIX, reason="Gradio 4.37 shows the source of a diagram as code")
def test_a_diagram_is_drawn(shown):
    tab, _fetched, _url = shown
    tab.wait_for_selector("#gw-chat .mermaid svg")  # it is there before its words are
    tab.wait_for_function("document.querySelector('#gw-chat .mermaid').innerText.includes('Start')")
    tab.wait_for_function("document.querySelectorAll('#gw-chat .mermaid')[1].innerText.includes('Words')")
    assert tab.locator("#gw-chat .mermaid :is(button, textarea, [id^=gw-], [class*=gw-])").count() == 0
    assert "<button class=" in tab.locator("#gw-chat .mermaid >> nth=1").inner_text()


def test_nothing_in_a_message_runs_or_is_fetched(shown):
    tab, fetched, url = shown
    assert tab.title() != "ran" and not tab.locator("#gw-chat .message img").count()
    links = tab.eval_on_selector_all("#gw-chat .message a", "all => all.map(each => each.getAttribute('href') || '')")
    assert not [each for each in links if each.startswith(("javascript", "data"))]
    assert [each for each in fetched if not each.startswith((url, "data:", "blob:")) and "outside" in each] == []

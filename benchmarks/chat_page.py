"""What the page costs a chat: `python benchmarks/chat_page.py`. Needs Chromium and the packages of the tests.

A loader without weights answers at a fixed rate, so everything that is measured is the page, its server and the browser:

- the rate of the text in the page against the same answer read from the engine without a page;
- what a turn costs the page after 200 turns against the first turn, as processor time of the browser's page and of the server:
  the median of several turns of each kind, one after the other in turn;
- the time from a key to its letter while an answer streams into a conversation of 200 turns of code.

Prints one line for each, with the machine's load beside it. A busy machine makes rates and keys worse; processor time less so.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bootstrap

bootstrap.register()

from gptq_webui.core.chat import Message, Token  # noqa: E402
from gptq_webui.core.models import LocalModel  # noqa: E402
from gptq_webui.core.params import GenerationParams  # noqa: E402
from gptq_webui.engine.chat_service import ChatService  # noqa: E402
from gptq_webui.engine.chat_store import ChatStore  # noqa: E402
from gptq_webui.engine.download_queue import Downloads  # noqa: E402
from gptq_webui.engine.engine import Engine  # noqa: E402
from gptq_webui.engine.settings import Settings  # noqa: E402
from gptq_webui.hub.library import Library  # noqa: E402
from gptq_webui.loaders.contract.fake_loader import FakeLoader, FakeModel, FakeOptions  # noqa: E402
from gptq_webui.ui import page as ui_page  # noqa: E402

RATE = 500.0  # tokens/s
TURNS = 200
_TIMES = 9  # turns of each kind
_TURN_S = 4.0  # for each, longer than it takes
CODE = "Here it is:\n\n```python\n" + "\n".join(f"def step_{at}(value):\n    return value + {at}  # one more" for at in range(6))
CODE += "\n```\n\nIt adds **one** number to another, and `step_5` is the last."
SHORT = " ".join(f"word{at}" for at in range(60))
PHRASE = "the quick brown fox jumps over the lazy dog "


@dataclass(frozen=True)
class Options(FakeOptions):
    answer: str = SHORT
    tokens_per_s: float = RATE
    context_tokens: int = 65_536


class Steady(FakeModel):
    """Its tokens come at the rate, also where a sleep takes longer than it should."""

    def _steps(self, ids: Any, params: Any, cancel: Any) -> Any:
        began = None
        for at, event in enumerate(super()._steps(ids, params, cancel)):
            began = began or time.perf_counter()
            time.sleep(max(0.0, began + at / RATE - time.perf_counter()))
            yield event


class Loader(FakeLoader):
    options = Options

    def load(self, model: LocalModel, options: Any, progress: Any) -> Any:
        from dataclasses import replace

        return Steady(model, replace(options, tokens_per_s=0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--words", type=int, default=2000, help="of the answer whose rate is measured; a word is about a token")
    parser.add_argument("--only", choices=("rates", "turns", "keys"), help="measure this alone")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        house = serve(Path(folder))
        found = {
            "load": os.getloadavg()[0],
            **(rates(house, chromium, asked.words) if asked.only in (None, "rates") else {}),
            **(turns(house, chromium) if asked.only in (None, "turns") else {}),
            **(keys(house, chromium) if asked.only in (None, "keys") else {}),
        }
        for name, value in found.items():
            print(f"{name}: {value:.3f}", flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=1) + "\n")
        house.page.close()
        house.chats.close()
        os._exit(0)  # threads of Gradio's server may take long to end


def serve(folder: Path) -> SimpleNamespace:
    (folder / "model").mkdir()
    engine = Engine(Library([folder]), Settings(folder / "settings.json"), [Loader()])
    chats = ChatService(engine, ChatStore(folder / "chats.sqlite3"))
    page = ui_page.build(engine, Downloads(engine.library), chats=chats)
    _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, **ui_page.launch_options())
    return SimpleNamespace(engine=engine, chats=chats, store=chats.store, page=page, url=url, folder=folder)


def load(house: SimpleNamespace, answer: str) -> None:
    model = LocalModel(house.folder / "model", "gptq", None, 0, None, "LlamaForCausalLM")
    house.engine.load_folder(model, options={"answer": answer})


def browser() -> Any:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from browser import chromium

    return chromium()


def visit(house: SimpleNamespace, chromium: Any) -> Any:
    tab = chromium.new_context(viewport={"width": 1280, "height": 900}).new_page()
    tab.set_default_timeout(120_000)
    tab.goto(house.url)
    tab.wait_for_function("window.gwChat && document.querySelector('#gw-list .gw-chats')")
    tab.wait_for_selector("#gw-send:visible")
    time.sleep(1)
    return tab


def ask(tab: Any, text: str, count: int) -> None:
    """Ask, and wait until so many answers are complete."""
    tab.fill("#gw-message textarea", text)
    tab.press("#gw-message textarea", "Enter")
    tab.wait_for_function(f"document.querySelectorAll('#gw-past .gw-of-assistant').length == {count}")
    tab.wait_for_selector("#gw-send:visible")


def rates(house: SimpleNamespace, chromium: Any, words: int) -> dict[str, float]:
    load(house, story(words))
    params = GenerationParams(max_new_tokens=2 * words)
    came = [
        time.perf_counter()
        for event in house.engine.chat([Message("user", "Go")], params, threading.Event())
        if isinstance(event, Token)
    ]
    bare = (words - 1) / (came[-1] - came[0])
    tab = visit(house, chromium)
    tab.get_by_role("tab", name="Parameters").click()
    tab.fill("#gw-max_new_tokens input", str(2 * words))
    tab.press("#gw-max_new_tokens input", "Enter")
    tab.get_by_role("tab", name="Chat").click()
    tab.evaluate(
        """() => { window.seen = []; const look = () => {
          const text = document.querySelector('#gw-live')?.textContent.trim().slice(-12) || '';
          const words = +(text.match(/w(\\d+)$/) || [0, 0])[1];
          if (words && (!window.seen.length || window.seen.at(-1)[1] < words)) window.seen.push([performance.now(), words]);
          requestAnimationFrame(look) }; look() }"""
    )
    ask(tab, "Go", 1)
    (first_ms, first), (last_ms, last) = tab.evaluate("[window.seen[0], window.seen.at(-1)]")
    page = (last - first) / (last_ms - first_ms) * 1000
    tab.context.close()
    return {"engine, words/s": bare, "page, words/s": page, "page against engine": page / bare}


def turns(house: SimpleNamespace, chromium: Any) -> dict[str, float]:
    """Processor seconds of a turn: the page's main thread, and this process, in which the server runs.

    First turns and turns after 200 others take turns, each in a page of its own kind that stays open and for the same time, so
    that what the machine does meanwhile, and what an idle page costs, is the same for both. The median of each kind counts.
    """
    load(house, CODE)
    short, long = visit(house, chromium), visit(house, chromium)
    long_id = talk(house, TURNS - 1)
    long.evaluate("id => window.gwChat.act('open', id)", long_id)
    long.wait_for_selector("#gw-past .gw-of-assistant")
    costs: dict[Any, list[tuple[float, float]]] = {short: [], long: []}
    for at in range(_TIMES + 1):
        for tab in (short, long):
            if tab is short:
                tab.click("#gw-new")
                tab.wait_for_function("document.querySelectorAll('#gw-past .gw-of-assistant').length == 0")
            tab.bring_to_front()
            time.sleep(2.0)
            found = turn(house, tab, "" if tab is short else long_id)
            if at:  # the first of each warms the page up
                costs[tab].append(found)
    (page_1, server_1), (page_200, server_200) = (
        [statistics.median(each) for each in zip(*costs[tab], strict=True)] for tab in (short, long)
    )
    spread = [statistics.quantiles([each[0] for each in costs[tab]], n=4) for tab in (short, long)]
    for tab in (short, long):
        tab.context.close()
    return {
        "turn 1, page, processor s": page_1,
        "turn 200, page, processor s": page_200,
        "turn 1, page, middle half": spread[0][2] - spread[0][0],
        "turn 200, page, middle half": spread[1][2] - spread[1][0],
        "turn 1, server, processor s": server_1,
        "turn 200, server, processor s": server_200,
        "turn 200 against turn 1, page": page_200 / page_1,
        "turn 200 against turn 1, both": (page_200 + server_200) / (page_1 + server_1),
    }


def turn(house: SimpleNamespace, tab: Any, id: str) -> tuple[float, float]:
    """(page, server): processor seconds from a question until some time after its answer. An `id` of "" is a new conversation."""
    before = len(house.store.path("", id)) if id else 0
    known = {each.id for each in house.store.listed("")}
    session = tab.context.new_cdp_session(tab)
    session.send("Performance.enable")
    tab.fill("#gw-message textarea", "One more")
    page_s, server_s, end = busy(session), time.process_time(), time.monotonic() + _TURN_S
    tab.press("#gw-message textarea", "Enter")
    time.sleep(_TURN_S - 0.5)
    id = id or next(each.id for each in house.store.listed("") if each.id not in known)
    path = house.store.path("", id)
    assert len(path) == before + 2 and not path[-1].writing, "the turn took longer than it is measured"
    assert tab.is_visible("#gw-send"), "the page took longer than it is measured"
    time.sleep(max(0.0, end - time.monotonic()))
    found = busy(session) - page_s, time.process_time() - server_s
    session.detach()
    return found


def keys(house: SimpleNamespace, chromium: Any) -> dict[str, float]:
    """Milliseconds from a key to the frame with its letter, while an answer streams."""
    load(house, story(12_000))
    id = talk(house, TURNS)
    house.store.set("", id, parameters={"max_new_tokens": 24_000})
    tab = visit(house, chromium)
    tab.evaluate("id => window.gwChat.act('open', id)", id)
    tab.wait_for_selector("#gw-past .gw-of-assistant")
    time.sleep(3)
    tab.fill("#gw-message textarea", "Go")
    tab.press("#gw-message textarea", "Enter")
    tab.wait_for_selector("#gw-live:has-text('w20')")
    tab.evaluate(
        """() => { window.keys = []; const at = document.querySelector('#gw-message textarea'); let pressed = 0;
          at.addEventListener('keydown', (event) => { pressed = event.timeStamp }, true);
          at.addEventListener('input', () => requestAnimationFrame(() => setTimeout(() =>
            window.keys.push(performance.now() - pressed)))) }"""
    )
    tab.focus("#gw-message textarea")
    for letter in PHRASE * 3:
        tab.keyboard.press("Space" if letter == " " else letter)
        time.sleep(0.08)
    streaming = tab.is_visible("#gw-stop")
    found = sorted(tab.evaluate("window.keys"))
    tab.click("#gw-stop")
    tab.context.close()
    assert streaming, "the answer ended before the keys"
    at = [found[int(share * (len(found) - 1))] for share in (0.5, 0.95, 1.0)]
    return {"key, ms, median": at[0], "key, ms, p95": at[1], "key, ms, slowest": at[2]}


def story(words: int) -> str:
    """Numbered words, a paragraph of 60 after the other."""
    return "".join(f"w{at}" + ("\n\n" if at % 60 == 59 else " ") for at in range(words)).strip()


def talk(house: SimpleNamespace, turns: int) -> str:
    """The id of a conversation of so many turns of code; "" for none."""
    if not turns:
        return ""
    id, parent = house.store.create("").id, None
    for at in range(turns):
        parent = house.store.add("", id, parent, "user", f"Question {at}: and how is that done in code?")
        parent = house.store.add("", id, parent, "assistant", CODE)
    return str(id)


def busy(session: Any) -> float:
    """Seconds that the page's main thread has worked."""
    metrics = {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}
    return float(metrics["TaskDuration"])


if __name__ == "__main__":
    main()

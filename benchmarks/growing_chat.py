"""A growing chat as a visitor has it: `python benchmarks/growing_chat.py FOLDER`. Times to first token, turn by turn.

Runs Engine.chat whole (template, detokenising, stop strings, prefix reuse) and compares its rate with the bare loop over
the same model. Every turn adds a message of about 64 tokens after an answer of 128.
"""

import argparse
import json
import os
import statistics
import threading
import time
from pathlib import Path

import bootstrap

bootstrap.register()

from gptq_webui.core.chat import Finish, Message, Step  # noqa: E402
from gptq_webui.core.models import LocalModel  # noqa: E402
from gptq_webui.core.params import GenerationParams  # noqa: E402
from gptq_webui.engine.engine import Engine  # noqa: E402
from gptq_webui.hub.library import Library  # noqa: E402

QUESTION = "Tell me more about that, please, and say what follows from it for a town by the sea. " * 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--answer", type=int, default=128, help="tokens")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    engine = Engine(Library([asked.folder.parent]))
    loaded = engine.load_folder(LocalModel.read(asked.folder), options={"device": asked.device, "context_tokens": 8192})
    params = GenerationParams(temperature=0.7, seed=1, max_new_tokens=asked.answer, logit_bias=((2, -100.0),))
    messages: list[Message] = []
    turns = []
    for turn in range(1, asked.turns + 1):
        messages.append(Message("user", QUESTION))
        text, finish = engine.chat(messages, params, threading.Event()).text()
        messages.append(Message("assistant", text))
        turns.append(finish)
        new = finish.prompt_tokens - finish.cached_tokens
        print(
            f"turn {turn:2}: {finish.prompt_tokens:5} tokens, {new:4} of them new, first after {finish.prefill_s:.3f} s, "
            f"{finish.tokens_per_s:.1f} tokens/s (load {os.getloadavg()[0]:.1f})",
            flush=True,
        )
    if len(turns) > 2:
        print(f"time to first token, last turn against turn 2: {turns[-1].prefill_s / turns[1].prefill_s:.2f}x")
    chat, bare = [], []
    ids = list(loaded.prompt([Message("user", QUESTION)]).ids)
    for _ in range(5):
        chat.append(engine.chat([Message("user", QUESTION)], params, threading.Event()).text()[1].tokens_per_s)
        came = [time.perf_counter() for event in loaded.generate(ids, params, threading.Event()) if isinstance(event, Step)]
        bare.append((len(came) - 1) / (came[-1] - came[0]))
    ratio = statistics.median(a / b for a, b in zip(chat, bare, strict=True))
    print(f"Engine.chat against the bare loop with the same sampling: {ratio:.2f}x ({statistics.median(chat):.1f} tokens/s)")
    if asked.json:
        asked.json.write_text(json.dumps([vars(each) for each in turns if isinstance(each, Finish)]))
    engine.unload()


if __name__ == "__main__":
    main()

"""Answers side by side, and guesses, on the CPU against one answer alone: `python benchmarks/side_by_side.py FOLDER`.

Both sides run in turns on the same loaded model; each line is the median of the rounds. Guesses are compared in processor time,
which means something on a busy machine too. `--only guesses` leaves the other parts out.
"""

import argparse
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bootstrap

bootstrap.register()

import torch  # noqa: E402

from gptq_webui.core.models import LocalModel  # noqa: E402
from gptq_webui.core.params import GenerationParams  # noqa: E402
from gptq_webui.gptq import checkpoint  # noqa: E402
from gptq_webui.gptq.generation import generate  # noqa: E402
from gptq_webui.gptq.guessing import Guesser  # noqa: E402
from gptq_webui.gptq.prefix_cache import PrefixCache  # noqa: E402
from gptq_webui.gptq.stepper_choice import stepper_for  # noqa: E402

CONTEXT = 4096
STORY = (
    "The lighthouse keeper, Maren Holt, wrote in her log at 04:15: wind north-west, 23 knots, sea rough, visibility four miles. "
    "A coaster named Brigid passed the eastern buoy with a list to port; no signal was given. At 05:40 the lamp was trimmed and "
    "the brass was cleaned. The boy from the farm brought six eggs, a letter from Aunt Tilde, and news that the bridge at "
    "Kessin had been closed because of ice. She answered the letter before breakfast and sealed it with the last of the red wax."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("answers", "guesses", "beside"), help="one part of three")
    asked = parser.parse_args()
    model = LocalModel.read(asked.folder)
    hf, _notes = checkpoint.load(model, dtype=torch.float32, device_map={"": "cpu"})
    stepper, _note = stepper_for(hf, CONTEXT, parallel=8)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asked.folder)

    def prompt(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        found: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(found["input_ids"])

    def answer(ids: Sequence[int], tokens: int, params: GenerationParams | None = None) -> Iterator[Any]:
        params = params or GenerationParams(temperature=0, max_new_tokens=tokens)
        events = generate(stepper, ids, params, threading.Event(), prefix=PrefixCache(), end_ids=(), context_tokens=CONTEXT)
        return (each for each in events)

    def seconds(
        answers: Sequence[Iterator[Any]], clock: Callable[[], float] = time.perf_counter
    ) -> tuple[float, list[list[int]]]:
        """From the first token of the last one on: (seconds, ids)."""
        running, ids, began = dict(enumerate(answers)), [[] for _ in answers], 0.0  # type: ignore[var-annotated]
        while running:
            for at in list(running):
                event = next(running[at], StopIteration)
                if event is StopIteration:
                    del running[at]
                elif hasattr(event, "id"):
                    ids[at].append(event.id)
            if not began and all(ids):
                began = clock()
        return clock() - began, ids

    print(f"{model.name}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {asked.rounds} rounds")
    texts = [
        f"Write a short story about {what}."
        for what in ("a fox", "two ships", "an old clock", "rain", "a key", "a king", "a well", "snow")
    ]
    prompts = [prompt(each) for each in texts]
    none: Any = patch.object(Guesser, "guess", lambda self, costs: [])
    found: dict[int, list[float]] = {count: [] for count in (1, 2, 4, 8)}
    for _ in range(asked.rounds if asked.only in (None, "answers") else 0):
        for count, rates in found.items():
            with none:
                took, _ids = seconds([answer(each, asked.tokens) for each in prompts[:count]])
            rates.append(count * (asked.tokens - 1) / took)
    for count, rates in found.items() if found[1] else ():
        ratio = statistics.median(a / b for a, b in zip(rates, found[1], strict=True))
        print(f"  {count} at once: {statistics.median(rates):6.1f} tokens/s together, {ratio:.2f} times one alone")

    repeating = prompt(f"Repeat the following text word for word.\n\n{STORY}")
    for name, ids, sampled in (
        ("an answer that repeats its prompt, greedy", repeating, GenerationParams(temperature=0, max_new_tokens=130)),
        (
            "the same, sampled (temperature 0.7, top p 0.9)",
            repeating,
            GenerationParams(temperature=0.7, top_p=0.9, seed=4, max_new_tokens=130),
        ),
        ("an answer that repeats little", prompts[0], GenerationParams(temperature=1.2, seed=5, max_new_tokens=130)),
    ):
        if asked.only not in (None, "guesses"):
            break
        with_, without, same = [], [], True
        for _ in range(asked.rounds):
            took, ours = seconds([answer(ids, 0, sampled)], time.process_time)
            with_.append(took)
            with none:
                took, plain = seconds([answer(ids, 0, sampled)], time.process_time)
            without.append(took)
            same = same and ours == plain
        ratio = statistics.median(b / a for a, b in zip(with_, without, strict=True))
        held = set(zip(ids, ids[1:], ids[2:], strict=False))
        triples = list(zip(ours[0], ours[0][1:], ours[0][2:], strict=False))
        share = sum(each in held for each in triples) / len(triples)
        print(
            f"  guesses, {name} ({share:.0%} of its triples stand in the prompt): {ratio:.2f} times without in processor time; "
            f"same tokens: {same}"
        )

    if asked.only not in (None, "beside"):
        stepper.close()
        return
    long = [answer(each * 8, 400) for each in prompts[:4]]
    for each in long:
        while not hasattr(next(each), "id"):
            pass
    began, short = time.perf_counter(), answer(prompt("Say hello."), 8)
    while not hasattr(next(short), "id"):
        for each in long:
            next(each, None)
    print(f"  a short request beside four long ones: first word after {time.perf_counter() - began:.2f} s")
    stepper.close()


if __name__ == "__main__":
    main()

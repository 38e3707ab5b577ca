"""What guessed tokens gain on a GPU: `python benchmarks/guess_gpu.py DIR`.

DIR becomes a folder of Mistral-7B's shape, 4 bits, whose answer is known: a token decides the next one, because the layers
add next to nothing and the output layer looks for the embedding of the token before. They are computed all the same. The prompts
hold parts of the answer: all but 30% of it in runs of about `--run` tokens, nothing of it, or pairs of its tokens that go on
otherwise. Answers with and without guesses take turns; they must be equal.
"""

import argparse
import random
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import known_answer
from make_checkpoint import make

from gptq_webui.core.chat import Step
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.cuda.answer_guesses import AnswerGuesses
from gptq_webui.gptq.cuda.guessed_step import GuessedStep
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions

FIRST, TOKENS = 1000, 513  # the answer's ids are FIRST, FIRST + 1 …


def prompts(run: int, tokens: int = 700) -> dict[str, list[int]]:
    """Each ends with the token before FIRST."""
    chance = random.Random(0)

    def noise(count: int) -> list[int]:
        return [chance.randrange(5000, 30000) for _ in range(count)]

    runs, at = [], FIRST
    while at < FIRST + TOKENS:
        length = max(2, round(chance.expovariate(1 / run)))
        runs.append(list(range(at, at + length)))
        at += length + max(1, round(length * 3 / 7))  # what is not in the prompt
    chance.shuffle(runs)
    pairs = [[at, at + 1, *noise(3)] for at in range(FIRST, FIRST + TOKENS, 5)]
    held = {"repeats 70%": list(chain.from_iterable(runs)), "repeats nothing": [], "misleads": list(chain.from_iterable(pairs))}
    return {name: noise(max(0, tokens - len(ids))) + ids + noise(5) + [FIRST - 1] for name, ids in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not (options.folder / "model.safetensors").exists():
        make(options.folder, "mistral-7b")
        known_answer.teach(options.folder)
    model = TransformersLoader().load(
        LocalModel.read(options.folder), TransformersOptions(guesses="on"), lambda share, text: None
    )
    steps: list[int] = []
    ask, step = AnswerGuesses.ask, GuessedStep.step

    def counted(self: GuessedStep, position: int, guesses: Sequence[int]) -> None:
        steps.append(len(guesses))
        step(self, position, guesses)

    GuessedStep.step = counted  # type: ignore[method-assign]
    print(
        "| text | sampling | tokens/s without | with guesses | ratio | steps with guesses, guesses |\n|---|---|---|---|---|---|"
    )
    kinds = {
        "greedy": GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=TOKENS),
        "sampled": GenerationParams(temperature=0.7, top_p=0.9, top_k=40, repetition_penalty=1, seed=1, max_new_tokens=TOKENS),
    }
    for text, prompt in prompts(options.run).items():
        for kind, params in kinds.items():
            speeds: dict[bool, list[float]] = {False: [], True: []}
            for at in range(options.rounds + 1):
                for guesses in (False, True):
                    AnswerGuesses.ask = ask if guesses else (lambda self, answers, pending=(): None)  # type: ignore[method-assign]
                    steps.clear()
                    ids, began = [], 0.0
                    for event in model.generate(prompt, params, threading.Event()):
                        if isinstance(event, Step):
                            ids.append(event.id)
                            began = began or time.perf_counter()
                    took_s = time.perf_counter() - began
                    wrong = [(at, id) for at, id in enumerate(ids) if id != FIRST + at]
                    assert len(ids) == TOKENS and not wrong, (text, kind, guesses, at, len(ids), wrong[:4])
                    if at:
                        speeds[guesses].append((TOKENS - 1) / took_s)
            without, with_ = (statistics.median(speeds[each]) for each in (False, True))
            ratio = statistics.median(b / a for a, b in zip(speeds[False], speeds[True], strict=True))
            print(f"| {text} | {kind} | {without:.0f} | {with_:.0f} | {ratio:.2f} | {len(steps)}, {sum(steps)} |", flush=True)
    model.close()


if __name__ == "__main__":
    main()

"""Whether a draft model pays on a processor: `python benchmarks/draft_cpu.py FOLDER --draft FOLDER`.

Answers with and without it take turns on the same loaded model, in processor time, which means something on a busy machine
too; they must be equal. Nothing is guessed from the conversation on either side. `--layers N`: the draft is FOLDER's own first
N layers. `--known` makes two folders below FOLDER instead, of the shapes of TinyLlama 1.1B and of a Llama with 68 million
parameters, that both say token after token in order: what a draft model gives that is always right.
"""

import argparse
import json
import shutil
import statistics
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bootstrap

bootstrap.register()

import known_answer  # noqa: E402
import make_checkpoint  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from gptq_webui.core.models import LocalModel  # noqa: E402
from gptq_webui.core.params import GenerationParams  # noqa: E402
from gptq_webui.gptq import checkpoint  # noqa: E402
from gptq_webui.gptq.drafting import Drafter  # noqa: E402
from gptq_webui.gptq.generation import generate  # noqa: E402
from gptq_webui.gptq.guessing import Guesser  # noqa: E402
from gptq_webui.gptq.prefix_cache import PrefixCache  # noqa: E402
from gptq_webui.gptq.stepper_choice import stepper_for  # noqa: E402

CONTEXT = 2048
TEXTS = (
    "Write a short story about a fox.",
    "Explain in a few sentences how a bicycle stays upright.",
    "Write a Python function that returns the prime numbers below n, and explain it.",
)
SHAPES: dict[str, dict[str, Any]] = {
    "large": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
              "num_hidden_layers": 22, "vocab_size": 32000, "max_position_embeddings": 2048},
    "small": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_key_value_heads": 12,
              "num_hidden_layers": 2, "vocab_size": 32000, "max_position_embeddings": 2048},
}  # fmt: skip


def first_layers(folder: Path, layers: int, to: Path) -> Path:
    """A folder with the first layers of a model, and everything else of it."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors*"))
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    kept = {
        name: tensor for name, tensor in state.items() if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    save_file(kept, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = layers
    config.pop("layer_types", None)
    (to / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return to


def made(folder: Path, shape: str) -> Path:
    """A folder of this shape whose answer is known."""
    if (folder / "model.safetensors").exists():
        return folder
    make_checkpoint.SHAPES[shape] = SHAPES[shape]
    make_checkpoint.make(folder, shape)
    known_answer.teach(folder)
    return folder


def stepper_of(folder: Path, guesses: str) -> Any:
    hf, _notes = checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map={"": "cpu"})
    stepper, note = stepper_for(hf, CONTEXT, guesses=guesses)
    assert stepper.kernel == "cpu", note
    return stepper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--layers", type=int, help="the draft is so many layers of FOLDER itself")
    parser.add_argument("--known", action="store_true")
    parser.add_argument("--force", action="store_true", help="ask the draft model whatever it takes")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    folder, draft_folder = asked.folder, asked.draft
    if asked.known:
        folder, draft_folder = (made(asked.folder / shape, shape) for shape in ("large", "small"))
    elif asked.layers:
        draft_folder = asked.folder.parent / f"{asked.folder.name}-{asked.layers}-layers"
        if not draft_folder.exists():
            first_layers(asked.folder, asked.layers, draft_folder)
    stepper, draft = stepper_of(folder, "auto"), stepper_of(draft_folder, "off")
    stepper.draft_with(draft, CONTEXT)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if asked.known:
        prompts = [[5000 + 7 * at % 900 for at in range(40)] + [999]]
    else:
        chats = [[{"role": "user", "content": text}] for text in TEXTS]
        prompts = []
        for each in chats:
            found: Any = tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=True)
            prompts.append(list(found["input_ids"]))

    guessed: list[int] = []
    guess = Drafter.guess

    def counted(self: Drafter, *args: Any) -> list[int]:
        guessed.append(len(found := guess(self, *args)))
        return found

    def answer(ids: list[int], params: GenerationParams, drafted: bool) -> tuple[float, list[int]]:
        """(processor seconds from the first token on, ids)."""
        ids_found: list[int] = []
        began = 0.0
        with patch.object(Guesser, "guess", lambda self, costs: []), patch.object(Drafter, "guess", counted):
            forced = None if drafted and not asked.force else (9.0 if drafted else 1.0)
            worth = Drafter.worth if forced is None else (lambda self, costs, pass_s: forced if pass_s else 1.0)
            with patch.object(Drafter, "worth", worth):
                events = generate(
                    stepper, ids, params, threading.Event(), prefix=PrefixCache(), end_ids=(), context_tokens=CONTEXT
                )
                for event in events:
                    if event is not None and hasattr(event, "id"):
                        ids_found.append(event.id)
                        began = began or time.process_time()
        return time.process_time() - began, ids_found

    print(f"{folder.name}, draft {draft_folder.name}, {torch.get_num_threads()} threads, {asked.rounds} rounds")
    for kind, params in (
        ("greedy", GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=asked.tokens)),
        ("sampled", GenerationParams(temperature=0.7, top_p=0.9, seed=4, max_new_tokens=asked.tokens)),
    ):
        ratios, same = [], True
        guessed.clear()
        for _ in range(asked.rounds):
            for ids in prompts:
                without_s, plain = answer(ids, params, False)
                with_s, ours = answer(ids, params, True)
                ratios.append(without_s / with_s)
                same = same and ours == plain
        tokens = asked.rounds * len(prompts) * (asked.tokens - 1)
        usual = stepper._batch.draft.usual
        print(
            f"  {kind}: {statistics.median(ratios):.2f} times without in processor time "
            f"({min(ratios):.2f} to {max(ratios):.2f}); "
            f"asked {len(guessed)} times in {tokens} tokens for {sum(guessed)} guesses, "
            f"right of late {usual:.0%}; same tokens: {same}",
            flush=True,
        )
    step_s, one_s = stepper._batch.draft.step_s or 0.0, stepper._batch._one_s or 0.0
    print(f"  a token of the draft takes {step_s * 1000:.1f} ms, one of the model {one_s * 1000:.1f}")
    stepper.close()


if __name__ == "__main__":
    main()

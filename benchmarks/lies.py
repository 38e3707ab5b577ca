"""Random lies about small models, on the processor: each folder is computed right, or refused in a sentence.

    python benchmarks/lies.py --lies 5000 --seed 1

The folders are those of tests/lying_folders.py. Every one is read, loaded and computed as a user's is, by one of three
kernels: the whole step, single layers, plain PyTorch. numba checks the bounds of every array. A child computes a hundred
folders with limits of time and memory, so that a crash is found, named, and costs one folder. Exit code 1 if a folder is
neither right nor refused in words.
"""

import argparse
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
os.environ["NUMBA_BOUNDSCHECK"] = "1"
if "GPTQ_WEBUI_LIES_CACHE" in os.environ or "NUMBA_CACHE_DIR" not in os.environ:
    os.environ["NUMBA_CACHE_DIR"] = os.environ.get("GPTQ_WEBUI_LIES_CACHE") or str(
        Path(tempfile.gettempdir()) / "gptq-webui-lies"
    )
else:
    os.environ["NUMBA_CACHE_DIR"] += "-boundscheck"  # numba's files do not say whether bounds are checked
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent)]
import script  # noqa: E402

script.register()

import torch  # noqa: E402
from folder_lies import lying  # noqa: E402
from lying_folders import Folder  # noqa: E402
from lying_twins import twin  # noqa: E402
from transformers import DynamicCache  # noqa: E402

from gptq_webui.core.errors import GptqWebuiError  # noqa: E402
from gptq_webui.core.models import LocalModel  # noqa: E402
from gptq_webui.gptq import checkpoint, stepper_choice  # noqa: E402
from gptq_webui.gptq.cpu import cpu_linear, kernel_trial  # noqa: E402
from gptq_webui.gptq.suitability import require_sound  # noqa: E402
from gptq_webui.gptq.transformers_stepper import TransformersStepper  # noqa: E402

TOLERANCE = 1e-2  # of the logits, relative: keys and values are kept in half precision
_SENSITIVE = 4.0  # times what that rounding alone does to the twin, where it does more
_KEYS = re.compile(r"(k_proj|v_proj|kv_proj|qkv_proj|query_key_value|c_attn|Wqkv)$")
BATCH = 100  # folders of a child
BATCH_S, MEMORY_BYTES = 600, 24 << 30  # limits of a child; torch and LLVM reserve much more than they use
NOT_WORDS = re.compile(
    r"<class|Traceback|object at 0x|\b[A-Z]\w*(?:Error|Exception|Warning|Config|ForCausalLM|LMHeadModel|Linear)\b|NoneType|"
    r"\b(?:List|Union|Dict|Optional)\[|\bself\.|__\w+__|ignore_mismatched_sizes|argument of type|unsupported operand|\n"
)


def logits_of(stepper: Any, ids: list[int], prompt: int) -> list[torch.Tensor]:
    """After the prompt, and after each single step."""
    with torch.inference_mode():
        memory = stepper.begin()
        found = [stepper.prefill(memory, ids[:prompt]).clone()[0]]
        found += [stepper.step(memory, id).clone()[0] for id in ids[prompt:]]
    return [each.float().cpu() for each in found]


def wanted_of(model: Any, ids: list[int], prompt: int) -> list[torch.Tensor]:
    rope = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
    with torch.inference_mode():
        if (
            isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "dynamic"
        ):  # each token by the length at its time
            memory_of = TransformersStepper(model)
            return logits_of(memory_of, ids, prompt)
        return [model(torch.tensor([ids[:end]])).logits[0, -1].float() for end in range(prompt, len(ids) + 1)]


def moved_by_rounding(model: Any, ids: list[int], prompt: int) -> Iterator[list[torch.Tensor]]:
    """What the twin computes where keys and values are rounded to half precision: before they are rotated, and after it."""
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, out: out.half().float())
        for name, module in model.named_modules()
        if _KEYS.search(name)
    ]
    yield wanted_of(model, ids, prompt)
    for each in hooks:
        each.remove()

    def rounded(cache: Any, keys: torch.Tensor, values: torch.Tensor, *more: Any, **given: Any) -> Any:
        return update(cache, keys.half().float(), values.half().float(), *more, **given)

    update = DynamicCache.update
    with patch.object(DynamicCache, "update", rounded):
        yield wanted_of(model, ids, prompt)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-9))


def stepper_of(hf: Any, kernel: str, device: str) -> Any:
    """As stepper_choice.py makes one. Raises BadCheckpoint."""
    if kernel in ("plain", "layers"):
        require_sound(hf)
        tried = _by_transformers(hf, kernel, device)
        tried.require_a_forward()
        return tried
    stepper, note = stepper_choice.stepper_for(hf, 64)
    if "could not be compiled" in note:
        raise RuntimeError(note)
    return stepper


def _by_transformers(hf: Any, kernel: str, device: str) -> TransformersStepper:
    if kernel == "layers":
        if device == "cpu":
            cpu_linear.replace_layers(hf, 1)
        else:
            from gptq_webui.gptq.cuda import replaced_layers

            replaced_layers.replace_layers(hf)
    return TransformersStepper(hf)


def checked(folder: Folder, path: Path, kernel: str, device: str = "cpu", tolerance: float = TOLERANCE) -> str:
    """What came of a folder: "right: …", "refused: …", or what is wrong. `kernel`: step, layers or plain."""
    folder.write(path)
    model = LocalModel.read(path)
    try:
        if model.kind != "gptq":
            raise GptqWebuiError(model.problem or f"It is of the kind {model.kind}. Choose another.")
        dtype = torch.float32 if device == "cpu" else torch.float16
        hf, notes = checkpoint.load(model, dtype=dtype, device_map={"": device})
        stepper = stepper_of(hf, kernel, device)
    except GptqWebuiError as error:
        said = str(error)
        shown = said.replace(f"({model.architecture})", "")  # what config.json says may be repeated
        if NOT_WORDS.search(shown) or not said.endswith("."):
            return f"NOT WORDS: {said}"
        return f"refused: {said}"
    weight: Any = hf.get_input_embeddings().weight
    rows = int(weight.shape[0])
    generator = torch.Generator().manual_seed(rows)
    prompt = (5, 19, 26, 40)[rows % 4]
    ids = torch.randint(0, rows, (prompt + 3,), generator=generator).tolist()
    try:
        found = logits_of(stepper, ids, prompt)
    except GptqWebuiError as error:
        return f"LOADED, THEN REFUSED: {error}"
    except IndexError:
        if (model.context_tokens or len(ids)) >= len(ids):
            raise
        return "refused: longer than its context"  # as the engine does before it asks
    finally:
        name = stepper.kernel
        stepper.close()
    try:
        dense = twin(folder, path)
        wanted = wanted_of(dense, ids, prompt)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
        if (model.context_tokens or len(ids)) < len(ids):
            return "refused: longer than its context"
        return f"NO TWIN, but loaded: {type(error).__name__} {str(error)[:160]}"
    for at, (a, b) in enumerate(zip(found, wanted, strict=True)):
        off = distance(a, b)
        if torch.isfinite(b).all() and not off < tolerance:
            rounded = [each[at] for each in moved_by_rounding(dense, ids, prompt)]
            if off < 0.1 and off < _SENSITIVE * max(distance(each, b) for each in rounded):
                continue
            if any(distance(a, each) < tolerance for each in rounded):  # a choice of experts that hung by a hair
                continue
            return f"WRONG by {off:.1e} at {at} of prompt {prompt} ({name}), {'; '.join(notes)}"
    return f"right: {name}"


def one(seed: int, number: int, path: Path, device: str = "cpu", tolerance: float = TOLERANCE) -> tuple[str, str]:
    """(the lies, what came of them)."""
    folder = lying(seed, number)
    kernel = ("step", "layers", "step", "plain", "step", "layers", "step")[number % 7]
    said = f"{folder.kind} by {kernel}: {', '.join(folder.lies) or 'the truth'}"
    try:
        return said, checked(folder, path, kernel, device, tolerance)
    except Exception as error:  # anything else would be a traceback in the page
        where = traceback.extract_tb(error.__traceback__)[-1]
        return said, f"RAISED {type(error).__name__} {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
    finally:
        shutil.rmtree(path, ignore_errors=True)


def child(seed: int, numbers: list[int], out: Path, room: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(BATCH_S)
    with out.open("a", encoding="utf-8") as file:
        for number in numbers:
            file.write(json.dumps([number]) + "\n")
            file.flush()
            file.write(json.dumps([number, *one(seed, number, room / str(number))]) + "\n")
            file.flush()


def run(seed: int, numbers: list[int], shown: bool = True) -> dict[int, tuple[str, str]]:
    """Number -> (lies, result)."""
    results: dict[int, tuple[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="gptq-webui-lies-") as made:
        todo = list(numbers)
        while todo:
            batch, out = todo[:BATCH], Path(made) / "results"
            out.unlink(missing_ok=True)
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    child(seed, batch, out, Path(made))
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
            results |= {number: (lies, what) for number, lies, what in (each for each in lines if len(each) == 3)}
            begun = [each[0] for each in lines]
            if status and begun and begun[-1] not in results:
                results[begun[-1]] = (", ".join(lying(seed, begun[-1]).lies), f"CRASHED with {status}")
            elif status and not begun:
                raise RuntimeError(f"a child ended with {status} before its first folder")
            todo = [each for each in todo if each not in results]
            if shown:
                for number in batch:
                    if number in results and not results[number][1].startswith(("right", "refused")):
                        print(f"{seed}-{number}: {results[number][0]}\n    {results[number][1]}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lies", type=int, default=150)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("GPTQ_WEBUI_SEED", "0")))
    parser.add_argument("--first", type=int, default=0, help="number of the first folder")
    parser.add_argument("--reasons", action="store_true", help="list the refusals")
    given = parser.parse_args()
    logging_off()
    kernel_trial.compiles()
    began = time.perf_counter()
    results = run(given.seed, list(range(given.first, given.first + given.lies)))
    counted = Counter(what.split(":")[0] if what.startswith(("right", "refused")) else "BAD" for _lies, what in results.values())
    kernels = Counter(what for _lies, what in results.values() if what.startswith("right"))
    if given.reasons:
        for what, times in Counter(re.sub(r"\d+", "N", what)[:150] for _lies, what in results.values()).most_common(400):
            print(f"{times:5} {what}")
    print(f"seed {given.seed}, {len(results)} folders in {time.perf_counter() - began:.0f} s: {dict(counted)}, {dict(kernels)}")
    return 1 if counted["BAD"] else 0


def logging_off() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())

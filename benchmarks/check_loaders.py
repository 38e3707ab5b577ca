"""Every loader on one GPU: the same folder, 64 greedy tokens from each, the GPU's memory before, after and after unloading.

    python benchmarks/check_loaders.py                      a demo-like folder is made (random weights, 4 and 8 bits)
    python benchmarks/check_loaders.py --models-dir DIR     the demo model's own folders, if they are there
    python benchmarks/check_loaders.py --only native,exllamav2

Needs a CUDA GPU; a loader whose library is missing is named and left out. Where two differ, the first
differing token is printed with both its candidates' logits as the native kernel sees them, and how much the
model itself enlarges a small error of its weights there (a random model has such places: two tokens between which
its attention hardly decides). Exit code 1 if a loader failed, gave memory back late (more than 200 MiB) or differs
where the candidates are no tie and the model is not shaky.
"""

import argparse
import gc
import importlib.util
import json
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _register() -> None:
    spec = importlib.util.spec_from_file_location("gptq_webui_script", ROOT / "script.py")
    assert spec is not None and spec.loader is not None
    entry = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = entry
    spec.loader.exec_module(entry)
    entry.register()


_register()
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402

from gptq_webui.core.chat import Finish, Message, Step  # noqa: E402
from gptq_webui.core.models import LocalModel  # noqa: E402
from gptq_webui.core.params import GenerationParams  # noqa: E402
from gptq_webui.engine.engine import Engine  # noqa: E402
from gptq_webui.engine.settings import Settings  # noqa: E402
from gptq_webui.hub.library import Library  # noqa: E402
from gptq_webui.loaders.choose import make_options, survey  # noqa: E402

TOKENS = 64
MIB = 1 << 20
GREEDY = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=TOKENS)
# name -> (loader, options); tried in this order, all compared with the first
ISAS = {
    "native": ("transformers", {"kernel": "native"}),
    "optimum": ("transformers", {"kernel": "optimum"}),
    "autogptq": ("autogptq", {}),
    "gptqmodel": ("autogptq", {"backend": "gptqmodel"}),
    "gptqmodel exllama_v2": ("autogptq", {"backend": "exllama_v2"}),
    "exllamav2": ("exllamav2", {}),
    "exllamav2 Q4 cache": ("exllamav2", {"cache_type": "Q4"}),
}
TIE = 0.15  # logits nearer than this may go either way in fp16
SHAKY = 20.0  # where the model itself makes an error so many times larger than elsewhere, neither token is wrong


def make_folder(folder: Path, bits: int) -> None:
    """A Llama of SmolLM2's shape with random 4- or 8-bit weights and the tests' tokenizer; tied, act-order, names of 2023."""
    import tiny

    tiny.ARCHITECTURES["llama"] = {
        "vocab_size": 288, "max_position_embeddings": 2048, "num_hidden_layers": 8, "num_attention_heads": 8, "hidden_size": 512,
        "intermediate_size": 1024, "num_key_value_heads": 4,
    }  # fmt: skip
    tiny.write(folder, bits=bits, group_size=32, act_order=True, shared_order=True, weights=f"gptq_model-{bits}bit-32g")
    tiny.write_tokenizer(folder)


def used_bytes() -> int:
    """What every program holds on the first GPU; CUDA's own context counts once it exists."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(0)
    return int(total - free)


def shakiness(hf: object, prompt: list[int], answer: list[int], logits: "dict[int, torch.Tensor]") -> list[float]:
    """For each position of an answer: the change of its logits by a change of the embeddings of 1%, as a multiple of the median.

    The model is left as it was.
    """
    weight = hf.get_input_embeddings().weight.data  # type: ignore[attr-defined]
    own = weight.clone()
    torch.manual_seed(0)
    weight += torch.randn_like(weight) * weight.abs() * 1e-2
    moved = native_logits(hf, prompt, answer)
    weight.copy_(own)
    changes = torch.stack([(moved[at] - logits[at]).norm() / logits[at].norm() for at in logits])
    return [float(each) for each in changes / changes.median()]


def compare(native: list[int], found: list[int], logits: "dict[int, torch.Tensor]", shaky: list[float]) -> tuple[str, bool]:
    """(what differs, whether that is no worse than a tie or a place where the model is shaky)."""
    at = next((at for at, (a, b) in enumerate(zip(native, found, strict=False)) if a != b), None)
    if at is None and len(native) == len(found):
        return f"the same {len(found)} tokens", True
    if at is None:
        return f"the same until one ends: {len(native)} and {len(found)} tokens", True
    seen = logits[at]
    a, b = float(seen[native[at]]), float(seen[found[at]])
    said = f"differs at token {at}: {native[at]} ({a:.4f}) natively, {found[at]} ({b:.4f}) here"
    if shaky[at] >= SHAKY:
        said += f"; the model makes a small error {shaky[at]:.0f} times larger at this token than at others"
    return said, abs(a - b) < TIE or shaky[at] >= SHAKY


def native_logits(hf: object, prompt: list[int], answer: list[int]) -> "dict[int, torch.Tensor]":
    """Logits of every position of an answer, from one forward of the native model."""
    with torch.inference_mode():
        ids = torch.tensor([[*prompt, *answer]], device=hf.get_input_embeddings().weight.device)  # type: ignore[attr-defined]
        out = hf(input_ids=ids).logits[0, len(prompt) - 1 :].float().cpu()  # type: ignore[operator]
    return dict(enumerate(out))


def through_engine(root: Path, name: str) -> None:
    """The automatic choice, streamed through Engine as the page does it."""
    engine = Engine(Library([root]), Settings(Path(tempfile.mkdtemp()) / "settings.json"))
    before = used_bytes()
    began = time.perf_counter()
    engine.load(name)
    assert engine.choice is not None and engine.loaded is not None
    print(f"  automatic choice: {engine.choice.loader.name} ({engine.choice.reason}), {time.perf_counter() - began:.1f} s")
    answer = engine.chat([Message("user", "What is the capital of France?")], GREEDY, threading.Event())
    first, text, finish = None, "", None
    began = time.perf_counter()
    for event in answer:
        first = first or time.perf_counter() - began
        if isinstance(event, Finish):
            finish = event
        else:
            text += event.text
    assert finish is not None
    print(f"  streamed {finish.new_tokens} tokens, {finish.tokens_per_s:.1f} tokens/s, first after {first:.3f} s: {text[:70]!r}")
    engine.unload()
    print(f"  after unload {(used_bytes() - before) / MIB:+.0f} MiB")


def check(local: LocalModel, cases: dict[str, tuple[str, dict]], compile_too: bool) -> bool:
    engine = Engine(Library([local.folder.parent]))
    loaders = {each.name: each for each in engine.loaders}
    reference: list[int] = []
    logits: dict[int, torch.Tensor] = {}
    shaky: list[float] = []
    well = True
    for case, (name, options) in cases.items():
        row = next(row for row in survey(local, engine.loaders, options, wanted=name) if row.loader == name)
        if row.refusal is not None:
            print(f"  {case:22} left out: {row.refusal}")
            continue
        if row.wait_s and not compile_too:
            print(f"  {case:22} left out: {row.note}")
            continue
        before = used_bytes()
        began = time.perf_counter()
        try:
            loaded = loaders[name].load(local, make_options(loaders[name], options), lambda share, text: None)
        except Exception as error:
            traceback.print_exc(limit=-3)
            print(f"  {case:22} FAILED: {error}")
            well = False
            continue
        load_s, after = time.perf_counter() - began, used_bytes()
        prompt = list(loaded.prompt([Message("user", "Tell me about the sea.")]).ids)
        ids: list[int] = []
        for _round in range(2):  # the first may compile or tune
            events = list(loaded.generate(prompt, GREEDY, threading.Event()))
            ids = [each.id for each in events if isinstance(each, Step)]
        finish = events[-1]
        assert isinstance(finish, Finish)
        if not reference:
            reference = ids
            logits = native_logits(loaded.hf, prompt, ids)
            shaky = shakiness(loaded.hf, prompt, ids, logits)
            said, fine = f"{len(ids)} tokens, the reference", True
        else:
            said, fine = compare(reference, ids, logits, shaky)
        loaded.close()
        del loaded
        left = used_bytes() - before
        fine = fine and left <= 200 * MIB
        well = well and fine
        print(
            f"  {case:22} load {load_s:6.1f} s, GPU {before / MIB:.0f} -> {after / MIB:.0f} -> {(before + left) / MIB:.0f} MiB, "
            f"{finish.tokens_per_s:7.1f} tokens/s; {said}{'' if fine else '   <-- NOT WELL'}"
        )
    return well


def over_two_gpus(local: LocalModel) -> bool:
    """The native kernel, split over two GPUs, against one GPU."""
    if torch.cuda.device_count() < 2:
        print("  two GPUs: there is one")
        return True
    half = local.size_bytes * 0.6e-9
    engine, found = Engine(Library([local.folder.parent])), []
    loader = next(each for each in engine.loaders if each.name == "transformers")
    for options in ({}, {"gpu_memory": f"{half},{half * 2}"}):
        loaded = loader.load(local, make_options(loader, options), lambda share, text: None)
        permutation = sorted({str(each) for each in (getattr(loaded.hf, "hf_device_map", None) or {"": loaded.device}).values()})
        prompt = list(loaded.prompt([Message("user", "Tell me about the sea.")]).ids)
        found.append([each.id for each in loaded.generate(prompt, GREEDY, threading.Event()) if isinstance(each, Step)])
        print(f"  native on {', '.join(permutation)}: {len(found[-1])} tokens")
        loaded.close()
    split = len(permutation) > 1
    host_tokens = "the same tokens" if found[0] == found[1] else "DIFFERENT tokens"
    print(f"  two GPUs: {host_tokens if split else 'the model was not split'}")
    return split and found[0] == found[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models-dir", type=Path, help="a folder with the demo model's folders")
    parser.add_argument("--only", help="loaders with commas: " + ", ".join(ISAS))
    parser.add_argument("--no-compile", action="store_true", help="leave out what has to be compiled first")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU that torch can use.")
        return 1
    used_bytes()  # CUDA's own context must exist before anything is measured
    torch.ones(1, device="cuda")
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, transformers {__import__('transformers').__version__}")
    cases = {name: ISAS[name] for name in (options.only.split(",") if options.only else ISAS)}
    root = options.models_dir or Path(tempfile.mkdtemp(prefix="check-loaders-"))
    folders = []
    for bits in (4, 8):
        found = [each for each in sorted(root.glob(f"*{bits}bit*")) if (each / "config.json").is_file()]
        folder = found[0] if found else root / f"random-gptq-{bits}bit-32g"
        if not found:
            make_folder(folder, bits)
        folders.append((bits, folder))
    well = True
    for bits, folder in folders:
        local = LocalModel.read(folder)
        print(f"{local.name}: {local.badge}, {json.loads((folder / 'config.json').read_text())['model_type']}")
        well = check(local, cases, not options.no_compile) and well
        through_engine(root, local.name)
        if bits == 4:
            well = over_two_gpus(local) and well
    print("well" if well else "NOT WELL")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

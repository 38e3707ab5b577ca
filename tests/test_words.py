"""Every sentence that a user gets says what was found and what to do, in a user's words.

The table below provokes errors and refusals cheaply, without weights and without a network. To add one, add a row:
a name, a function that provokes it (given an empty folder) and words that must be in the sentence.
"""

import json
import re
import threading
from types import SimpleNamespace

import pytest

from fake_library import MISTRAL, FakeLibrary
from gptq_webui.core.chat import Message
from gptq_webui.core.errors import GptqWebuiError, NotLoaded
from gptq_webui.core.foreign_errors import unexpected
from gptq_webui.core.model_ref import ModelRef
from gptq_webui.core.models import OPENED_BY, LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.core.quantize_config import QuantizeConfig
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.hub_settings import HubSettings
from gptq_webui.engine.settings import Settings
from gptq_webui.hub.library import Library
from gptq_webui.loaders.choose import all_loaders
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.ui import folders_box
from gptq_webui.ui.parameters_tab import to_params, to_values

# What no user should have to read: Python's and its libraries' own words.
INTERNAL = re.compile(
    r"<class|Traceback|object at 0x|\b[A-Z]\w*(?:Error|Exception|Warning)\b|NoneType|\b(?:List|Union|Dict|Optional)\[|errno|Errno"
    r"|\bline \d+, in |\bself\.|ignore_mismatched_sizes|__\w+__|KeyError|\bargument of type\b|\bcodec can't\b"
)
# A cure is an instruction, or names the values that are allowed.
CURE = re.compile(
    r"\b(?:Accept|Add|Ask|Check|Choose|Clear|Close|Convert|Copy|Delete|Download|Enter|Free|Install|Load|Look|Move|Name|Open|Press|"
    r"Put|Reload|Remove|Repair|Run|Save|Send|Set|Shorten|Start|Stop|Try|Type|Unload|Update|Use|Wait|Write|"
    r"look for|opened by|cannot be opened alone|must be|choose|pip install)\b"
)
CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048})


def engine_of(folder):
    return Engine(FakeLibrary(folder), Settings(folder / "settings.json"), [FakeLoader()])


def asked(folder, text, **options):
    engine = engine_of(folder)
    engine.load(MISTRAL, options=options)
    try:
        engine.chat([Message("user", text)], GenerationParams(), threading.Event())
    finally:
        engine.unload()


def folder_with(folder, **files):
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())
    model = LocalModel.read(folder)
    for text in (model.problem, *(getattr(loader.refusal(model, loader.options()), "reason", "") for loader in all_loaders())):
        if text:
            raise GptqWebuiError(text)


def shown_value(name, value):
    values = dict(
        zip([each for each, row, _ in GenerationParams.table() if row.shown], to_values(GenerationParams()), strict=True)
    )
    to_params(list((values | {name: value}).values()))


def added(folder, text):
    engine = SimpleNamespace(library=SimpleNamespace(roots=(folder,)))
    if said := folders_box.refusal(text, engine)[1]:
        raise GptqWebuiError(said)


def mirror(folder, address):
    HubSettings(Library([folder]).hub, Settings(folder / "settings.json")).set_endpoint(address)


def said(text):
    raise GptqWebuiError(text)


def raised(error):
    raise error


ROWS = [
    *[(f"name {text!r}", lambda _f, text=text: ModelRef.parse(text), ("owner/name",))
      for text in ("", "nonsense", "a/b/c/d", "a/b:", "../../etc", "a b/c", "x" * 5000, "owner/na\0me", "http://example.com/a")],
    *[(f"{name}={value!r}", lambda _f, name=name, value=value: GenerationParams(**{name: value}), (name,))
      for name, value in (("temperature", 99), ("temperature", "hot"), ("top_p", float("nan")), ("max_new_tokens", 10**7),
                          ("top_k", 0.5), ("stop", "x"), ("stop", [""]), ("logit_bias", 5), ("seed", -7), ("seed", 2**40))],
    *[(f"the page's {name}={value!r}", lambda _f, name=name, value=value: shown_value(name, value), (label,))
      for name, value, label in (("temperature", 99, "Temperature"), ("temperature", None, "Temperature"),
                                 ("max_new_tokens", 10**7, "Max new tokens"), ("top_p", float("inf"), "Top p"))],
    ("no model", lambda _f: raised(NotLoaded()), ("No model is loaded",)),
    ("an unknown model", lambda f: Library([f]).get("nothing"), ("nothing",)),
    ("deleting an unknown model", lambda f: Library([f]).remove("nothing"), ("nothing",)),
    ("a question that is too long", lambda f: asked(f, "word " * 400, context_tokens=20), ("20",)),
    ("a load that the loader refuses", lambda f: engine_of(f).load(MISTRAL, options={"refuse": "It is too big"}), ("too big",)),
    ("back to nothing", lambda f: engine_of(f).load_previous(), ()),
    *[(f"a folder {text!r}", lambda f, text=text: added(f, text), ())
      for text in ("", "/nowhere/at/all", "/proc", "/proc/1", "/", "/dev", "a\0b", "~nobody-of-this-name/x", "/etc/hostname",
                   "x" * 5000)],
    *[(f"a mirror {text!r}", lambda f, text=text: mirror(f, text), (text,))
      for text in ("no address", "ftp://x", "javascript:alert(1)")],
    *[(f"weights of {kind}", lambda _f, kind=kind: said(OPENED_BY[kind]), ()) for kind in OPENED_BY],
    ("an empty folder", lambda f: folder_with(f), ()),
    ("no JSON", lambda f: folder_with(f, config__json="{", model__safetensors=b"\0" * 20), ("config.json",)),
    ("a list for a config", lambda f: folder_with(f, config__json="[]", model__safetensors=b"\0" * 20), ("config.json",)),
    ("a deep config", lambda f: folder_with(f, config__json="[" * 100_000, model__safetensors=b"\0" * 20), ("config.json",)),
    ("weights cut short", lambda f: folder_with(f, config__json=CONFIG, model__safetensors=b"\xff" * 9), ("model.safetensors",)),
    ("a Git LFS pointer", lambda f: folder_with(
        f, config__json=CONFIG, model__safetensors="version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), ("LFS",)),
    *[(f"quantize_config {values}", lambda _f, values=values: QuantizeConfig.from_json(json.loads(values)), ("quantisation",))
      for values in ('{"bits": "four"}', '{"bits": 77}', '{"bits": 4, "group_size": "x"}')],
    ("an error that nobody foresaw", lambda _f: said(unexpected("Verifying Llama")), ("Verifying Llama",)),
]  # fmt: skip


@pytest.mark.parametrize(("provoke", "words"), [row[1:] for row in ROWS], ids=[row[0][:50] for row in ROWS])
def test_a_sentence_says_what_was_found_and_what_to_do(provoke, words, tmp_path):
    with pytest.raises(GptqWebuiError) as raised:
        provoke(tmp_path)
    text = str(raised.value)
    assert not INTERNAL.search(text), text
    assert CURE.search(text), text
    assert all(word in text for word in words), text
    assert text[0].isupper() or not text[0].isalpha() or words, text
    assert text.rstrip()[-1] in ".)!?", text
    assert len(text) < 800, text

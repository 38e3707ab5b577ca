"""Every error of this package, gathered from its source: each class is provoked, and each sentence says what to do.

A new class of error without a row below, and a new sentence without a cure, fail here.
"""

import errno
import re
import threading

import error_texts
import pytest
from test_words import CURE, INTERNAL, asked, engine_of

from fake_library import MISTRAL
from gptq_webui.core.character import read_book
from gptq_webui.core.chat import Message
from gptq_webui.core.errors import GptqWebuiError, NotLoaded
from gptq_webui.core.folder_files import read_json
from gptq_webui.core.model_ref import ModelRef
from gptq_webui.core.params import GenerationParams
from gptq_webui.core.quantize_config import QuantizeConfig
from gptq_webui.engine import chat_formats, preset_file
from gptq_webui.engine.chat_store import ChatStore
from gptq_webui.engine.preset_store import PresetStore
from gptq_webui.engine.request_queue import RequestQueue
from gptq_webui.hub import hub_errors, model_folder
from gptq_webui.hub.library import Library
from gptq_webui.hub.repository import Hub
from gptq_webui.loaders.contract.fake_loader import FakeModel

REPO = "owner/name"

# Read from the source: a value stands for words as often as a name does, so any verb of an instruction will do.
A_CURE = re.compile(
    r"\b(?:accept|add|again|ask|change|check|choose|clear|close|compare|convert|copy|correct|delete|enter|free|give|install|leave|"
    r"load (?:a|another|it|that|the)|look|make|measure|move|open|press|put|reload|remove|rename|repair|restart|run|save|see /|"
    r"send|set|shorten|start|stop|take it|try|turn on|turn off|type|unload|unset|update|use|wait|write|rather|needs?|must|up to|"
    r"between|go from|from -?\d+ to|are 0 to|there are: …|can be (?:read|measured)|call|name (?:it|one|a|an)|"
    r"split|versions 1 to|is missing|download (?:it|the))\b|/\w+ (?:shows?|makes|lists)|a pipe: ",
    re.IGNORECASE,
)
NO_INSTRUCTION = re.compile(
    r"There is no|was downloaded|[Nn]othing was (?:downloaded|loaded)|cannot be (?:read|opened)|is loaded now"
)
WITHOUT_A_CURE = {  # there is no more to say, or the value is a whole sentence with its cure
    "The model could not be loaded; the server's log says why. Nothing is loaded now.",
    "The server failed; its log says why.",
    "There is no key called …. There are: ….",
    "There is no loader called …. There are: ….",
    "There is no chat template called …. There are: ….",
    "Stopped. What arrived is kept; the same command continues from there.",
    "Loading … was stopped.",
    "A packed layer was used before its weights were loaded.",  # a mistake of ours
    "…: …", "tools: …", "… does not fit. …", "… cannot be repaired: …", "… cannot be opened: …", "… Nothing was downloaded.",
    "… is incomplete on the Hub: … is not there. …", "… has no file ….…",
    "There is no parameter ….…", "… has no known ending. There are: ….",
    "The engine at … stopped in the middle of the answer (…). …",
}  # fmt: skip
NOTES = {"NoCompiler"}  # why fast kernels are not used: a note beside a model that is computed in another way
WHOLE_PATHS = {
    "api/auth.py: self.path",  # its owner is to delete it
    "app/chat_slash.py: path", "app/engine_commands.py: folder", "engine/evaluation.py: folder", "hub/upload.py: folder",
    "engine/disk_inventory.py: folder",  # of a model that the owner wants to see where no window can open
    *(f"hub/{name}.py: file.path" for name in ("download", "download_folder", "file_download")),  # within a repository
}  # fmt: skip
IN_WORDS_OF_TGI = "api/tgi"  # its clients know its own sentences

SENTENCES = list(error_texts.sentences())


def test_the_source_is_read():
    assert len(SENTENCES) > 350 and len(error_texts.error_classes()) >= 29


@pytest.mark.parametrize(("where", "name", "text"), SENTENCES, ids=[where for where, _name, _text in SENTENCES])
def test_a_sentence_in_the_source_says_what_to_do(where, name, text):
    assert not INTERNAL.search(text), text
    if name in NOTES or where.startswith(IN_WORDS_OF_TGI):
        return
    assert text.rstrip()[-1] in f".)!?{error_texts.HOLE}" or "pip install" in text, text
    if text not in WITHOUT_A_CURE:
        assert A_CURE.search(NO_INSTRUCTION.sub("", text)), text


def test_a_sentence_names_a_folder_and_does_not_say_where_it_is():
    """Whoever uses the page or the API has no business with it; those below are for the terminal, or for who asks where."""
    assert set(error_texts.paths()) == WHOLE_PATHS


def test_no_sentence_is_excused_that_is_no_longer_there():
    assert {text for _where, _name, text in SENTENCES} >= WITHOUT_A_CURE


def fault(kind, *arguments):
    raise kind(*arguments)


def failing(folder, monkeypatch):
    engine = engine_of(folder)
    engine.load(MISTRAL)
    monkeypatch.setattr(FakeModel, "_steps", lambda *_: fault(RuntimeError, "at <class 'thing'> KeyError: 'x'\nTraceback"))
    try:
        engine.chat([Message("user", "Hi")], GenerationParams(), threading.Event()).text()
    finally:
        engine.unload()


def loading(folder, **options):
    engine_of(folder).load(MISTRAL, options=options)


def stopped(folder):
    engine = engine_of(folder)
    with engine.slot.change() as cancel:
        cancel.set()
        engine.load(MISTRAL)


def while_it_changes(folder):
    engine, found = engine_of(folder), []

    def other():
        try:
            engine.load(MISTRAL)
        except GptqWebuiError as error:
            found.append(error)

    with engine.slot.change():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(30)
    raise found[0]


def two_at_once():
    queue = RequestQueue(limit=1)
    queue.join("one")
    queue.join("two")


def listing(server, ref, token=None, **repository):
    server.add(REPO, {"README.md": b"nothing"}, **repository)
    return Hub(server.url, token).listing(ref)


PROVOKED = {  # class -> (folder, monkeypatch, Hub on loopback) -> it is raised
    "BadModelName": lambda f, m, h: ModelRef.parse("a b/c"),
    "NoSuchRepository": lambda f, m, h: Hub(h.url).listing(ModelRef(REPO)),
    "NoSuchBranch": lambda f, m, h: listing(h, ModelRef(REPO, "nope")),
    "AccessDenied": lambda f, m, h: listing(h, ModelRef(REPO), "hf_wrong"),
    "HubUnreachable": lambda f, m, h: (m.setenv("HF_HUB_OFFLINE", "1"), listing(h, ModelRef(REPO))),
    "WrongRepository": lambda f, m, h: (listing(h, ModelRef(REPO)), Library([f]).plan(ModelRef(REPO))),
    "DiskFull": lambda f, m, h: fault(lambda: model_folder.disk_sentence(OSError(errno.ENOSPC, "No space left"), f)),
    "DownloadFailed": lambda f, m, h: fault(lambda: hub_errors.refusal(418, {}, REPO, h.url, False)),
    "NoSuchRevision": lambda f, m, h: fault(
        lambda: hub_errors.refusal(404, {"X-Error-Code": "RevisionNotFound"}, REPO, h.url, False)
    ),
    "BadFile": lambda f, m, h: ((f / "config.json").write_text("[1"), read_json(f / "config.json")),
    "BadQuantizeConfig": lambda f, m, h: QuantizeConfig.from_json({"bits": 77}),
    "BadCheckpoint": lambda f, m, h: climbing_index(f),
    "NoSuchModel": lambda f, m, h: Library([f]).get("nothing"),
    "LoadRefused": lambda f, m, h: loading(f, refuse="it is too big"),
    "LoadFailed": lambda f, m, h: loading(f, fail="<class 'Thing'> object at 0x7f00"),
    "NotEnoughMemory": lambda f, m, h: loading(f, fail="CUDA out of memory. Tried to allocate 2.00 GiB"),
    "LoadCancelled": lambda f, m, h: stopped(f),
    "NotLoaded": lambda f, m, h: fault(NotLoaded),
    "AnswerFailed": lambda f, m, h: failing(f, m),
    "PromptTooLong": lambda f, m, h: asked(f, "word " * 400, context_tokens=20),
    "BadParameter": lambda f, m, h: GenerationParams(temperature=99),
    "Busy": lambda f, m, h: while_it_changes(f),
    "QueueFull": lambda f, m, h: two_at_once(),
    "NoSuchChat": lambda f, m, h: ChatStore(f / "chats.db").get("me", "nothing"),
    "BadPreset": lambda f, m, h: PresetStore(f / "presets.json").save("", "", {}),
    "BadPresetFile": lambda f, m, h: preset_file.from_yaml("just words"),
    "BadCharacter": lambda f, m, h: read_book({"entries": [{}] * 100_000}),
    "BadChatFile": lambda f, m, h: chat_formats.read_file("chat.json", b'{"a": 1}'),
}
FAMILIES = {"GptqWebuiError", "HubError", "ModelError"}  # of others; what is raised as one of them is judged by its text


def climbing_index(folder):
    from gptq_webui.gptq.weights_index import _weight_map

    (folder / "index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    _weight_map(folder / "index.json")


def test_every_class_of_error_has_its_row():
    assert {*PROVOKED, *FAMILIES, *NOTES} == error_texts.error_classes()


@pytest.mark.parametrize("name", PROVOKED)
def test_every_class_of_error_is_a_sentence_when_it_is_provoked(name, tmp_path, monkeypatch, hub_server):
    with pytest.raises(GptqWebuiError) as caught:
        PROVOKED[name](tmp_path, monkeypatch, hub_server)
    text = str(caught.value)
    assert type(caught.value).__name__ == name, text
    assert not INTERNAL.search(text) and "\n" not in text.strip(), text
    assert name == "LoadCancelled" or CURE.search(text) or A_CURE.search(text), text
    assert text.rstrip()[-1] in ".)!?" and len(text) < 800, text


@pytest.mark.parametrize(
    "answered",
    [
        (401, {}), (403, {}), (404, {}), (403, {"X-Error-Code": "GatedRepo"}), (401, {"X-Error-Code": "GatedRepo"}),
        (404, {"X-Error-Code": "RepoNotFound"}), (404, {"X-Error-Code": "EntryNotFound"}), (410, {}), (451, {}),
        (403, {"X-Error-Message": "This repository has been disabled"}), (400, {"X-Error-Message": "<html>bad</html>"}),
    ],
    ids=str,
)  # fmt: skip
def test_every_status_of_the_hub_is_a_sentence(answered):
    for with_token in (True, False):
        text = str(hub_errors.refusal(*answered, REPO, "https://huggingface.co", with_token))
        assert A_CURE.search(text) and not INTERNAL.search(text) and text[-1] in ".)", text


@pytest.mark.parametrize("body", [b"<html>log in</html>", b"", b"[]", b'{"sha": 5}', b"null", b'{"siblings": [{}], "sha": "x"}'])
def test_what_is_no_list_of_files_is_a_sentence(body, hub_server, monkeypatch):
    monkeypatch.setattr("gptq_webui.hub.hub_request.read", lambda *_args, **_kw: body)
    with pytest.raises(GptqWebuiError) as caught:
        Hub(hub_server.url).listing(ModelRef(REPO))
    assert "cannot be read" in str(caught.value) and A_CURE.search(str(caught.value)), caught.value


def test_a_message_of_a_chat_is_never_in_an_error(tmp_path):
    secret = "a private word"
    with pytest.raises(GptqWebuiError) as caught:
        asked(tmp_path, f"{secret} " * 400, context_tokens=20)
    assert secret not in str(caught.value)
    assert Message("user", secret).text == secret

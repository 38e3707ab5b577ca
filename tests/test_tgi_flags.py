"""app/tgi_flags.py and app/first_model.py: TGI's command line, as the model cards print it, in our words."""

import pytest

import tiny
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.app import access_flags, tgi_flags
from gptq_webui.app.cli import parsers
from gptq_webui.app.first_model import first_model
from gptq_webui.core.errors import BadModelName, BadParameter, DownloadFailed
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader

MODEL_CARD = (  # the last lines of TheBloke's cards under "Serving this model from TGI"
    "--model-id TheBloke/Mistral-7B-Instruct-v0.2-GPTQ --port 3000 --quantize gptq "
    "--max-input-length 3696 --max-total-tokens 4096 --max-batch-prefill-tokens 4096"
)


def understood(text):
    options, said = parsers()[0].parse_args(["serve", *text.split()]), []
    tgi_flags.understand(options, said.append)
    return options, said


def test_the_model_cards_line_is_understood():
    options, said = understood(MODEL_CARD)
    assert (options.port, options.context, options.max_input_length) == (3000, 4096, 3696)
    assert access_flags.host_of(options) == "127.0.0.1" and not access_flags.is_wide(options)
    assert len(said) == 1 and "--max-batch-prefill-tokens" in said[0]


def test_more_of_tgis_flags_are_ours():
    options, _said = understood(
        "--model-id a/b --revision gptq-4bit --hostname 0.0.0.0 --max-concurrent-requests 7 --dtype float16"
    )
    assert access_flags.host_of(options) == "0.0.0.0" and access_flags.is_wide(options)
    assert (options.queue, options.dtype, options.revision) == (7, "fp16", "gptq-4bit")


@pytest.mark.parametrize(
    ("line", "limit"),
    [("", None), ("--listen", 16), ("--share", 16), ("--listen --per-client 0", None), ("--per-client 3", 3)],
)
def test_one_address_may_have_so_many_answers(line, limit):
    assert access_flags.per_client(parsers()[0].parse_args(["serve", *line.split()])) == limit


def test_a_limit_below_zero_is_refused():
    with pytest.raises(BadParameter, match="--per-client -1"):
        access_flags.per_client(parsers()[0].parse_args(["serve", "--per-client", "-1"]))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--quantize awq", "serves GPTQ models"),
        ("--max-input-length 4096 --max-total-tokens 4096", "must be smaller"),
        ("--max-input-length 0", "above 0"),
    ],
)
def test_what_cannot_be_is_a_sentence(line, words):
    with pytest.raises(BadParameter, match=words):
        understood(line)


@pytest.fixture
def house(tmp_path):
    library = FakeLibrary(tmp_path)
    library.pause_s = 0.0
    engine = Engine(library, Settings(tmp_path / "settings.json"), [FakeLoader()])
    return engine, Downloads(library)


def test_a_model_that_is_here_is_not_downloaded(house):
    engine, downloads = house
    said = []
    for text in (MISTRAL, "TheBloke/Mistral-7B-Instruct-v0.2-GPTQ"):
        assert first_model(engine, downloads, text, None, said.append) == MISTRAL
    assert said == [] and not downloads.active()


def test_another_one_is_downloaded_with_its_branch(house):
    said = []
    assert first_model(*house, "owner/name", "gptq-4bit-32g", said.append) == "owner_name_gptq-4bit-32g"
    assert said == ["Downloading owner/name:gptq-4bit-32g …"]
    with pytest.raises(DownloadFailed, match="no repository nowhere/x"):
        first_model(*house, "nowhere/x", None, said.append)
    with pytest.raises(BadModelName):
        first_model(*house, "what is this?", None, said.append)


def test_a_folder_anywhere_will_do(house, tmp_path):
    tiny.write(tmp_path / "elsewhere" / "my-model")
    engine, downloads = house
    assert first_model(engine, downloads, str(tmp_path / "elsewhere" / "my-model"), None, print) == "my-model"
    assert tmp_path / "elsewhere" in engine.library.roots

"""Our OpenAPI description, taken at its word by schemathesis: whatever fits it, and much that does not, is no 500."""

import pytest

from api_server import ApiServer, settled
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader

schemathesis = pytest.importorskip("schemathesis", reason="the newest environment has it")
hypothesis = pytest.importorskip("hypothesis")

EXAMPLES = 2  # of each call; by hand 100 and more: GPTQ_WEBUI_EXAMPLES


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    library = FakeLibrary(root)
    library.pause_s = 0.0
    engine = Engine(library, Settings(root / "settings.json"), [FakeLoader()])
    engine.load(MISTRAL)
    with ApiServer(engine) as server:
        yield server
    engine.unload()


def test_no_call_of_our_schema_is_a_500(house):
    import os

    examples = int(os.environ.get("GPTQ_WEBUI_EXAMPLES", EXAMPLES))
    schema = schemathesis.openapi.from_url(f"{house.url}/openapi.json")
    broken, calls = [], 0
    for found in schema.get_all_operations():
        operation = found.ok()

        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        @hypothesis.given(
            hypothesis.strategies.one_of(
                operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE),
                operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE),
            )
        )
        def call(case):
            nonlocal calls
            if house.service.engine.loaded is None:  # one of the calls unloads
                house.service.engine.load(MISTRAL)
            answer = case.call(timeout=20)
            calls += 1
            if answer.status_code >= 500 and answer.status_code not in (
                501,
                502,
            ):  # said in words: not possible, or not at the Hub
                broken.append((case.method, case.path, case.body, answer.status_code, answer.text[:200]))

        call()
    assert broken == [] and calls >= 60
    assert settled(house.service)

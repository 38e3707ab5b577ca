"""api/problems.py: what an error becomes. Facts come from the error's type and fields, never out of its sentence."""

import pytest
from pydantic import ValidationError

from gptq_webui.api.kobold import GenerateRequest
from gptq_webui.api.kobold_settings import error_of as kobold_error
from gptq_webui.api.openai_models import ChatCompletionRequest, CompletionRequest
from gptq_webui.api.problems import of_error, of_validation
from gptq_webui.core.errors import AnswerFailed, BadParameter, LoadFailed, NotEnoughMemory, WrongRepository
from gptq_webui.core.grammar import Grammar
from gptq_webui.core.params import GenerationParams


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 9.0), ("top_k", 1.5), ("seed", 2**40), ("stop", ("",)), ("logit_bias", {1: 999.0}), ("grammar", "json")],
)
def test_a_bad_parameter_carries_the_name_of_its_field(field, value):
    with pytest.raises(BadParameter) as found:
        GenerationParams(**{field: value})
    assert of_error(found.value).field == found.value.field == field


def test_a_grammar_that_is_too_long_names_its_field():
    with pytest.raises(BadParameter) as found:
        Grammar("regex", "a" * 20_000)
    assert found.value.field == "grammar"


def test_the_field_does_not_come_out_of_the_sentence():
    assert of_error(BadParameter("Temperature, of all things, is wrong.", "temperature")).field == "temperature"
    assert of_error(BadParameter("temperature is not the first word's business.")).field is None


def test_kobold_answers_507_where_memory_was_missing_and_500_elsewhere():
    tight = AnswerFailed("The model stopped.")
    tight.__cause__ = MemoryError()
    assert kobold_error(of_error(tight)).status_code == 507
    assert kobold_error(of_error(NotEnoughMemory("It does not fit."))).status_code == 507
    assert kobold_error(of_error(LoadFailed("The file is damaged."))).status_code == 500


def test_a_refusal_can_be_said_again_with_the_sister_that_exists():
    supposed = WrongRepository("a/b is not GPTQ.", ("a/b-GPTQ", "TheBloke/b-GPTQ"))
    assert str(supposed) == "a/b is not GPTQ. It may exist as GPTQ: a/b-GPTQ or TheBloke/b-GPTQ."
    known = WrongRepository(supposed.found, supposed.candidates, "TheBloke/b-GPTQ")
    assert str(known) == "a/b is not GPTQ. The same model as GPTQ: TheBloke/b-GPTQ."


TEXT = "Input should be a valid string"
EITHER = f"{TEXT} or a valid list"


@pytest.mark.parametrize(
    ("model", "body", "wanted"),
    [
        (CompletionRequest, {"prompt": 5}, f"prompt: {EITHER}"),
        (CompletionRequest, {"prompt": "a", "stop": [5]}, f"stop: {TEXT}; stop.0: {TEXT}"),
        (CompletionRequest, {"prompt": "a", "response_format": 5}, "response_format: Input should be an object"),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": 5}]}, f"messages.0.content: {EITHER}"),
        (ChatCompletionRequest, {"messages": [5]}, "messages.0: Input should be an object"),
        (GenerateRequest, {"prompt": "a", "logit_bias": 5}, "logit_bias: Input should be an object or a valid list"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_as_the_client_knows_it(model, body, wanted):
    """Not by the types that the library tries it as, nor by a class of ours."""
    with pytest.raises(ValidationError) as found:
        model.model_validate(body)
    assert of_validation(found.value.errors()).message == wanted

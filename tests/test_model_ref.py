"""`owner/name:branch` and everything people paste instead of it."""

import pytest

from gptq_webui.core.errors import BadModelName
from gptq_webui.core.model_ref import ModelRef

MODEL_CARD = "TheBloke/Mistral-7B-Instruct-v0.2-GPTQ"
BRANCH = "gptq-4bit-32g-actorder_True"


@pytest.mark.parametrize(
    ("text", "repo", "branch"),
    [
        (MODEL_CARD, MODEL_CARD, "main"),
        (f"{MODEL_CARD}:{BRANCH}", MODEL_CARD, BRANCH),
        (f"  {MODEL_CARD} : {BRANCH} \n", MODEL_CARD, BRANCH),
        (f'"{MODEL_CARD}"', MODEL_CARD, "main"),
        (f"{MODEL_CARD}:main", MODEL_CARD, "main"),
        (f"{MODEL_CARD}/", MODEL_CARD, "main"),
        ("a/b:feature/x", "a/b", "feature/x"),
        ("a/b:refs/pr/1", "a/b", "refs/pr/1"),
        ("A_1/b.c-d", "A_1/b.c-d", "main"),
        (f"https://huggingface.co/{MODEL_CARD}", MODEL_CARD, "main"),
        (f"https://huggingface.co/{MODEL_CARD}/", MODEL_CARD, "main"),
        (f"http://www.huggingface.co/{MODEL_CARD}?library=transformers#files", MODEL_CARD, "main"),
        (f"https://hf.co/{MODEL_CARD}/tree/{BRANCH}", MODEL_CARD, BRANCH),
        (f"huggingface.co/{MODEL_CARD}/tree/main", MODEL_CARD, "main"),
        ("https://huggingface.co/a/b/tree/feature%2Fx", "a/b", "feature/x"),
        ("https://huggingface.co/a/b/tree/feature/x", "a/b", "feature/x"),
        (f"https://huggingface.co/{MODEL_CARD}/blob/{BRANCH}/config.json", MODEL_CARD, BRANCH),
        (f"https://huggingface.co/{MODEL_CARD}/resolve/{BRANCH}/model.safetensors", MODEL_CARD, BRANCH),
        (f"https://huggingface.co/{MODEL_CARD}/discussions/3", MODEL_CARD, "main"),
        (f"https://my-mirror.example:8443/{MODEL_CARD}/tree/{BRANCH}", MODEL_CARD, BRANCH),
    ],
)
def test_what_is_read(text: str, repo: str, branch: str) -> None:
    assert ModelRef.parse(text) == ModelRef(repo, branch)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("Mistral-7B", "owner is missing"),
        ("/name", "owner is missing"),
        ("a/b/c", "more than one slash"),
        ("a/b:", "after the colon"),
        ("a/b: ", "after the colon"),
        ("a /b", "cannot be an owner or a name"),
        ("a/b c", "cannot be an owner or a name"),
        ("../b", "cannot be an owner or a name"),
        ("a/..", "cannot be an owner or a name"),
        ("a/.hidden", "cannot be an owner or a name"),
        ("a/b--c", "cannot be an owner or a name"),
        ("a/" + "b" * 97, "cannot be an owner or a name"),
        ("a\\b/c", "cannot be an owner or a name"),
        ("a/b:two words", "cannot be a branch"),
        ("a/b:../../x", "cannot be a branch"),
        ("a/b:x..y", "cannot be a branch"),
        ("a/b:-x", "cannot be a branch"),
        ("a/b:.x", "cannot be a branch"),
        ("a/b:x.lock", "cannot be a branch"),
        ("a/b:x~1", "cannot be a branch"),
        ("a/b:x\\y", "cannot be a branch"),
        ("a/b:" + "x" * 201, "cannot be a branch"),
        ("a/b:c:d", "cannot be a branch"),
        ("https://huggingface.co/", "does not name a repository"),
        ("https://huggingface.co/TheBloke", "does not name a repository"),
        ("https://huggingface.co/datasets/a/b", "/datasets"),
        ("https://huggingface.co/spaces/a/b", "/spaces"),
        ("https://huggingface.co/a/b/settings", "/settings"),
    ],
)
def test_what_is_refused_says_why_and_what_to_write(text: str, why: str) -> None:
    with pytest.raises(BadModelName) as caught:
        ModelRef.parse(text)
    assert why in str(caught.value) and "Write owner/name or owner/name:branch" in str(caught.value)


def test_a_refusal_of_a_very_long_text_is_short() -> None:
    with pytest.raises(BadModelName) as caught:
        ModelRef.parse("x" * 100_000)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("ref", "folder"),
    [
        (ModelRef("a/b"), "a_b"),
        (ModelRef("a/b", "main"), "a_b"),
        (ModelRef(MODEL_CARD, BRANCH), f"TheBloke_Mistral-7B-Instruct-v0.2-GPTQ_{BRANCH}"),
        (ModelRef("a/b", "feature/x"), "a_b_feature_x"),
        (ModelRef("a/b", 'x"y|z'), "a_b_x_y_z"),
    ],
)
def test_folders_are_named_as_text_generation_webui_names_them(ref: ModelRef, folder: str) -> None:
    assert ref.folder_name == folder


def test_as_text_it_can_be_read_again() -> None:
    for ref in (ModelRef("a/b"), ModelRef("a/b", "feature/x")):
        assert ModelRef.parse(str(ref)) == ref

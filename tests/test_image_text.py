"""Models that see pictures: opened for text, and with the processor in their folder for pictures."""

import base64
import contextlib
import io
import json
import re
import threading
import time

import pytest
import seeing_models
import torch
from PIL import Image

import tiny
from gptq_webui.core.chat import Finish, Message
from gptq_webui.core.errors import BadParameter
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq import checkpoint
from gptq_webui.gptq.stepper_choice import stepper_for
from gptq_webui.loaders.pretrained import picture_reader
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions

IDS = [5, 9, 200, 7, 33, 8, 100, 6, 42, 77, 12, 250]
SHOW = {
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "llava": "<image>",
    "gemma3": "<start_of_image>",
}
TOKENS = {
    "llava": ["<image>"],
    "gemma3": ["<image_soft_token>", "<pad_261>", "<start_of_image>", "<end_of_image>"],
}
_QWEN = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 784,
    "max_pixels": 3136,
    "patch_size": 14,
    "merge_size": 2,
}
PROCESSORS = {
    "qwen2_vl": {**_QWEN, "processor_class": "Qwen2VLProcessor"},
    "qwen2_5_vl": {**_QWEN, "processor_class": "Qwen2_5_VLProcessor"},
    "qwen3_vl": {**_QWEN, "processor_class": "Qwen3VLProcessor"},
    "llava": {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "size": {"shortest_edge": 28},
              "crop_size": {"height": 28, "width": 28}, "patch_size": 14, "vision_feature_select_strategy": "default",
              "num_additional_image_tokens": 1},
    "gemma3": {"image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor", "image_seq_length": 4,
               "size": {"height": 56, "width": 56}, "do_pan_and_scan": False},
}  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}PICTURE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
ONLY_PARTS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{% if part.type == 'image' %}PICTURE"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def url_of(color, kind="PNG", size=(60, 40)):
    data = io.BytesIO()
    Image.new("RGB", size, color).save(data, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def as_url(data, kind="jpeg"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


RED, BLUE = url_of("red"), url_of("blue", "JPEG")


def complete(folder, kind, template=TEMPLATE):
    """The tokenizer, the template and the processor of a packed folder."""
    from transformers import AutoTokenizer

    tiny.write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = TOKENS.get(kind, ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.save_pretrained(folder)
    if kind == "gemma3":
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
        settings |= {**named, "extra_special_tokens": named}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[kind]))
    (folder / "processor_config.json").write_text(json.dumps(PROCESSORS[kind]))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.replace("PICTURE", SHOW[kind])}))


@pytest.mark.parametrize("kind", seeing_models.KINDS)
def test_its_language_model_computes_as_the_dequantised_twin(tmp_path, kind):
    twin = seeing_models.write(tmp_path / kind, kind)
    hf, _notes = checkpoint.load(LocalModel.read(tmp_path / kind), dtype=torch.float32, device_map="cpu")
    stepper, note = stepper_for(hf, 256)
    assert note in ("", "Answers would come faster with numba: pip install numba, then press Reload.")
    with torch.inference_mode():
        wanted = twin(input_ids=torch.tensor([IDS])).logits[0]
        memory = stepper.begin()
        found = [torch.as_tensor(stepper.prefill(memory, IDS[:8])).flatten()]
        found += [torch.as_tensor(stepper.prefill(memory, [id])).flatten() for id in IDS[8:]]
    for logits, at in zip(found, range(7, len(IDS)), strict=True):
        assert (logits - wanted[at]).norm() / wanted[at].norm() < 1e-3


@pytest.mark.parametrize("kind", seeing_models.KINDS)
def test_another_program_generates_with_it_as_with_its_twin(tmp_path, kind):
    twin = seeing_models.write(tmp_path / kind, kind)
    tiny.write_tokenizer(tmp_path / kind)
    loaded = TransformersLoader().load(LocalModel.read(tmp_path / kind), TransformersOptions(dtype="fp32"), lambda *_: None)
    try:
        settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": [287]}
        found = [hf.generate(torch.tensor([IDS]), **settings).tolist() for hf in (loaded.hf, twin)]
        assert found[0] == found[1]
    finally:
        loaded.close()


@pytest.mark.parametrize("kind", SHOW)
def test_it_answers_to_pictures_as_generate_does(tmp_path, kind):
    twin = seeing_models.write(tmp_path / kind, kind)
    complete(tmp_path / kind, kind)
    loaded = TransformersLoader().load(LocalModel.read(tmp_path / kind), TransformersOptions(dtype="fp32"), lambda *_: None)
    try:
        assert loaded.sees_pictures, loaded.notes
        chats = [
            [Message("user", "What is this?", pictures=(RED,))],
            [Message("user", "What is this?", pictures=(BLUE,))],
            [
                Message("user", "Two", pictures=(RED, BLUE)),
                Message("assistant", "Yes."),
                Message("user", "And this?", pictures=(BLUE,)),
            ],
            [Message("user", "Nothing to see.")],
        ]
        answers = []
        for chat in chats:
            prompt = loaded.prompt(chat)
            given = {name: each for name, each in prompt.pictures.items() if name != "token_type_ids" or kind == "gemma3"}
            ids = torch.tensor([prompt.ids])
            found = twin.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None,
                suppress_tokens=[1], return_dict_in_generate=True, output_logits=True, **given
            )  # fmt: skip
            wanted = found.sequences[0, len(prompt.ids) :].tolist()
            params = GenerationParams(max_new_tokens=12, temperature=0, ignore_eos=True, repetition_penalty=1.0)
            events = list(loaded.answer(prompt, params, threading.Event()))
            assert isinstance(events[-1], Finish) and events[-1].prompt_tokens == len(prompt.ids)
            answer = [event.id for event in events[:-1] if event.id >= 0]  # the last may be text that was held back
            other = next((at for at, (ours, theirs) in enumerate(zip(answer, wanted, strict=True)) if ours != theirs), None)
            if other is not None:  # only where two tokens are as likely
                logits = found.logits[other][0]
                assert abs(float(logits[answer[other]] - logits[wanted[other]])) < 0.01 and other > 0
            answers.append(answer)
        assert len({tuple(each) for each in answers}) > 1  # the pictures make a difference
    finally:
        loaded.close()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A loaded model whose template shows every message as a list of parts."""
    folder = tmp_path_factory.mktemp("seeing") / "llava"
    seeing_models.write(folder, "llava")
    complete(folder, "llava", ONLY_PARTS)
    loaded = TransformersLoader().load(LocalModel.read(folder), TransformersOptions(dtype="fp32"), lambda *_: None)
    yield loaded
    loaded.close()


def test_a_template_of_parts_alone_shows_text_pictures_and_a_continued_answer(seeing):
    assert seeing.template.source == "chat_template.json" and seeing.template.parts
    text = seeing.prompt([Message("system", "Be short."), Message("user", "Hi"), Message("assistant", "Yes, ")])
    assert text.text == "<s>[system]Be short.[user]Hi[assistant]Yes, " and not text.pictures
    shown = seeing.prompt([Message("user", "Hi", pictures=(RED, BLUE)), Message("user", "more", pictures=(RED,))])
    assert shown.text == "<s>[user]<image><image>Hi[user]<image>more[assistant]"
    assert len(shown.ids) > len(seeing.encode(shown.text)) and shown.pictures["pixel_values"].shape[0] == 3
    assert shown.ids[0] == 0 != shown.ids[1]  # one beginning


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.com/a.png", "fetches none from an address"),
        (RED[:-40], "damaged"),
        (RED[:60] + "AAAA" + RED[64:], "damaged"),
        ("data:image/svg+xml;base64,PHN2Zz48L3N2Zz4=", "PNG, JPEG, WebP or GIF"),
        (url_of("red", size=(8000, 7000)), "50 million are the limit"),
        (url_of("red", size=(31_000, 2)), "30,000 of a side"),
    ],
)
def test_a_picture_that_cannot_be_read_is_said(seeing, url, words):
    with pytest.raises(BadParameter, match=words):
        seeing.prompt([Message("user", "Hi", pictures=(url,))])
    assert len(seeing.prompt([Message("user", "Hi")]).ids) > 0


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(seeing):
    data = io.BytesIO()
    Image.effect_noise((2000, 2000), 80).save(data, "JPEG", progressive=True)
    whole = data.getvalue()
    assert seeing.prompt([Message("user", "Hi", pictures=(as_url(whole),))]).pictures
    last = whole[whole.rindex(b"\xff\xda") : -2]
    many = whole[:-2] + last[:40] * 500 + whole[-2:]
    with pytest.raises(BadParameter, match="more than 100 scans"):
        seeing.prompt([Message("user", "Hi", pictures=(as_url(many),))])


def test_a_conversation_of_too_many_pictures_is_refused(seeing):
    with pytest.raises(BadParameter, match="40 pictures; 32 are the limit"):
        seeing.prompt([Message("user", "Hi", pictures=(RED,) * 40)])


def test_a_text_that_names_the_token_of_a_picture_is_said(seeing):
    with pytest.raises(BadParameter, match="do not fit its text"):
        seeing.prompt([Message("user", "<image> what is <image>?", pictures=(RED,))])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": {"height": 100_000, "width": 100_000}}, "is 100000, and at most 4,096"),
        ({"size": {"shortest_edge": 2_000_000}}, "shortest_edge is 2000000, and at most 8,192"),
        ({"image_grid_pinpoints": [[336, 10**9]]}, "image_grid_pinpoints is 1000000000, and at most 4,096"),
        ({"image_mean": [float("nan")] * 3}, "image_mean is nan"),
        ({"nested": {"deeper": [{"rescale_factor": 1e300}]}}, "rescale_factor is 1e[+]300"),
        ({"image_std": [1] * 20_000}, "numbers, and at most 10,000"),
        ({"image_processor_type": "NoProcessor"}, "cannot be used"),
    ],
)
def test_a_processor_that_is_no_use_leaves_the_language_model(tmp_path, change, words):
    seeing_models.write(tmp_path / "m", "llava")
    complete(tmp_path / "m", "llava")
    for name in ("processor_config.json", "preprocessor_config.json"):
        settings = json.loads((tmp_path / "m" / name).read_text()) | change
        (tmp_path / "m" / name).write_text(json.dumps(settings))
    loaded = TransformersLoader().load(LocalModel.read(tmp_path / "m"), TransformersOptions(dtype="fp32"), lambda *_: None)
    assert not loaded.sees_pictures and any(re.search(words, each) and "It reads text only" in each for each in loaded.notes)
    assert list(loaded.chat([Message("user", "Hi")], GenerationParams(max_new_tokens=3), threading.Event()))
    loaded.close()


@pytest.mark.parametrize(
    "block",
    [b"!\xfe\1a\0", b"!\xfe\0", b"!\xff\1a\0", b"!\1\1a\1b\0", b"!\xf9\4\0\0\0\0\0"],
    ids=["comment", "empty", "program", "text", "frame"],
)
@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_a_gif_of_a_million_comments_opens_at_once(mode, block):
    data = io.BytesIO()
    image = Image.new(mode, (40, 30), 7 if mode == "P" else (9, 200, 30, 255))
    image.save(data, "GIF")
    gif = data.getvalue()
    at = 13 + (3 << (gif[10] & 7) + 1 if gif[10] & 0x80 else 0)
    url = "data:image/gif;base64,"
    started = time.process_time()
    found = picture_reader._open(url + base64.b64encode(gif[:at] + block * (2_900_000 // len(block)) + gif[at:]).decode())
    assert time.process_time() - started < 8  # with the comments: minutes
    assert found.tobytes() == picture_reader._open(url + base64.b64encode(gif).decode()).tobytes()
    for length in range(6, at + 12):  # damaged: opened or refused in words
        with contextlib.suppress(BadParameter):
            picture_reader._open(url + base64.b64encode((gif[:at] + block + gif[at:])[:length]).decode())

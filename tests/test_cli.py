"""app/: the commands as a user types them, on a tiny model and a Hub on loopback."""

import argparse
import json
import socket

import pytest

import tiny
from gptq_webui.app.cli import main
from gptq_webui.app.engine_commands import load_options
from gptq_webui.app.server_process import free_port
from gptq_webui.core.errors import BadParameter
from gptq_webui.loaders.text.built_in_templates import CHATML


@pytest.fixture
def folder_of_models(tmp_path):
    """A models folder with one tiny chat model and one AWQ folder."""
    tiny.write(tmp_path / "models" / "tiny-chat")
    tiny.write_tokenizer(tmp_path / "models" / "tiny-chat", "{{ bos_token }}" + CHATML)
    awq = tmp_path / "models" / "some-awq"
    tiny.write(awq)
    (awq / "quantize_config.json").unlink()
    return tmp_path / "models"


def run(capsys, *arguments):
    code = main([str(each) for each in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def test_models_lists_names_badges_and_sizes(folder_of_models, capsys):
    code, out, err = run(capsys, "models", "--models-dir", folder_of_models)
    assert code == 0 and "2 models in" in err
    assert any(line.startswith("tiny-chat\tGPTQ 4-bit, group 32, act-order\t") for line in out.splitlines())


def test_ask_prints_the_answer_to_stdout_and_all_else_to_stderr(folder_of_models, capsys):
    arguments = [
        "ask",
        "Hi",
        "--model",
        "tiny-chat",
        "--models-dir",
        folder_of_models,
        "--temperature",
        "0",
        "--max-new-tokens",
        "8",
        "--dtype",
        "fp32",
    ]
    code, out, err = run(capsys, *arguments)
    assert code == 0 and out.endswith("\n") and "tokens/s" not in out
    last = err.strip().splitlines()[-1]
    assert last.startswith("8 new tokens, ") and " tokens/s, first token after " in last
    assert run(capsys, *arguments)[1] == out  # greedy


def test_benchmark_prints_one_line_to_stdout(folder_of_models, capsys):
    code, out, err = run(capsys, "benchmark", "tiny-chat", "--models-dir", folder_of_models)
    assert code == 0 and out.count("\n") == 1 and "round 2" in err
    assert (
        out.startswith("tiny-chat: GPTQ 4-bit, group 32, act-order | transformers") and " tokens/s after a prompt of 128 |" in out
    )


def test_ask_and_benchmark_and_doctor_write_json_for_scripts(folder_of_models, capsys):
    given = ["--model", "tiny-chat", "--models-dir", folder_of_models, "--json"]
    code, out, _err = run(capsys, "ask", "Hi", *given, "--max-new-tokens", "3", "--temperature", "0")
    found = json.loads(out)
    assert code == 0 and (found["model"], found["new_tokens"], found["reason"]) == ("tiny-chat", 3, "length")
    (judged,) = json.loads(run(capsys, "doctor", *given)[1])["models"]
    assert judged["model"] == "tiny-chat" and [each["loader"] for each in judged["loaders"] if each["chosen"]] == ["transformers"]
    assert json.loads(run(capsys, "benchmark", "tiny-chat", *given[2:])[1])["tokens_per_s"] > 0
    assert run(capsys, "keys", "new", "mine")[0] == 0
    assert [each["name"] for each in json.loads(run(capsys, "keys", "--json")[1])] == ["mine"]


def test_names_of_folders_cannot_steer_the_terminal(folder_of_models, capsys):
    (folder_of_models / "tiny-chat").rename(folder_of_models / "tiny\x1b[2Jchat\x9b\r")
    code, out, err = run(capsys, "models", "--models-dir", folder_of_models)
    assert code == 0 and "tiny\\x1b[2Jchat\\x9b\\r\tGPTQ" in out and not set("\x1b\x9b\r") & set(out + err)
    code, out, err = run(capsys, "ask", "Hi", "--models-dir", folder_of_models, "--max-new-tokens", "1")
    assert "tiny\\x1b[2Jchat" in err and not set("\x1b\x9b\r") & set(out + err)
    assert "\x9b" not in run(capsys, "models", "--json", "--models-dir", folder_of_models)[1]


def test_ask_raw_leaves_the_template_out(folder_of_models, capsys):
    arguments = ["--model", "tiny-chat", "--models-dir", folder_of_models, "--temperature", "0", "--max-new-tokens", "8"]
    plain = run(capsys, "ask", "Hi", *arguments)[1]
    raw = run(capsys, "ask", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "--raw", *arguments)[1]
    assert raw.strip() == plain.strip()


@pytest.mark.parametrize(
    ("arguments", "expected", "says"),
    [
        (["ask", "Hi", "--model", "nobody"], 1, "nobody"),
        (["ask", "Hi", "--model", "nobody", "--temperature", "-3"], 2, "temperature must be between 0 and 5; found -3"),
        (["ask", "Hi", "--model", "nobody", "--seed", "-7"], 2, "seed must be between"),
        (
            ["ask", "Hi", "--model", "tiny-chat", "--loader", "exllama9"],
            1,
            "There are: exllamav2, transformers, autogptq, remote",
        ),
        (["models", "--models-dir", "/no/such/folder"], 1, "There is no folder"),
        (["download", "not a name"], 2, "Write owner/name"),
        (["serve", "--auth", "nopassword", "--no-browser"], 2, "USER:PASSWORD"),
    ],
)
def test_mistakes_are_one_sentence_with_an_exit_code(arguments, expected, says, folder_of_models, capsys):
    folders = [] if "--models-dir" in arguments else ["--models-dir", folder_of_models]
    code, out, err = run(capsys, *arguments, *folders)
    assert code == expected and out == "" and says in err and "gptq-webui: " in err


def test_a_folder_before_the_question_does_not_swallow_it(folder_of_models, capsys):
    code, out, _err = run(capsys, "ask", "--models-dir", folder_of_models, "--max-new-tokens", "2", "--model", "tiny-chat", "Hi")
    assert code == 0 and out
    assert run(capsys, "ask", "--models-dir", folder_of_models, "Hi", "--model", "nobody")[0] == 1


def test_ask_without_a_name_takes_the_only_model_or_says_which_there_are(tmp_path, capsys):
    code, _out, err = run(capsys, "ask", "Hi", "--models-dir", tmp_path)
    assert code == 1 and "There is none yet" in err


def test_download_ends_in_a_model_that_models_lists(folder_of_models, tmp_path, hub_server, capsys):
    hub_server.add("Owner/Tiny-GPTQ", folder_of_models / "tiny-chat", "gptq-4bit-32g")
    target = tmp_path / "target"
    target.mkdir()
    code, _out, err = run(capsys, "download", "Owner/Tiny-GPTQ:gptq-4bit-32g", "--models-dir", target)
    assert code == 0 and err.strip().splitlines()[-1].startswith("Done: ")
    assert run(capsys, "models", "--models-dir", target)[1].startswith("Owner_Tiny-GPTQ_gptq-4bit-32g\tGPTQ 4-bit")


def test_a_port_that_is_taken_is_passed_over_or_reported():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BadParameter, match=str(port)):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port
    assert free_port("127.0.0.1", None) >= 7860


def test_ports_and_hosts_that_cannot_be_are_sentences():
    with pytest.raises(BadParameter, match="65535"):
        free_port("127.0.0.1", 99999)
    with pytest.raises(BadParameter, match=r"not an address|cannot be used"):
        free_port("no.such.host.invalid", 7860)


def test_parallel_reaches_every_loader_by_its_own_name_and_within_its_limit():
    options = argparse.Namespace(dtype=None, context=None, parallel=400)
    assert load_options(options) == {"max_batch_size": 400, "parallel": 256}

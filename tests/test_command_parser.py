"""app/command_parser.py: which word is the command, and what is said about words that have no meaning."""

from pathlib import Path

import pytest

from gptq_webui.app.cli import parsers
from gptq_webui.app.command_parser import parse


@pytest.mark.parametrize(
    ("words", "command", "folders"),
    [
        ([], "serve", None),
        (["--demo"], "serve", None),
        (["models"], "models", None),
        (["--models-dir", "a", "b", "models", "--json"], "models", ["a", "b"]),
        (["--models-dir", "a", "b", "-v", "ask", "Hi"], "ask", ["a", "b"]),
        (["--models-dir=a", "--models-dir", "b", "c", "doctor"], "doctor", ["a", "b", "c"]),
        (["--models-dir", "models", "models"], "models", ["models"]),
        (["--models-dir", "models"], "serve", ["models"]),
        (["--models-dir", "a", "b"], "serve", ["a", "b"]),
        (["--models-dir", "a", "--demo"], "serve", ["a"]),
        (["ask", "--models-dir", "a", "Hi"], "ask", ["a"]),
    ],
)
def test_several_folders_may_stand_before_the_command(words, command, folders):
    found, options = parse(*parsers(), words)
    assert found == command and options.models_dir == (folders and [Path(each) for each in folders])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["donwload", "a/b"], "there is no command 'donwload'. Did you mean download?"),
        (["xyzzy"], "there is no command 'xyzzy'."),
        (["ask", "Hi", "--temprature", "1"], "there is no option --temprature. Did you mean --temperature?"),
        (["--modle", "x"], "there is no option --modle. Did you mean --model?"),
        (["ask", "Hi", "there"], "Put a text of several words into quotation marks"),
        (["--model", "x", "ask", "Hi"], "the command comes first: gptq-webui ask"),
        (["ask"], "the following arguments are required: QUESTION"),
        (["ask", "Hi", "--context", "many"], "invalid int value: 'many'"),
        (["--models-dir"], "expected at least one argument"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_nearest_word_and_exit_code_2(words, says, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*parsers(), words)
    said = capsys.readouterr()
    assert ended.value.code == 2 and says in said.err and len(said.err.splitlines()) == 2 and said.out == ""


def test_a_folder_in_the_place_of_a_command_leads_to_its_flag(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(*parsers(), [str(tmp_path)])
    assert f"gptq-webui --models-dir {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(parsers()[1]))
def test_each_command_lists_the_exit_codes(command, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*parsers(), [command, "--help"])
    assert ended.value.code == 0 and "exit codes: 0 done" in " ".join(capsys.readouterr().out.split())

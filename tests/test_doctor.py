"""app/doctor.py: each loader can or cannot, why, and what would change it."""

import tiny
from gptq_webui.app import doctor
from gptq_webui.app.cli import main
from gptq_webui.loaders.choose import all_loaders, survey
from gptq_webui.loaders.machine.capabilities import Machine


def shown(machine, bits=4):
    return "\n".join(doctor.lines(survey(doctor.usual_model(bits), all_loaders(lambda: machine))))


def test_a_machine_without_a_gpu_sees_what_is_missing_and_what_works():
    text = shown(Machine({"torch": "2.13", "transformers": "5.23", "accelerate": "1"}, "cpu"))
    assert "exllamav2     cannot  it needs a GPU" in text and "transformers  taken   reads every GPTQ layout" in text
    assert 'Cure: pip install "gptq-webui[autogptq]"' in text


def test_what_must_be_compiled_says_so():
    base = {"torch": "2.13", "transformers": "5.23", "accelerate": "1", "exllamav2": "0.3.2"}
    text = shown(Machine(base, "cuda 13.0", gpu=True, compilers=True))
    assert "exllamav2     can     would compile for about two minutes" in text
    assert "exllamav2     cannot  it reads 4-bit GPTQ only; this model has 8 bits." in shown(Machine(base, "cuda", gpu=True), 8)


def test_the_command_speaks_of_this_machine_or_of_one_model(tmp_path, capsys):
    assert main(["doctor", "--models-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "torch built for" in out and "for a usual 8-bit model" in out and "transformers" in out
    tiny.write(tmp_path / "tiny", bits=8)
    assert main(["doctor", "--models-dir", str(tmp_path), "--model", "tiny"]) == 0
    assert "Loaders, for tiny (GPTQ 8-bit" in capsys.readouterr().out
    assert main(["doctor", "--models-dir", str(tmp_path), "--model", "nobody"]) == 1

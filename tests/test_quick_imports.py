"""loaders/transformers/quick_imports.py: what is not imported at a start, and comes when it is needed. In fresh processes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BEGIN = """
import gc, sys
sys.path.insert(0, {root!r})
import script
script.register()
from gptq_webui.gptq import collector
from gptq_webui.loaders.transformers import quick_imports
quick_imports.in_own_process = {own}
import torch
before = set(sys.modules)
"""

UNUSED = """
with quick_imports.without_unused():
    assert not gc.isenabled()
    import transformers.modeling_utils
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.generation.utils import GenerationMixin
assert gc.isenabled() and not any(isinstance(each, quick_imports._Finder) for each in sys.meta_path)
heavy = [each for each in ("torch._dynamo", "sympy", "sklearn", "torch.distributed.tensor") if each in sys.modules]
"""

SINGLE = """
assert not heavy, heavy
config = LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=50)
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()
found = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
assert found.shape == (1, 7)
from transformers import masking_utils
made = masking_utils.TransformGetItemToIndex()
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
assert type(made) is TransformGetItemToIndex
import torch._dynamo
assert torch._dynamo.config.__name__ == "torch._dynamo.config"
from torch.distributed.tensor import DTensor
"""

ASKED = """
with quick_imports.without_unused():
    import torch._dynamo
    assert isinstance(sys.modules["torch._dynamo"], quick_imports._StandIn)
    {ask}
    real = sys.modules["torch._dynamo"]
    assert not isinstance(real, quick_imports._StandIn) and real.__file__
    import transformers.modeling_utils
import torch._dynamo
assert sys.modules["torch._dynamo"] is real is torch._dynamo
assert sys.modules["torch._dynamo.utils"] is torch._dynamo.utils
assert torch._dynamo.utils.counters is __import__("torch._dynamo.utils", fromlist=["counters"]).counters
"""


LOADED = """
from gptq_webui.core.models import LocalModel
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions
model = LocalModel.read(__import__("pathlib").Path({folder!r}))
loaded = TransformersLoader().load(model, TransformersOptions(device="cpu"), lambda *told: None)
unused = ("torch._dynamo", "sympy", "sklearn", "scipy", "torch.distributed.tensor")
heavy = [each for each in unused if each in sys.modules]
assert not heavy, heavy
assert loaded.kernel
loaded.close()
"""


def run(*parts, own=True, **names):
    text = BEGIN.format(root=str(ROOT), own=own) + "".join(parts).replace("{ask}", names.get("ask", ""))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_model_code_is_there_without_the_compiler_and_everything_else_comes_when_it_is_asked_for():
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 imports torch's tensors of several machines whatever it is told")
    run(UNUSED, SINGLE)


def test_a_model_is_loaded_without_them(tmp_path):
    import transformers

    import tiny

    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 imports torch's tensors of several machines whatever it is told")
    tiny.write(tmp_path / "model", "llama")
    tiny.write_tokenizer(tmp_path / "model")
    run(LOADED.format(folder=str(tmp_path / "model")))


@pytest.mark.parametrize(
    "ask",
    [
        "torch._dynamo.config",
        "from torch._dynamo.utils import counters",
        "import torch._dynamo.utils; torch._dynamo.utils.counters",
    ],
)
def test_a_stand_in_makes_way_where_more_is_asked_of_it(ask):
    run(ASKED, ask=ask)


def test_in_another_program_nothing_is_replaced():
    run(UNUSED, "assert 'torch._dynamo' in heavy or 'torch._dynamo' in before", own=False)


def test_the_collector_is_on_again_after_imports_in_two_threads_and_after_an_error():
    run(
        """
import threading
inside, go = threading.Event(), threading.Event()
def other():
    with collector.without_collector():
        inside.set()
        go.wait()
thread = threading.Thread(target=other)
thread.start()
inside.wait()
try:
    with collector.without_collector():
        raise ValueError
except ValueError:
    pass
go.set()
thread.join()
assert gc.isenabled()
gc.disable()
with collector.without_collector():
    pass
assert not gc.isenabled(), "as it was"
"""
    )


def test_a_loss_of_pictures_comes_when_it_is_called():
    run(
        UNUSED,
        """
from transformers.loss.loss_utils import LOSS_MAPPING
assert "transformers.loss.loss_for_object_detection" not in sys.modules
try:
    LOSS_MAPPING["ForObjectDetection"]()
except TypeError as error:
    assert "logits" in str(error), error  # of the real one
from transformers.loss import loss_for_object_detection
assert loss_for_object_detection.__file__
assert all(callable(each) for each in LOSS_MAPPING.values())
""",
    )


def test_an_expression_of_the_real_sympy_is_known_by_who_saw_the_stand_in():
    run(
        """
with quick_imports.stand_ins():
    import sympy
    Basic = sympy.Basic
    assert not isinstance(3, Basic) and isinstance(sys.modules["sympy"], quick_imports._StandIn)
assert not isinstance(3, Basic) and "sympy" not in sys.modules
import sympy
assert sympy.__file__ and isinstance(sympy.Integer(3), Basic) and not isinstance(3, Basic)
"""
    )


def test_what_torchvision_asks_of_the_compiler_is_answered_when_it_is_called():
    run(
        """
with quick_imports.without_unused():
    from torch._dynamo.utils import is_compile_supported
    assert isinstance(sys.modules["torch._dynamo"], quick_imports._StandIn)
assert "torch._dynamo" not in sys.modules and "torch._dynamo.utils" not in sys.modules
assert is_compile_supported("cpu") in (True, False)
import torch._dynamo
assert torch._dynamo.__file__ and is_compile_supported("cpu") == torch._dynamo.utils.is_compile_supported("cpu")
"""
    )

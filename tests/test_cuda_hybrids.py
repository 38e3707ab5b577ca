"""Whole models that keep states, recorded: with our kernels on a GPU; with what those compute, in plain PyTorch, without one."""

from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
import transformers
from emulated_states import delta_rule as delta_rule_of_torch
from emulated_states import gated_norm, look_up, scan_token
from every_architecture import KINDS, tiny_model
from test_families import IDS, off, packed
from test_stand_ins import NoGpu, kernels  # noqa: F401
from test_transformers_stepper import Replay

from gptq_webui.gptq.cuda import delta_rule, fused_norms, kept_states, positions, state_space
from gptq_webui.gptq.cuda.delta_rule import DeltaRule
from gptq_webui.gptq.cuda.fused_norms import CudaNorm
from gptq_webui.gptq.cuda.positions import Positions
from gptq_webui.gptq.cuda.state_space import StateSpace
from gptq_webui.gptq.graph_stepper import GraphStepper
from gptq_webui.gptq.stepper_choice import stepper_for

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
five = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 keeps states elsewhere")
# Heads of which packed layers have whole words, and shapes that the kernels take.
EIGHT = {"mamba_n_heads": 8, "mamba_d_head": 16}
LINEAR = {"hidden_size": 256, "max_position_embeddings": 512, "linear_num_value_heads": 8, "linear_num_key_heads": 4}
DELTA, SPACE = 0, 1  # of FusedForward._states
MODELS = {
    "bamba": (EIGHT, SPACE),
    "granitemoehybrid": (EIGHT, SPACE),
    "falcon_h1": (EIGHT, SPACE),
    "falcon_h1 with a norm": ({**EIGHT, "mamba_rms_norm": True, "mamba_norm_before_gate": True}, SPACE),
    "nemotron_h": (
        {
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 16,
            "layer_types": ["linear_attention", "mlp", "full_attention", "linear_attention"],
        },
        SPACE,
    ),
    "mamba2": ({"num_heads": 8, "head_dim": 16}, SPACE),
    "zamba2": ({"n_mamba_heads": 8, "mamba_headdim": 16}, SPACE),
    "qwen3_next": (LINEAR, DELTA),
    "qwen3_5_text": (LINEAR, DELTA),
    "qwen3_5_moe_text": (LINEAR, DELTA),
    "olmo_hybrid": (LINEAR, DELTA),
    "lfm2": ({}, None),  # convolutions alone
    "jamba": ({}, None),  # Mamba 1
}
SURE = ("bamba", "qwen3_next")  # a graph holds them; others may be refused for another reason than their states


def kind_of(name):
    kind = name.split()[0]
    if kind not in KINDS:
        pytest.skip("this transformers has no such architecture")
    return kind


class PlainKernels:
    """In the place of a Gpu: what its kernels compute, in plain PyTorch."""

    capability, processors, shared_limit_bytes, shared_bytes = (8, 0), 100, 1 << 16, 1 << 17

    def __init__(self):
        self.run_of = []

    def add_missing(self, **_given):
        pass

    def run(self, name, _grid, _threads, arguments, *_args, **_given):
        self.run_of.append(name)
        of_torch = {"look": look_up, "gated": gated_norm, "scan": scan_token, "delta": delta_rule_of_torch}
        of_torch[name.partition("_")[0]](**arguments)


class TakenLayers:
    """As FusedForward, of layers that keep a state and of positions alone."""

    def __init__(self, model):
        self.gpu = PlainKernels()
        self._model, self.states, self._positions = model, (DeltaRule(self.gpu), StateSpace(self.gpu)), Positions(self.gpu)
        self.capacity, self._forwards = 0, 0

    @contextmanager
    def recording(self):
        with ExitStack() as undo:
            self._positions.take(self._model, self.capacity, lambda: self._forwards == 1, undo)
            for each in self.states:
                each.take(self._model, nullcontext, undo)
            yield
        self._forwards = 0

    def begin(self):
        self._forwards += 1

    def keep(self, *_args):
        return False

    def close(self):
        pass


class Recorded(Replay):
    """A replay is the run that was recorded, with all that was in its place then."""

    def __init__(self, fused):
        self._fused = fused

    def record(self, run):
        super().record(run)

        def replay():
            with self._fused.recording():
                self._fused.begin()
                run()

        return type("Graph", (), {"replay": staticmethod(replay)})


@five
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_recorded_with_what_the_kernels_compute(name, kernels, monkeypatch):  # noqa: F811
    kind, (changes, at) = kind_of(name), MODELS[name]
    for each in (state_space.SCAN, state_space.GATED_NORM, delta_rule.DELTA, positions.LOOK_UP):
        monkeypatch.setattr(each, "pack", lambda **given: given)
    for each in (kept_states, positions):
        monkeypatch.setattr(each, "NUMBERS", (torch.float32,))
        monkeypatch.setattr(each, "on_gpu", lambda x: True)
    monkeypatch.setattr(kept_states, "capturing", lambda: False)
    for close in (kept_states._CLOSE, kept_states._CLOSE_STATE):
        monkeypatch.setitem(close, torch.float32, 1e-3)
    model = tiny_model(kind, **changes)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([IDS[:40]]), use_cache=False).logits[0]
    assert fused_norms.replace_norms(model, {torch.device("cpu"): NoGpu()})
    fused = TakenLayers(model)
    stepper = GraphStepper(model, 256, Recorded(fused), fused)
    stepper.trial()
    assert not stepper.why
    with torch.inference_mode():
        memory = stepper.begin()
        assert off(stepper.prefill(memory, IDS[:20]), wanted[19:20]) < 1e-3
        fused.gpu.run_of.clear()
        for token in range(20, 40):
            assert off(stepper.step(memory, IDS[token]), wanted[token : token + 1]) < 1e-3
    right = [list(each._right.values()) for each in fused.states]
    assert right == [[True] if each == at else [] for each in (DELTA, SPACE)], "which layers are computed by kernels"
    assert at is None or [each for each in fused.gpu.run_of if each.startswith(("scan", "delta"))]
    assert "forward" not in vars(next(each for each in model.modules() if type(each).__name__.endswith("Norm"))), "left in place"


@needs_gpu
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_recorded_model_continues_as_its_dense_twin(name):
    kind, (changes, at) = kind_of(name), MODELS[name]
    hf, twin = packed(kind, changes, act_order=False)
    hf = hf.half().cuda()
    stepper, note = stepper_for(hf, 512)
    gated = [each for each in hf.modules() if isinstance(each, CudaNorm) and "Gated" in type(each._plain.__self__).__name__]
    assert not gated, "a norm with a gate was replaced"
    ids = (IDS * 12)[:60]
    wanted = twin(torch.tensor([ids])).logits[0].cuda()
    memory, other = stepper.begin(), stepper.begin()
    assert off(stepper.prefill(memory, ids[:20]), wanted[19:20]) < 3e-2
    stepper.prefill(other, ids[10:20])
    errors = []
    for token in range(20, 60):
        errors.append(off(stepper.step(memory, ids[token]), wanted[token : token + 1]))
        if token % 15 == 0:  # another conversation in between
            stepper.step(other, ids[token])
    assert sum(each > 3e-2 for each in errors) <= 2, (errors, note)  # where rounding chooses another expert
    assert stepper.kernel == "graph" or name not in SURE, note
    if stepper.kernel == "graph" and at is not None:
        right = stepper._fused._states[at]._right
        assert right and all(right.values()), "the states were left to transformers"
    stepper.close()

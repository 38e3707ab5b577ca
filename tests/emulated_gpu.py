"""A GPU that is none: what a loaded model is given on a GPU (replaced layers, a recorded forward), run on the processor.

Each kernel is a few lines of PyTorch that read and write the tensors of its arguments. A recording notes what torch and the
kernels compute, and a replay computes just that again, without Python of the model, as a CUDA graph does. What would wait for
the GPU is refused meanwhile. So every recogniser, every argument and every order of launches is tried; the CUDA C itself is not.
"""

import inspect
import textwrap

import torch
from emulated_kernels import KERNELS
from torch.utils._python_dispatch import TorchDispatchMode

from gptq_webui.gptq import stepper_choice
from gptq_webui.gptq.cuda import (
    cuda_experts,
    fused_forward,
    gpu_kernels,
    graphs,
    kernel_arguments,
    prompt_attention,
    replaced_layers,
)
from gptq_webui.gptq.cuda.kernel_source import programs

_WAITS = (  # for the GPU, which a recording must not
    "item", "_local_scalar_dense", "nonzero", "argwhere", "masked_select", "is_nonzero", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "equal", "repeat_interleave",
)  # fmt: skip
_capturing, _in_kernel = [], []


def _waits(func, args):
    name = func.name().partition("::")[2].partition(".")[0]
    if name == "repeat_interleave" and func.name().endswith(".self_int"):
        return False
    if name in ("index", "index_put", "index_put_"):
        return any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in args[1] or () if each is not None)
    return name in _WAITS or (name == "where" and len(args) == 1)


def _tolist(self, _plain=torch.Tensor.tolist):
    if _capturing and not _in_kernel:
        raise RuntimeError("called a synchronizing operation: tolist")
    return _plain(self)


class _Noting(TorchDispatchMode):
    """Notes what is computed, as (function, arguments, result)."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _waits(func, args):
            raise RuntimeError(f"called a synchronizing operation: {func.name()}")
        out = func(*args, **kwargs)
        self.noted.append((func, args, kwargs, out))
        return out


def _copy(to, found):
    if isinstance(to, torch.Tensor):
        if to.data_ptr() != found.data_ptr():
            to.copy_(found)
    elif isinstance(to, (tuple, list)):
        for each, other in zip(to, found, strict=True):
            _copy(each, other)


class _Graph:
    def __init__(self, noted):
        self._noted = noted

    def replay(self):
        with torch.inference_mode(), torch._C.DisableTorchFunction():
            for func, args, kwargs, out in self._noted:
                _copy(out, func(*args, **kwargs))


class Recorder:
    """In the place of GraphRecorder."""

    def __init__(self, device):
        pass

    def record(self, run):
        noting = _Noting()
        _capturing.append(noting)
        try:
            with noting:
                run()
        finally:
            _capturing.pop()
        graph = _Graph(noting.noted)
        return graph

    def reset(self):
        pass

    def close(self):
        pass


class Gpu:
    """In the place of gpu_kernels.Gpu."""

    name, processors, shared_bytes, shared_limit_bytes = "no GPU", 132, 228 * 1024, 227 * 1024
    device, capability, warpgroups = torch.device("cpu"), (9, 0), False

    def __init__(self, device):
        self._compiled, self._variants = set(), {}

    def add(self, variants=(), packings=(), formats=(), fixed=False):
        variants = list(variants)
        self._variants |= {each.name: each for each in variants}
        for text in programs(variants, packings, formats, fixed):
            self._compiled |= set(gpu_kernels._KERNEL.findall(text))

    add_missing = gpu_kernels.Gpu.add_missing

    @property
    def _module_of(self):
        return self._compiled

    def has(self, name):
        return name in self._compiled

    def scratch(self, size_bytes):
        return gpu_kernels.Scratch(torch.zeros(1, dtype=torch.int32), torch.empty(1))

    def close(self):
        self._compiled.clear()

    def run(self, name, grid, threads, arguments, shared_bytes=0, overlap=False):
        assert self.has(name), f"{name} was launched and never compiled"
        assert all(0 < each < 65536 or at == 0 for at, each in enumerate(grid)) and 0 < threads <= 1024, (name, grid, threads)
        assert shared_bytes <= self.shared_limit_bytes, name
        kind, given = arguments
        call = _Call(KERNELS[kind], name, self._variants.get(name), given | {"rows": grid[0]} if kind == "SAMPLE" else given)
        if _capturing:
            _capturing[-1].noted.append((call, (), {}, None))
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes(), torch.inference_mode():
            call()


class _Call:
    def __init__(self, kernel, name, variant, given):
        self.kernel, self.kernel_name, self.variant, self.given = kernel, name, variant, given

    def __call__(self):
        _in_kernel.append(self)
        try:
            self.kernel(self.kernel_name, self.variant, Named(self.given))
        finally:
            _in_kernel.pop()


class Named:
    def __init__(self, given):
        self.__dict__.update(given)


def _elsewhere(function, old, new):
    """The function as if its text named another device."""
    text = textwrap.dedent(inspect.getsource(function))
    assert old in text, function
    scope = {}
    exec(compile(text.replace(old, new), inspect.getsourcefile(function), "exec"), vars(inspect.getmodule(function)), scope)
    return scope[function.__name__]


def emulate(monkeypatch):
    """Until the test ends, stepper_for does with a model on the processor what it does on a GPU, but for the whole step."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(_capturing))
    monkeypatch.setattr(torch.Tensor, "tolist", _tolist)
    for module in (gpu_kernels, replaced_layers, cuda_experts, fused_forward, prompt_attention):
        monkeypatch.setattr(module, "Gpu", Gpu)
    monkeypatch.setattr(graphs, "GraphRecorder", Recorder)
    for module, name in ((replaced_layers, "replace_layers"), (cuda_experts, "replace_experts")):
        changed = _elsewhere(getattr(module, name), '"cuda"', '"cpu"')
        monkeypatch.setattr(module, name, changed)
        if module is not replaced_layers:
            monkeypatch.setattr(replaced_layers, name, changed)
    # the functions read their module's names, which are changed as well
    monkeypatch.setattr(stepper_choice, "stepper_for", _elsewhere(stepper_choice.stepper_for, '== "cuda"', '== "cpu"'))
    monkeypatch.setattr(stepper_choice, "parts_for_gpu", lambda hf: None)
    for name in KERNELS:
        arguments = getattr(kernel_arguments, name)

        def pack(name=name, plain=arguments.pack, **given):
            plain(**given)  # every field, of the kind that it must be
            return name, given

        monkeypatch.setattr(arguments, "pack", pack)

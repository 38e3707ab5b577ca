"""transformers' model code without what no answer needs: seconds of a start.

For a few names it imports torch's compiler (with SymPy), torch's tensors of several machines and scikit-learn (with SciPy and
pandas). In a process of ours stand-ins have those names meanwhile. A stand-in that is asked for anything else makes way for
what it stands for, so nothing is missing; it is only imported later, or never.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any

from ...gptq.collector import without_collector
from .quick_structure import StructureFinder
from .quick_torch import without_initialization, without_sources

in_own_process = False  # set by the command line: in another program the names belong to that


@contextmanager
def torch_alone() -> Iterator[None]:
    """Import torch inside."""
    with without_collector(), without_sources() if in_own_process else nullcontext():
        yield


@contextmanager
def without_unused() -> Iterator[None]:
    """Import transformers' model code inside."""
    with without_collector(), stand_ins():
        yield


@contextmanager
def stand_ins() -> Iterator[None]:
    """Open a model inside: torch imports its compiler for what it computes in Python, as it does for a model without values."""
    if not in_own_process or "torch._dynamo" in sys.modules:
        yield
        return
    structure = StructureFinder()
    sys.meta_path.insert(0, structure)
    try:
        _alone()
    finally:
        sys.meta_path.remove(structure)
    finders = [_Finder([each for each in some if each.__name__ not in sys.modules]) for some in _stand_ins()]
    sys.meta_path[:0] = finders
    try:
        with without_initialization():
            yield
    finally:
        for finder in finders:
            sys.meta_path.remove(finder)
            finder.withdraw()


def _alone() -> None:
    """Let transformers know that no other process computes with this one."""
    distributed = import_module("torch.distributed")
    available = distributed.is_available
    vars(distributed)["is_available"] = lambda: False  # transformers 4 asks it while it is imported
    try:
        utils, import_utils = import_module("transformers.utils"), import_module("transformers.utils.import_utils")
    finally:
        vars(distributed)["is_available"] = available
    for module in (utils, import_utils):
        if "is_torch_distributed_available" in vars(module):
            vars(module)["is_torch_distributed_available"] = lambda: False


_OF_PLAIN: dict[str, Callable[..., Any]] = {  # what torch asks of sizes and conditions, where they are plain numbers
    "expect_true": lambda a, skip=0: a,
    "guard_or_false": lambda a: a,
    "guard_or_true": lambda a: a,
    "guard_size_oblivious": lambda a: a,
    "statically_known_true": lambda a: a,
    "is_nested_int": lambda a: False,
    "sym_eq": lambda a, b: tuple(a) == tuple(b) if isinstance(a, (tuple, list)) else a == b,
    "sym_and": lambda *each: all(each),
    "sym_or": lambda *each: any(each),
}
_OF_PICTURES = {  # what models that find things in pictures are trained by; with it comes SciPy
    "loss_d_fine": ("DFineForObjectDetectionLoss",),
    "loss_deformable_detr": ("DeformableDetrForObjectDetectionLoss", "DeformableDetrForSegmentationLoss"),
    "loss_deimv2": ("Deimv2ForObjectDetectionLoss",),
    "loss_for_object_detection": ("ForObjectDetectionLoss", "ForSegmentationLoss"),
    "loss_grounding_dino": ("GroundingDinoForObjectDetectionLoss",),
    "loss_lw_detr": ("LwDetrForObjectDetectionLoss",),
    "loss_rf_detr": ("RfDetrForSegmentationLoss",),
    "loss_rt_detr": ("RTDetrForObjectDetectionLoss",),
}
_OF_SYMBOLS = ("guarding_hint_or_throw", "has_guarding_hint")


def _is_plain(value: Any) -> bool:
    return type(value) in (bool, int) or (type(value) in (tuple, list) and all(map(_is_plain, value)))


def _stand_ins() -> list[list["_StandIn"]]:
    """Those of one list go together."""

    def same(function: Any) -> Any:  # what marks a function for the compiler
        return function

    def disable(function: Any = None, *args: Any, **named: Any) -> Any:
        return same if function is None else function

    compiler = [
        _StandIn("torch._dynamo", allow_in_graph=same, assume_constant_result=same, disable=disable),
        _StandIn("torch._dynamo._trace_wrapped_higher_order_op", "TransformGetItemToIndex"),
        _StandIn("torch._dynamo.utils", "is_compile_supported"),  # for torchvision
    ]
    symbols = _StandIn("torch.fx.experimental.symbolic_shapes", *_OF_SYMBOLS)
    symbols.know({name: symbols.plainly(name, plain) for name, plain in _OF_PLAIN.items()})
    expressions = _StandIn("sympy", Basic=_Basic)
    losses = [_StandIn(f"transformers.loss.{name}", *functions) for name, functions in _OF_PICTURES.items()]
    found = [compiler, [symbols], [expressions], losses]
    if find_spec("sklearn") is not None:
        found.append([_StandIn("sklearn.metrics", "roc_curve")])
    return found


class _KindOfBasic(type):
    def __instancecheck__(cls, value: Any) -> bool:
        real = sys.modules.get("sympy")  # nothing is an expression before it is there
        return isinstance(real, ModuleType) and not isinstance(real, _StandIn) and isinstance(value, real.Basic)


class _Basic(metaclass=_KindOfBasic):
    """SymPy's class of all expressions."""


class _StandIn(ModuleType):
    def __init__(self, name: str, *later: str, **known: Any) -> None:
        """`later`: functions that import the real one when they are called."""
        super().__init__(name)
        self.__path__ = []
        self.finder: _Finder | None = None
        self.known: dict[str, Any] = {}
        self.know({**known, **{each: self._later(each) for each in later}})

    def _later(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            return getattr(self._real(), name)(*args, **named)

        call.__name__ = name
        return call

    def plainly(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        """The function `name`, which is `plain` where it is given plain numbers alone."""
        later = self._later(name)

        def call(*args: Any, **named: Any) -> Any:
            return (plain if all(map(_is_plain, args)) else later)(*args, **named)

        call.__name__ = name
        return call

    def know(self, known: Mapping[str, Any]) -> None:
        """Have these attributes until the real module is there."""
        self.known |= known
        vars(self).update(known)

    def _real(self) -> ModuleType:
        if self.finder is not None:
            self.finder.withdraw()
        real = import_module(self.__name__)
        vars(self).update({name: vars(real)[name] for name in self.known if name in vars(real)})
        return real

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # nobody needs the module itself
            raise AttributeError(name)
        return getattr(self._real(), name)


class _Finder(MetaPathFinder):
    """Puts stand-ins where Python looks for modules. An import of what is below one makes all of them go."""

    def __init__(self, modules: Sequence[_StandIn]) -> None:
        self._modules = list(modules)
        for each in modules:
            each.finder = self
            sys.modules[each.__name__] = each

    def withdraw(self) -> None:
        modules, self._modules = self._modules, []
        for each in modules:
            if sys.modules.get(each.__name__) is each:
                del sys.modules[each.__name__]

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        above = fullname.rpartition(".")[0]
        if above not in {each.__name__ for each in self._modules}:
            return None
        self.withdraw()
        real = import_module(above)
        if fullname in sys.modules:  # it has come with that
            return spec_from_loader(fullname, _Loaded(sys.modules[fullname]))
        return PathFinder.find_spec(fullname, real.__path__)


class _Loaded(Loader):
    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        pass

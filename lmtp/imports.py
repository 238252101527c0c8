"""Keeps out of the server what Transformers imports of PyTorch for other work: an eighth of the time of a start.

That is the compiler, which decorators ask for, and tensors spread over processes. Whoever needs the compiler later gets
it as if it had been there from the beginning.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_loader
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
LIGHT = f"{COMPILER}._trace_wrapped_higher_order_op"
"""The part of it that Transformers always imports, and that does without the rest."""


def lighten() -> None:
    """Do so in this process; before Transformers is imported."""
    import torch

    # As in a PyTorch that was built without it: a container is one process.
    torch.distributed.is_available = lambda: False
    if COMPILER not in sys.modules and (spec := find_spec(COMPILER)):
        compiler = module_from_spec(spec)
        compiler.__class__ = _LateCompiler
        sys.modules[COMPILER] = torch._dynamo = compiler
        sys.meta_path.insert(0, _Parts())


class _LateCompiler(ModuleType):
    """The package torch._dynamo until it is executed, when something in it is used for the first time. What decorators
    do before that is made up for."""

    def assume_constant_result(self, function: Any) -> Any:
        """torch._dynamo.assume_constant_result, which only marks the function."""
        return self._mark("assume_constant_result", function)

    def allow_in_graph(self, function: Any) -> Any:
        """torch._dynamo.allow_in_graph, which only marks the function."""
        return self._mark("allow_in_graph", function)

    def disable(self, function: Callable[..., Any] | None = None, *options: Any, **named: Any) -> Any:
        """torch._dynamo.disable. As long as nothing is compiled, there is nothing to keep from it."""
        if function is None:
            return lambda function: self.disable(function, *options, **named)
        if not inspect.isfunction(function):  # of a class or a module it gives back one
            self._execute()
            return getattr(self, "disable")(function, *options, **named)  # noqa: B009 - not this method any more
        package: ModuleType = self  # of this class no longer, once it is executed
        real: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def disabled(*args: Any, **kwargs: Any) -> Any:
            if isinstance(package, _LateCompiler):
                return function(*args, **kwargs)
            if not real:
                real.append(package.disable(function, *options, **named))
            return real[0](*args, **kwargs)

        return disabled

    def _mark(self, decorator: str, function: Any) -> Any:
        self.__dict__.setdefault("_marked", []).append((decorator, function))
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._execute()
        return getattr(self, name)

    def _execute(self) -> None:
        marked = self.__dict__.pop("_marked", [])
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(self)
        for decorator, function in marked:
            getattr(self, decorator)(function)


class _Parts(MetaPathFinder, Loader):
    """Has the package executed before any other part of it is imported, as ever."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """Called for every import that is not yet done; None leaves it to others."""
        package = sys.modules.get(COMPILER)
        if fullname.startswith(f"{COMPILER}.") and fullname != LIGHT and isinstance(package, _LateCompiler):
            package._execute()
            if fullname in sys.modules:  # the package has imported it
                return spec_from_loader(fullname, self)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The one that is there."""
        spec.loader_state = sys.modules[spec.name].__spec__
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Nothing, since it has been executed; it only gets its own spec back."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state

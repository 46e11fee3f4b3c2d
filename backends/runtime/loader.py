"""`load`: opens a .pte + .ptd in the best runtime of this machine, and says which it is."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from executorch_moe.backends.artifact.cubin import find_gpu_code
from executorch_moe.backends.artifact.digests import COPY_AGAIN
from executorch_moe.backends.artifact.files import no_digests, open_artifact
from executorch_moe.backends.artifact.method_targets import check_arch, gpu_capability, pick_cpu_methods, pick_methods
from executorch_moe.backends.artifact.ptd import MakeWeights
from executorch_moe.backends.artifact.pte import PteFile
from executorch_moe.backends.artifact.weight_metadata import CUDA_BACKEND, parse_delegate
from executorch_moe.backends.errors import said_in_one_line
from executorch_moe.backends.versions import check_versions

from .cuda_graph import check_graph_methods, graph_methods
from .delegate_host import DelegateHost, why_not_delegate_host
from .positions import BATCH_METHOD as BATCH_METHOD
from .positions import Orders
from .positions import check_positions as check_positions
from .positions import check_rows as check_rows
from .pybindings import why_not_pybindings

NO_GRAPH_SETTER = (
    "its Python bindings cannot set the backend option enable_cuda_graph_for_method: set it from C++, or use runtime "
    "'delegate-host' or no CUDA graph"
)
RUNTIMES = ("auto", "executorch", "delegate-host")
EXECUTORCH_CPU = "executorch (CPU)"
EXECUTORCH_CUDA = "executorch (CUDA)"
DELEGATE_HOST = "delegate host (PyTorch AOTInductor)"
_NOT_LOADED = (
    "check it with `executorch-moe inspect --verify`; if it is intact, export it with the installed versions; "
    f"else {COPY_AGAIN}"
)
_NOT_RUN = "check the file with `executorch-moe inspect --verify` and this installation with `executorch-moe doctor`"


TEXT_METHODS, CONTEXT = ("prefill", "decode"), "get_max_context_len"
"""Methods of an exported language model, whose second input is the positions, and the constant that limits these."""
MAX_BATCH = "get_max_batch"
"""Constant of an exported language model with `BATCH_METHOD`: its rows, and the slots of its cache."""
RECURRENT = "has_recurrent_state"
"""Constant of an exported language model whose tokens must come in order."""


class Engine(Protocol):
    """Runs the methods of an opened program. `run` takes a name in the program; `reset` restores the state."""

    def run(self, method: str, inputs: tuple[Tensor, ...]) -> list[Tensor]: ...

    def reset(self) -> None: ...


class LoadedProgram:
    """An opened artifact.

    Attributes:
        runtime: "executorch (CPU)", "executorch (CUDA)" or "delegate host (PyTorch AOTInductor)".
        device: device of the outputs, and best device for inputs.
        note: a warning for the user; empty if there is none.
    """

    def __init__(
        self, program: PteFile, engine: Engine, runtime: str, device: torch.device, methods: Mapping[str, str]
    ) -> None:
        self._program, self._engine, self._methods = program, engine, methods
        self.runtime, self.device = runtime, device
        self.note = no_digests(program)
        self._orders = Orders(MAX_BATCH in program.constant_names) if RECURRENT in program.constant_names else None

    @property
    def method_names(self) -> list[str]:
        """Methods that compute something, sorted; constant methods are read with `constant`.

        These are the methods for this GPU or the CPU, without `@sm_90` or `@cpu`.
        """
        return list(self._methods)

    @property
    def constant_names(self) -> list[str]:
        """Names of the constant methods, sorted."""
        return self._program.constant_names

    def constant(self, name: str) -> Any:
        """Value of a constant method: bool, int, float, str, or lists of them.

        Raises:
            ValueError: there is no such constant method.
        """
        return self._program.constant(name)

    @functools.cached_property
    def _max_context(self) -> int | None:
        """Number of positions in the cache of a language model; None for other programs."""
        return int(self.constant(CONTEXT)) if CONTEXT in self.constant_names else None

    def run(self, method: str, *tensors: Tensor) -> list[Tensor]:
        """Run a method.

        Args:
            method: one of `method_names`.
            tensors: its inputs, on any device; `device` avoids a copy.

        Returns:
            Its outputs, on `device`.

        Raises:
            ValueError: the method is unknown or was not exported for these inputs; or positions of a language model, if
                they are on the CPU, are outside its cache, or not in order for a model with recurrent layers.
            RuntimeError: the runtime cannot run the method; the message has its reason.
        """
        if method not in self.method_names:
            raise ValueError(f"no method {method!r} in {self._program.path}: it has {', '.join(self.method_names)}")
        if method in TEXT_METHODS and self._max_context is not None and len(tensors) > 1:
            check_positions(tensors[1], self._max_context, method)
            if self._orders is not None:
                self._orders.follow(method, tensors)
        if method == BATCH_METHOD and self._max_context is not None and len(tensors) > 2:
            check_rows(tensors[1], tensors[2], self._max_context)
            if self._orders is not None:
                self._orders.follow(method, tensors)
        with said_in_one_line(f"{self.runtime} cannot run {method} of {self._program.path}", _NOT_RUN):
            return self._engine.run(self._methods[method], tensors)

    def reset(self) -> None:
        """Restore the initial values of mutated buffers (the KV cache), in all methods.

        Raises:
            RuntimeError: the runtime cannot load the program again.
        """
        with _loading(self.runtime, self._program.path):
            self._engine.reset()
        if self._orders is not None:
            self._orders.restart()


def load(
    pte: str | Path | PteFile,
    ptd: str | Path | None = None,
    runtime: str = "auto",
    cuda_graph: Collection[str] = (),
    make_weights: Callable[[PteFile, torch.device], MakeWeights | None] | None = None,
    *,
    verify: bool = True,
) -> LoadedProgram:
    """Open an artifact.

    Args:
        pte: path of the program, or an opened program.
        ptd: its weights; by default the file of the same name.
        runtime: "executorch": ExecuTorch's own runtime; "delegate-host": PyTorch's AOTInductor runtime, for programs
            with CUDA delegates; "auto": the first of the two that can run the program here.
        cuda_graph: methods whose delegates are replayed as CUDA graphs; their inputs must have fixed sizes. See
            `runtime.cuda_graph`.
        make_weights: (program, device) -> `MakeWeights` for an artifact with placeholders; delegate host only.
        verify: compare all bytes of both files with the digests of the export, before any native code reads them.
            False: compare sizes and structure only.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: the runtime is unknown or not for this program, a file is damaged, or the .ptd is another program's.
        RuntimeError: this machine cannot run the program (the message gives the reason for each runtime); its GPU has
            an architecture that the program was not exported for; installed packages are outside the ranges that this
            package requires; or the runtime refuses the files.
        NotImplementedError: the delegate host does not support the program, or another runtime got `cuda_graph`.
    """
    check_versions()
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime {runtime!r} is unknown: choose one of {', '.join(RUNTIMES)}")
    program, data = open_artifact(pte, ptd, verify=verify)
    if note := no_digests(program):
        warnings.warn(note, stacklevel=2)
    backends = {delegate.id for _, delegate in program.delegates()}
    ptd_path = data.path if data is not None else None
    if CUDA_BACKEND not in backends:
        if runtime == "delegate-host":
            raise ValueError(
                f"{program.path} has no {CUDA_BACKEND} delegate, which is all that the delegate host runs: "
                "use runtime 'executorch'"
            )
        if why := why_not_executorch(backends):
            raise RuntimeError(f"cannot run {program.path} in ExecuTorch's runtime: {why}")
        if cuda_graph:
            raise NotImplementedError(f"{program.path} has no {CUDA_BACKEND} delegate: leave CUDA graphs off")
        methods = pick_cpu_methods(program.method_names)
        with _loading(EXECUTORCH_CPU, program.path):
            engine = ExecutorchEngine(program, ptd_path, methods.values())
        return LoadedProgram(program, engine, EXECUTORCH_CPU, torch.device("cpu"), methods)

    check_graph_methods(program, cuda_graph)
    reasons = {}
    if runtime in ("auto", "executorch"):
        why = why_not_executorch(backends) or (NO_GRAPH_SETTER if cuda_graph else "")
        if not why:
            methods = methods_for_this_gpu(program)
            with _loading(EXECUTORCH_CUDA, program.path):
                engine = ExecutorchEngine(program, ptd_path, methods.values())
            return LoadedProgram(program, engine, EXECUTORCH_CUDA, torch.device("cpu"), methods)
        reasons["ExecuTorch's runtime"] = why
    if runtime in ("auto", "delegate-host"):
        if not (why := why_not_delegate_host()):
            device = torch.device("cuda", torch.cuda.current_device())
            methods = methods_for_this_gpu(program)
            wrap = graph_methods(cuda_graph) if cuda_graph else None
            weights = make_weights(program, device) if make_weights else None
            with _loading(DELEGATE_HOST, program.path):
                host = DelegateHost(
                    program, data, device, wrap_delegate=wrap, weights=weights, methods=methods.values()
                )
            return LoadedProgram(program, host, DELEGATE_HOST, device, methods)
        reasons["the delegate host"] = why
    listed = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    if gpu_capability() is None:
        libraries = [library for name in program.method_names for library in _libraries(program, name)]
        archs = {code.arch for library in libraries for code in find_gpu_code(library) if code.kind == "cubin"}
        raise RuntimeError(
            f"{program.path} was exported for {', '.join(sorted(archs)) or 'NVIDIA GPUs'}, and there is no GPU here: "
            f"load it on a machine with such a GPU, or export with target 'cpu' ({listed})"
        )
    raise RuntimeError(f"{program.path} has CUDA delegates and cannot run here. {listed}")


def _loading(runtime: str, path: Path) -> AbstractContextManager[None]:
    """Context in which an error of a runtime becomes one line that names the program."""
    return said_in_one_line(f"{runtime} cannot load {path}", _NOT_LOADED)


def methods_for_this_gpu(program: PteFile) -> dict[str, str]:
    """Method -> its name in a program with CUDA delegates, for the GPU of this machine.

    Raises:
        RuntimeError: the program was exported for other architectures only; the message names both.
    """
    capability = gpu_capability()
    methods = pick_methods(program.method_names, capability, lambda name: _architecture(program, name))
    if capability is not None:
        for method, name in methods.items():
            for library in _libraries(program, name):
                check_arch(library, capability, f"method {method}")
    return methods


def _architecture(program: PteFile, method: str) -> int | None:
    """The newest architecture of a method's code, as 90; None without code."""
    return max((code.sm for library in _libraries(program, method) for code in find_gpu_code(library)), default=None)


def _libraries(program: PteFile, method: str) -> Iterator[memoryview]:
    named = program.named_data()
    for delegate in program.plan(method).delegates:
        if delegate.id == CUDA_BACKEND:
            payload = program.delegate_data(delegate)
            yield named[parse_delegate(payload, f"{program.path}, method {method}").library_key]


def why_not_executorch(backends: set[str]) -> str:
    """Empty if ExecuTorch's own runtime can run delegates of these backends here, else the reason."""
    if why := why_not_pybindings():
        return why
    registered = set(_bindings()._get_registered_backend_names())
    if missing := sorted(backends - registered):
        have = ", ".join(sorted(registered))
        return f"{missing[0]} is not registered in the installed build of ExecuTorch (it has {have})"
    return ""


def _bindings() -> Any:
    """ExecuTorch's bindings. Call it only if `why_not_pybindings` returns an empty text."""
    return importlib.import_module("executorch.extension.pybindings.portable_lib")


class ExecutorchEngine:
    """A program in ExecuTorch's own runtime.

    Args:
        program: the .pte.
        ptd: its weights.
        methods: names of the methods to load.
    """

    def __init__(self, program: PteFile, ptd: Path | None, methods: Iterable[str]) -> None:
        self._program, self._names = program, sorted(methods)
        runtime = importlib.import_module("executorch.runtime").Runtime.get()
        self._loaded = runtime.load_program(program.path, data_path=None if ptd is None else str(ptd))
        self._methods: dict[str, Any] = {}
        self._load_methods()

    def run(self, method: str, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Run a method; inputs on any device, outputs on the CPU."""
        self._program.check_inputs(method, inputs)
        self._initial = False
        outputs: Sequence[Any] = self._methods[method].execute([t.detach().cpu().contiguous() for t in inputs])
        return [output if isinstance(output, Tensor) else torch.tensor(output) for output in outputs]

    def reset(self) -> None:
        """Load all methods again if any has run: ExecuTorch has no function that restores state."""
        if not self._initial:
            self._load_methods()

    def _load_methods(self) -> None:
        # Free the methods first: each has memory for its intermediate values.
        self._methods = {}
        # `Program.load_method` of executorch.runtime returns a cached method; the object that it wraps loads again.
        bound = self._loaded._program
        # All at once: loading a method writes the initial values of the buffers that it shares with the others.
        method_class = importlib.import_module("executorch.runtime").Method
        self._methods = {name: method_class(bound.load_method(name)) for name in self._names}
        self._initial = True

"""`load`: opens a .pte + .ptd in the best runtime that this machine has, and says which."""

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
from executorch_moe.backends.artifact.method_targets import check_arch, gpu_capability, pick_methods
from executorch_moe.backends.artifact.ptd import MakeWeights
from executorch_moe.backends.artifact.pte import PteFile
from executorch_moe.backends.artifact.weight_metadata import CUDA_BACKEND, parse_delegate
from executorch_moe.backends.errors import said_in_one_line
from executorch_moe.backends.versions import check_versions

from .cuda_graph import check_graph_methods, graph_methods
from .delegate_host import DelegateHost, why_not_delegate_host
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
    f"check it with `executorch-moe inspect --verify`; if it is whole, export it with these versions; else {COPY_AGAIN}"
)
_NOT_RUN = "check the file with `executorch-moe inspect --verify` and this installation with `executorch-moe doctor`"


TEXT_METHODS, CONTEXT = ("prefill", "decode"), "get_max_context_len"
"""Methods of an exported language model, whose second input is the positions, and the constant that bounds them."""


def check_positions(positions: Tensor, max_context: int, method: str) -> None:
    """Check positions in a language model's cache; those on a GPU are not waited for.

    Raises:
        ValueError: one is negative, or not below `max_context`. Nothing in the program checks them.
    """
    if positions.device.type != "cpu" or positions.dtype != torch.int64 or positions.dim() != 1 or not len(positions):
        return  # the second input of a method of another kind
    lowest, highest = (int(end) for end in positions.aminmax())
    if lowest < 0 or highest >= max_context:
        raise ValueError(
            f"method {method!r} got position {lowest if lowest < 0 else highest}, but its cache has positions 0 to "
            f"{max_context - 1}: count the tokens of the text from 0, or export with a larger --max-context"
        )


class Engine(Protocol):
    """Runs the methods of one opened program: `run` by the name in the program, `reset` restores its state."""

    def run(self, method: str, inputs: tuple[Tensor, ...]) -> list[Tensor]: ...

    def reset(self) -> None: ...


class LoadedProgram:
    """An opened artifact.

    Attributes:
        runtime: what runs it: "executorch (CPU)", "executorch (CUDA)" or "delegate host (PyTorch AOTInductor)".
        device: where inputs should live and outputs come.
        note: what to tell whoever runs it; empty if there is nothing.
    """

    def __init__(
        self, program: PteFile, engine: Engine, runtime: str, device: torch.device, methods: Mapping[str, str]
    ) -> None:
        self._program, self._engine, self._methods = program, engine, methods
        self.runtime, self.device = runtime, device
        self.note = no_digests(program)

    @property
    def method_names(self) -> list[str]:
        """Methods that compute something, sorted; constant methods are read with `constant`.

        In an artifact for several architectures each is there once, the one for this GPU.
        """
        return list(self._methods)

    @property
    def constant_names(self) -> list[str]:
        """Names that `constant` knows, sorted."""
        return self._program.constant_names

    def constant(self, name: str) -> Any:
        """Value of a constant method: bool, int, float, str, or lists of them.

        Raises:
            ValueError: no such constant method.
        """
        return self._program.constant(name)

    @functools.cached_property
    def _max_context(self) -> int | None:
        """Positions in the cache of a language model; None for another program."""
        return int(self.constant(CONTEXT)) if CONTEXT in self.constant_names else None

    def run(self, method: str, *tensors: Tensor) -> list[Tensor]:
        """Run a method.

        Args:
            method: one of `method_names`.
            tensors: its inputs, on any device; `device` avoids a copy.

        Returns:
            Its outputs, on `device`.

        Raises:
            ValueError: unknown method, or inputs that it was not exported for; of a language model also positions
                outside its cache, if they are on the CPU.
            RuntimeError: the runtime cannot run it; the message has its reason.
        """
        if method not in self.method_names:
            raise ValueError(f"no method {method!r} in {self._program.path}: it has {', '.join(self.method_names)}")
        if method in TEXT_METHODS and self._max_context is not None and len(tensors) > 1:
            check_positions(tensors[1], self._max_context, method)
        with said_in_one_line(f"{self.runtime} cannot run {method} of {self._program.path}", _NOT_RUN):
            return self._engine.run(self._methods[method], tensors)

    def reset(self) -> None:
        """Put mutated buffers (the KV cache) back to their initial values, in all methods.

        Raises:
            RuntimeError: the runtime cannot load the program again.
        """
        with _loading(self.runtime, self._program.path):
            self._engine.reset()


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
        pte: the program, or the program as it was opened before.
        ptd: its weights; by default the file of the same name.
        runtime: "executorch": ExecuTorch's own runtime; "delegate-host": PyTorch's AOTInductor runtime, for programs
            with CUDA delegates; "auto": the first of the two that can run the program here.
        cuda_graph: methods whose delegates are replayed as CUDA graphs, each of fixed sizes; see `backends.cuda.graph`.
        make_weights: (program, device) -> what makes the weights of an artifact without them; delegate host only.
        verify: before any native code reads the files, compare all their bytes with the digests that the export left
            in them. Without it, sizes and structure are compared.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: unknown runtime, a damaged file, a .ptd of another program, or a runtime not for this program.
        RuntimeError: this machine cannot run the program; the message gives the reason for each runtime. Its GPU is of
            another architecture than those that the program was exported for. Packages outside the range that this
            package requires. The runtime refuses the files.
        NotImplementedError: the delegate host meets something that it does not run; a CUDA graph in another runtime.
    """
    check_versions()
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime {runtime!r} is unknown: choose one of {', '.join(RUNTIMES)}")
    program, data = open_artifact(pte, ptd, verify=verify)
    if note := no_digests(program):
        warnings.warn(note, stacklevel=2)
    backends = {delegate.id for _, delegate in program.delegates()}
    ptd_path = data.path if data is not None else None
    check_graph_methods(program, cuda_graph)
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
        methods = {name: name for name in program.method_names}
        with _loading(EXECUTORCH_CPU, program.path):
            engine = ExecutorchEngine(program, ptd_path, program.method_names)
        return LoadedProgram(program, engine, EXECUTORCH_CPU, torch.device("cpu"), methods)

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
    told = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    if gpu_capability() is None:
        libraries = [library for name in program.method_names for library in _libraries(program, name)]
        archs = {code.arch for library in libraries for code in find_gpu_code(library) if code.kind == "cubin"}
        raise RuntimeError(
            f"{program.path} was exported for {', '.join(sorted(archs)) or 'NVIDIA GPUs'}, and there is no GPU here: "
            f"load it on a machine with such a GPU, or export with target 'cpu' ({told})"
        )
    raise RuntimeError(f"{program.path} has CUDA delegates and cannot run here. {told}")


def _loading(runtime: str, path: Path) -> AbstractContextManager[None]:
    """Within it, what a runtime raises about a program becomes one line."""
    return said_in_one_line(f"{runtime} cannot load {path}", _NOT_LOADED)


def methods_for_this_gpu(program: PteFile) -> dict[str, str]:
    """Method -> its name in a program with CUDA delegates, each with code for the GPU that is here.

    Raises:
        RuntimeError: the program was exported for other architectures; names both.
    """
    capability = gpu_capability()
    methods = pick_methods(program.method_names, capability)
    if capability is not None:
        for method, name in methods.items():
            for library in _libraries(program, name):
                check_arch(library, capability, f"method {method}")
    return methods


def _libraries(program: PteFile, method: str) -> Iterator[memoryview]:
    named = program.named_data()
    for delegate in program.plan(method).delegates:
        if delegate.id == CUDA_BACKEND:
            payload = program.delegate_data(delegate)
            yield named[parse_delegate(payload, f"{program.path}, method {method}").library_key]


def why_not_executorch(backends: set[str]) -> str:
    """Empty if ExecuTorch's own runtime can run delegates of these backends here, else the reason why not."""
    if why := why_not_pybindings():
        return why
    registered = set(_bindings()._get_registered_backend_names())
    if missing := sorted(backends - registered):
        have = ", ".join(sorted(registered))
        return f"{missing[0]} is not registered in the installed build of ExecuTorch (it has {have})"
    return ""


def _bindings() -> Any:
    """ExecuTorch's bindings; call only after `why_not_pybindings` found nothing."""
    return importlib.import_module("executorch.extension.pybindings.portable_lib")


class ExecutorchEngine:
    """A program in ExecuTorch's own runtime.

    Args:
        program: the .pte.
        ptd: its weights.
        methods: names of those to load.
    """

    def __init__(self, program: PteFile, ptd: Path | None, methods: Iterable[str]) -> None:
        self._program, self._names = program, sorted(methods)
        runtime = importlib.import_module("executorch.runtime").Runtime.get()
        self._loaded = runtime.load_program(program.path, data_path=None if ptd is None else str(ptd))
        self._methods: dict[str, Any] = {}
        self._load_methods()

    def run(self, method: str, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Run a method; inputs from any device, outputs on the CPU."""
        self._program.check_inputs(method, inputs)
        self._initial = False
        outputs: Sequence[Any] = self._methods[method].execute([t.detach().cpu().contiguous() for t in inputs])
        return [output if isinstance(output, Tensor) else torch.tensor(output) for output in outputs]

    def reset(self) -> None:
        """Load the methods of the same program again, if one has run: ExecuTorch has no call that restores state."""
        if not self._initial:
            self._load_methods()

    def _load_methods(self) -> None:
        # Freed first: each holds memory for its intermediate values.
        self._methods = {}
        # `Program.load_method` of executorch.runtime returns what it loaded before; what it wraps loads anew.
        bound = self._loaded._program
        # All at once: loading a method writes the initial values of the buffers that it shares with the others.
        method_class = importlib.import_module("executorch.runtime").Method
        self._methods = {name: method_class(bound.load_method(name)) for name in self._names}
        self._initial = True

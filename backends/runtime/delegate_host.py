"""The delegate host: runs the CUDA delegates of a .pte + .ptd inside PyTorch's AOTInductor runtime.

For GPU machines whose ExecuTorch has no CudaBackend, such as the wheel on PyPI. A delegate is an AOTInductor library,
and its undefined symbols are `aoti_torch_*` shims, which PyTorch exports as well. This module does not use ExecuTorch's
bindings.
"""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from executorch.exir.schema import DelegateCall, ExecutionPlan, FreeCall, KernelCall, MoveCall
from torch import Tensor

from executorch_moe.backends.artifact.method_targets import check_arch, split_method
from executorch_moe.backends.artifact.ptd import MakeWeights, PtdFile
from executorch_moe.backends.artifact.pte import PteFile, dtype_of
from executorch_moe.backends.artifact.weight_metadata import (
    CUDA_BACKEND,
    MUTATED_BUFFERS_KEY,
    CudaDelegate,
    CudaWeight,
    parse_delegate,
)

from .gpu_memory import check_memory, say_out_of_memory

# Copies between host and device that ExecuTorch inserts around a delegate.
_COPIES = ("et_copy::_h2d_copy", "et_copy::_d2h_copy")
RunDelegate = Callable[[list[Tensor]], list[Tensor]]


class Container(Protocol):
    """The methods of torch._C._aoti.AOTIModelContainerRunner* that the host uses."""

    def run(self, inputs: list[Tensor]) -> list[Tensor]: ...

    def get_constant_names_to_original_fqns(self) -> dict[str, str]: ...

    def update_constant_buffer(
        self, tensor_map: dict[str, Tensor], use_inactive: bool, validate_full_updates: bool, user_managed: bool
    ) -> None: ...


@dataclass(frozen=True)
class Step:
    """One instruction: `sources` -> `targets` through a delegate, or a copy where `delegate` is None."""

    delegate: int | None
    sources: tuple[int, ...]
    targets: tuple[int, ...]


class DelegateHost:
    """Runs all methods of a program. Weights and mutated buffers with the same key in the .ptd exist once.

    Args:
        program: the .pte.
        data: its .ptd.
        device: where delegates run; "cpu" only with an `open_container` for it (tests).
        methods: names of the methods to load; None loads all.
        open_container: makes the AOTInductor runner for a library and a device.
        weights: makes the weights for which the .ptd has placeholders; see `MakeWeights`.
        wrap_delegate: called once for each delegate with (method, run) after its weights are bound; its result is
            called instead of `run`. For CUDA graph capture: weights never move, inputs and outputs may.

    Raises:
        NotImplementedError: a method needs more than CudaBackend delegates and copies.
        RuntimeError: the delegates have no code for this GPU, or their weights do not fit into its memory.
        ValueError: a delegate is damaged, or both files lack a weight that it names.
    """

    def __init__(
        self,
        program: PteFile,
        data: PtdFile | None,
        device: torch.device,
        *,
        methods: Collection[str] | None = None,
        open_container: Callable[[Path, torch.device], Container] | None = None,
        wrap_delegate: Callable[[str, RunDelegate], RunDelegate] | None = None,
        weights: MakeWeights | None = None,
    ) -> None:
        self.device = device
        self._program, self._data, self._make = program, data, weights
        self._named: dict[str, tuple[str, int]] = {}
        self._storages: dict[str, Tensor] = {}
        self._state_keys: set[str] = set()
        self._delegates: dict[str, list[RunDelegate]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="executorch_moe_")
        names = program.method_names if methods is None else sorted(methods)
        self._steps = {name: plan_steps(program.plan(name)) for name in names}
        parsed = {name: self._parse(name) for name in names}
        named = program.named_data()
        if device.type == "cuda":
            for name, delegates in parsed.items():
                for delegate in delegates:
                    capability = torch.cuda.get_device_capability(device)
                    check_arch(named[delegate.library_key], capability, f"{program.path}, method {name},")
        check_memory(program.path, parsed, device)
        for name, delegates in parsed.items():
            self._delegates[name] = []
            for index, delegate in enumerate(delegates):
                library = Path(self._folder.name) / f"{name}_{index}.so"
                library.write_bytes(named[delegate.library_key])
                container = (open_container or open_cuda_container)(library, device)
                self._bind(name, container, delegate)
                run: RunDelegate = container.run
                self._delegates[name].append(wrap_delegate(split_method(name)[0], run) if wrap_delegate else run)

    def run(self, method: str, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Run a method; outputs stay on the device.

        Raises:
            ValueError: the method is not loaded, or was not exported for these inputs.
            RuntimeError: the GPU is out of memory.
        """
        plan = self._program.plan(method)
        if method not in self._steps:
            raise ValueError(f"method {method!r} is not loaded: choose one of {', '.join(self._steps)}")
        self._program.check_inputs(method, inputs)
        here = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with here, say_out_of_memory(method, inputs, self.device):
            return self._run_steps(method, plan, inputs)

    def _run_steps(self, method: str, plan: ExecutionPlan, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        values = {index: self._place(tensor) for index, tensor in zip(plan.inputs, inputs, strict=True)}
        for step in self._steps[method]:
            sources = [values[index] for index in step.sources]
            results = sources if step.delegate is None else self._delegates[method][step.delegate](sources)
            if len(results) != len(step.targets):
                raise RuntimeError(
                    f"{method}: the delegate returned {len(results)} tensors, the plan expects {len(step.targets)}"
                )
            values.update(zip(step.targets, results, strict=True))
        return [values[index] for index in plan.outputs]

    def reset(self) -> None:
        """Restore the initial values of all mutated buffers, in place."""
        for key in sorted(self._state_keys):
            if self._is_empty(key):
                self._storages[key].zero_()
                continue
            made = self._made(key)
            self._storages[key].copy_(self._bytes(key) if made is None else made)

    def storage(self, key: str) -> Tensor:
        """The uint8 [bytes] tensor of a storage key, shared by all methods (KeyError if no method uses it)."""
        return self._storages[key]

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device).contiguous()

    def _parse(self, method: str) -> list[CudaDelegate]:
        plan, named, parsed = self._program.plan(method), self._program.named_data(), []
        for delegate in plan.delegates:
            entry = parse_delegate(self._program.delegate_data(delegate), f"{self._program.path}, method {method}")
            if entry.library_key not in named:
                raise ValueError(
                    f"{self._program.path}, method {method}: the delegate's library is missing: export it again"
                )
            specs = {spec.key: spec.value for spec in delegate.compile_specs}
            # Without this list (stock CudaPartitioner) any buffer may be state, so reset() restores all of them.
            state = (
                set(bytes(specs[MUTATED_BUFFERS_KEY]).decode().split("\n")) if MUTATED_BUFFERS_KEY in specs else None
            )
            self._state_keys.update(w.storage_key for w in entry.weights if state is None or w.fqn in state)
            parsed.append(entry)
        return parsed

    def _bind(self, method: str, container: Container, delegate: CudaDelegate) -> None:
        """Pass a container its constants under its own names. The host keeps the tensors; they are not copied."""
        weights = {weight.fqn: weight for weight in delegate.weights}
        constants = {}
        for name, fqn in container.get_constant_names_to_original_fqns().items():
            weight = weights.get(fqn) or weights.get(name)
            if weight is None:
                raise ValueError(
                    f"{self._program.path}, method {method}: no weight for constant {fqn!r}: export it again"
                )
            constants[name] = self._view(weight)
        if constants:
            # Validation makes the runtime refuse a map that lacks a constant, instead of reading freed memory.
            container.update_constant_buffer(constants, False, True, True)

    def _view(self, weight: CudaWeight) -> Tensor:
        storage = self._storages.get(weight.storage_key)
        if storage is None:
            target = self.device if weight.device == "cuda" else torch.device("cpu")
            self._named[weight.storage_key] = (weight.fqn, weight.storage_nbytes)
            made = self._made(weight.storage_key)
            given = self._bytes(weight.storage_key) if made is None else made
            if given.numel() != weight.storage_nbytes:
                raise ValueError(
                    f"weight {weight.fqn!r} has {given.numel()} bytes, {self._program.path} needs "
                    f"{weight.storage_nbytes}: export it again"
                )
            # Bytes of a file are copied; tensors that were made for this program are used directly.
            if self._is_empty(weight.storage_key):
                storage = torch.zeros_like(given, device=target)
            else:
                storage = torch.empty_like(given, device=target).copy_(given) if made is None else made
            self._storages[weight.storage_key] = storage
        typed = torch.empty(0, dtype=dtype_of(weight.dtype), device=storage.device)
        return typed.set_(storage.untyped_storage(), weight.storage_offset, weight.sizes, weight.strides)

    def _is_empty(self, key: str) -> bool:
        """True for a state that starts at zero: its zeros need not be copied to the GPU."""
        if self._make is not None or key not in self._state_keys or self._data is None:
            return False
        return key in self._data.sizes() and self._data.is_empty(key)

    def _made(self, key: str) -> Tensor | None:
        return self._make(*self._named[key]) if self._make is not None else None

    def _bytes(self, key: str) -> Tensor:
        named = self._program.named_data()
        if key in named:
            return (
                torch.frombuffer(bytearray(named[key]), dtype=torch.uint8)
                if len(named[key])
                else torch.empty(0, dtype=torch.uint8)
            )
        if self._data is None or key not in self._data.sizes():
            raise ValueError(f"weight {key!r} of {self._program.path} is in no file: pass the .ptd of the same export")
        if self._data.is_placeholder(key):
            raise ValueError(
                f"{self._data.path} holds no weights, only placeholders: load it with the command line, "
                "which makes them, or export it without --placeholder-weights"
            )
        return self._data.tensor(key)


def plan_steps(plan: ExecutionPlan) -> list[Step]:
    """The plan as delegate calls and copies.

    Raises:
        NotImplementedError: the plan has another instruction or a delegate of another backend; the message names it.
    """
    if len(plan.chains) != 1:
        raise NotImplementedError(f"method {plan.name} has {len(plan.chains)} chains, the delegate host runs one")
    known, steps = set(plan.inputs), []
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if isinstance(call, FreeCall):
            continue
        if isinstance(call, MoveCall):
            step = Step(None, (call.move_from,), (call.move_to,))
        elif isinstance(call, DelegateCall):
            backend = plan.delegates[call.delegate_index].id
            if backend != CUDA_BACKEND:
                raise NotImplementedError(
                    f"method {plan.name} has a {backend} delegate, the delegate host runs {CUDA_BACKEND} only"
                )
            # Arguments are inputs, then outputs. Outputs are values that no earlier step has written.
            sources = tuple(index for index in call.args if index in known)
            targets = tuple(call.args[len(sources) :])
            if sources != tuple(call.args[: len(sources)]):
                raise NotImplementedError(
                    f"method {plan.name}: the arguments of a delegate are not inputs, then outputs"
                )
            step = Step(call.delegate_index, sources, targets)
        elif isinstance(call, KernelCall) and plan.operators[call.op_index].name in _COPIES:
            step = Step(None, (call.args[0],), (call.args[-1],))
        else:
            what = plan.operators[call.op_index].name if isinstance(call, KernelCall) else type(call).__name__
            raise NotImplementedError(
                f"method {plan.name} runs {what} outside its delegates, the delegate host runs delegates only: "
                "lower the whole method with MoECudaPartitioner, or use ExecuTorch's own runtime"
            )
        if missing := [index for index in step.sources if index not in known]:
            raise NotImplementedError(f"method {plan.name}: value {missing[0]} is used before anything writes it")
        known.update(step.targets)
        steps.append(step)
    if missing := [index for index in plan.outputs if index not in known]:
        raise NotImplementedError(f"method {plan.name}: output value {missing[0]} is not computed by its delegates")
    return steps


def why_not_delegate_host() -> str:
    """Empty if this machine can host CUDA delegates in PyTorch, else the reason."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is a CPU build: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is visible to torch"
    if not hasattr(torch._C, "_aoti") or not hasattr(torch._C._aoti, "AOTIModelContainerRunnerCuda"):
        return f"torch {torch.__version__} has no AOTInductor runner for CUDA"
    return ""


def open_cuda_container(library: Path, device: torch.device) -> Container:
    """Load an AOTInductor library on a CUDA device."""
    folder = Path(torch.__file__).parent / "lib"
    # torch opens its libraries with RTLD_LOCAL, and a delegate does not list them as needed. Their symbols must be
    # global before the delegate is opened; otherwise its shims stay unresolved.
    for name in ("libc10.so", "libc10_cuda.so", "libtorch_cpu.so", "libtorch_cuda.so"):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    runner: Any = torch._C._aoti.AOTIModelContainerRunnerCuda
    with torch.cuda.device(device):
        container: Container = runner(str(library), 1, "cuda", "")
    return container

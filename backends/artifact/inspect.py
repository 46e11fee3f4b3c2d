"""Reports the contents of an artifact: delegates, embedded kernels, undefined symbols, weights."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from executorch.exir.schema import KernelCall

from executorch_moe.backends.errors import said_in_one_line
from executorch_moe.kernels import PackedExperts

from .cubin import GpuCode, find_gpu_code
from .digests import COPY_AGAIN
from .elf import ElfImage, UndefinedSymbol
from .files import open_artifact
from .pte import PteFile
from .runtime_symbols import foreign_symbols
from .weight_metadata import CUDA_BACKEND, MUTATED_BUFFERS_KEY, parse_delegate

_PACKED = {entry.name for entry in fields(PackedExperts)}


@dataclass(frozen=True)
class DelegateReport:
    """One delegate of a method.

    Attributes:
        backend: delegate id.
        gpu_code: embedded images; empty for backends other than CudaBackend.
        undefined: symbols that the loader must find for its library, including those of system libraries.
        weights: fully qualified name -> bytes of its storage.
        mutated: names of the weights that are state, or None if the export did not record them.
        library_bytes: size of its shared library, host and GPU code.
    """

    backend: str
    gpu_code: tuple[GpuCode, ...] = ()
    undefined: tuple[UndefinedSymbol, ...] = ()
    weights: dict[str, int] = field(default_factory=dict)
    mutated: tuple[str, ...] | None = None
    library_bytes: int = 0

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of all embedded kernels, sorted."""
        return tuple(sorted({name for code in self.gpu_code for name in code.kernels}))

    @property
    def archs(self) -> tuple[str, ...]:
        """Architectures of all embedded images, sorted."""
        return tuple(sorted({code.arch for code in self.gpu_code}))

    @property
    def foreign_symbols(self) -> tuple[str, ...]:
        """Undefined symbols that the delegate's runtime does not provide, sorted."""
        return foreign_symbols(self.undefined)


@dataclass(frozen=True)
class MethodReport:
    """One method: its delegates, and the operators that run outside them."""

    delegates: tuple[DelegateReport, ...]
    operators: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class ArtifactReport:
    """What `inspect_artifact` found.

    Attributes:
        pte, ptd: the files. methods, constants: by name.
        weights: the .ptd: key -> bytes.
        outside: keys of weights that are used outside every delegate; they are fully qualified names.
    """

    pte: Path
    ptd: Path | None
    methods: dict[str, MethodReport]
    constants: tuple[str, ...]
    weights: dict[str, int]
    outside: tuple[str, ...] = ()

    @property
    def archs(self) -> tuple[str, ...]:
        """Architectures of all embedded images, sorted."""
        delegates = [delegate for method in self.methods.values() for delegate in method.delegates]
        return tuple(sorted({arch for delegate in delegates for arch in delegate.archs}))

    def sizes(self) -> dict[str, int]:
        """Bytes by part: `host code METHOD`, `GPU code METHOD`, `experts`, `state`, `other weights`, and both files.

        Only CUDA delegates record which weights are state. In other programs state is in neither file. Parts whose size
        is unknown are left out. Weights that the GPU generates (`--placeholder-weights`) count in full.
        """
        sizes: dict[str, int] = {}
        storages = {name: self.weights[name] for name in self.outside}
        delegates = [(name, delegate) for name, method in self.methods.items() for delegate in method.delegates]
        for name, delegate in delegates:
            gpu = sum(code.size for code in delegate.gpu_code)
            if delegate.backend == CUDA_BACKEND:
                for part, size in {"host": delegate.library_bytes - gpu, "GPU": gpu}.items():
                    sizes[f"{part} code {name}"] = sizes.get(f"{part} code {name}", 0) + size
            storages.update(delegate.weights)
        experts = {name for name in storages if name.rpartition(".")[2].removeprefix("packed_") in _PACKED}
        sizes["experts"] = sum(storages[name] for name in experts)
        mutated = [delegate.mutated for _, delegate in delegates if delegate.backend == CUDA_BACKEND]
        if None not in mutated:
            state = {name for names in mutated for name in names or ()} & storages.keys()
            state_bytes = sum(storages[name] for name in state)
            if mutated:
                sizes["state"] = state_bytes
            # The .ptd has no values of placeholders; delegates know the sizes of their weights.
            weights = max(sum(self.weights.values()), sum(storages.values()))
            sizes["other weights"] = weights - sizes["experts"] - state_bytes
        sizes[".pte"] = self.pte.stat().st_size
        sizes[".ptd"] = self.ptd.stat().st_size if self.ptd is not None else 0
        return sizes


def inspect_artifact(pte: str | Path, ptd: str | Path | None = None) -> ArtifactReport:
    """Report the contents of a .pte and its .ptd, without running anything; needs no GPU.

    Reads only names and sizes of the .ptd; `artifact.check` with `verify_bytes` reads all of it.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is damaged, or the .ptd belongs to another program.
    """
    program, data = open_artifact(pte, ptd, verify_weights=False)
    with said_in_one_line(f"{program.path} cannot be read", COPY_AGAIN, ValueError):
        return ArtifactReport(
            pte=program.path,
            ptd=data.path if data is not None else None,
            methods={name: _method(program, name) for name in program.method_names},
            constants=tuple(program.constant_names),
            weights=data.sizes() if data is not None else {},
            outside=tuple(program.external_tensors()),
        )


def check_cuda_artifact(report: ArtifactReport, kernel_prefix: str = "moe_") -> None:
    """Check that every method consists of self-contained CUDA delegates that contain our kernels.

    Args:
        report: of `inspect_artifact`.
        kernel_prefix: each method must have a kernel with this prefix; "" skips the check.

    Raises:
        ValueError: one message with all problems.
    """
    wrong = []
    for name, method in report.methods.items():
        if others := sorted({d.backend for d in method.delegates} - {CUDA_BACKEND}):
            wrong.append(f"{name}: delegates of {', '.join(others)}")
        if not method.delegates:
            wrong.append(f"{name}: no delegate")
        if outside := [op for op in method.operators if not op.startswith("et_copy::")]:
            wrong.append(f"{name}: operators outside the delegates: {', '.join(outside)}")
        kernels = {kernel for delegate in method.delegates for kernel in delegate.kernels}
        if kernel_prefix and not any(kernel.startswith(kernel_prefix) for kernel in kernels):
            wrong.append(f"{name}: no {kernel_prefix}* kernel (it has {', '.join(sorted(kernels)) or 'none'})")
        for delegate in method.delegates:
            if delegate.foreign_symbols:
                wrong.append(f"{name}: undefined symbols that no runtime has: {', '.join(delegate.foreign_symbols)}")
    if wrong:
        raise ValueError(f"{report.pte}: " + "; ".join(wrong))


def _method(program: PteFile, name: str) -> MethodReport:
    plan = program.plan(name)
    used = {
        plan.operators[call.instr_args.op_index].name
        for chain in plan.chains
        for call in chain.instructions
        if isinstance(call.instr_args, KernelCall)
    }
    return MethodReport(
        delegates=tuple(_delegate(program, name, delegate) for delegate in plan.delegates),
        operators=tuple(sorted(used)),
        inputs=tuple(str(info) for info in program.inputs(name)),
        outputs=tuple(str(info) for info in program.outputs(name)),
    )


def _delegate(program: PteFile, method: str, delegate) -> DelegateReport:  # type: ignore[no-untyped-def]
    if delegate.id != CUDA_BACKEND:
        return DelegateReport(delegate.id)
    parsed = parse_delegate(program.delegate_data(delegate), f"{program.path}, method {method}")
    library = program.named_data()[parsed.library_key]
    specs = {spec.key: bytes(spec.value) for spec in delegate.compile_specs}
    mutated = specs.get(MUTATED_BUFFERS_KEY)
    return DelegateReport(
        backend=delegate.id,
        gpu_code=tuple(find_gpu_code(library)),
        undefined=tuple(ElfImage(library).undefined_symbols()),
        weights={weight.fqn: weight.storage_nbytes for weight in parsed.weights},
        library_bytes=len(library),
        mutated=None if mutated is None else tuple(name for name in mutated.decode().split("\n") if name),
    )

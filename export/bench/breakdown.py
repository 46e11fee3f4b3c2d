"""Breaks the time of a decode token down by groups of kernels, and compares it with the cost of bytes and launches."""

from __future__ import annotations

import json
import math
import re
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from executorch_moe.backends.atomic_files import atomic_file
from executorch_moe.export.generate.generator import TextGenerator

# Group and pattern; the first pattern that matches a kernel's name decides. Inductor names kernels after operators.
RULES: tuple[tuple[str, str], ...] = (
    ("dense", r"moe_one_token_matvec|moe_rows_linear|moe_prompt_linear|moe_weights_to_bf16"),
    ("attention", r"moe_one_token_attention|moe_cached_attention"),
    ("gated delta rule", r"moe_delta_rule"),
    ("norm, elementwise", r"moe_rotated_heads|moe_residual_norm"),
    ("experts GEMM1", r"moe_\w*gemm1|_fused_moe_(batched_)?(int8_)?kernel"),
    ("experts GEMM2", r"moe_\w*gemm2|_fused_moe_silu_(batched_)?(int8_)?kernel"),
    (
        "experts GEMM1",
        r"moe_\w*gemm|moe_matvec",
    ),  # both GEMMs in turn; `break_down` tells them apart
    ("experts, other", r"moe_sum|moe_quantize|_silu_quantize|_quantize_activations|^triton_per_fused_sum_view"),
    ("attention", r"sdpa"),
    ("routing", r"moe_|topk|fused__softmax__to_copy_prepare_softmax_online(?!.*(where|floor))"),
    ("sampling", r"argmax|log1p|clamp|_lt_|_exp_|_max_"),
    ("norm, elementwise", r"^(?!triton_tem_).*(_cos_|_sin_|_flip_)"),  # Inductor fuses the angles into a GEMM too
    ("dense", r"triton_tem_|_mm_|gemm|gemv|matvec|bitwise_and|nvjet|cutlass"),
)
_BOTH_GEMMS = re.compile(r"moe_\w*gemm(?![12])|moe_matvec")


@dataclass(frozen=True)
class Kernel:
    """A kernel or copy on the GPU: start and duration in microseconds, blocks of its grid (1 for a copy)."""

    name: str
    start: float
    duration: float
    blocks: int = 1


@dataclass
class Share:
    """One group of kernels, per token: launches, own time (see `own_times`), and bytes that it must read, if known."""

    group: str
    launches: float
    microseconds: float
    nbytes: int | None = None


@dataclass
class Breakdown:
    """The time of a decode token, by groups of kernels.

    Attributes:
        steps: number of profiled tokens.
        token_us: microseconds from token to token, gaps included.
        shares: groups of kernels, longest first.
        gap_us: microseconds in which no kernel ran.
        bandwidth: measured bytes/s of a large copy.
        launch_us: measured microseconds of an empty kernel within a CUDA graph.
        longest: kernel name -> (launches, own microseconds) per token, for the ten longest kernels.
    """

    steps: int
    token_us: float
    shares: list[Share]
    gap_us: float
    bandwidth: float
    launch_us: float
    longest: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def launches(self) -> float:
        """Kernels per token."""
        return sum(share.launches for share in self.shares)

    @property
    def bytes_us(self) -> float:
        """Microseconds that the known bytes take at the measured bandwidth."""
        return 1e6 * sum(share.nbytes or 0 for share in self.shares) / self.bandwidth

    @property
    def accounted(self) -> float:
        """Fraction of the token's time that bytes and launches account for."""
        return (self.bytes_us + self.launches * self.launch_us) / self.token_us

    def markdown(self) -> str:
        """Tables of the groups and of the longest kernels, in Markdown."""
        lines = [
            f"One decode token, mean of {self.steps}: {self.token_us:.0f} us.",
            "",
            "| part | launches | us | share | bytes | us at bandwidth |",
            "|---|---|---|---|---|---|",
        ]
        for share in self.shares:
            size = floor = ""
            if share.nbytes is not None:
                size, floor = f"{share.nbytes / 1e6:,.1f} MB", f"{1e6 * share.nbytes / self.bandwidth:.1f}"
            part = share.microseconds / self.token_us
            lines.append(
                f"| {share.group} | {share.launches:.0f} | {share.microseconds:.1f} | {part:.1%} | {size} | {floor} |"
            )
        lines += [
            f"| gaps | | {self.gap_us:.1f} | {self.gap_us / self.token_us:.1%} | | |",
            "",
            f"Accounted for: {self.accounted:.0%} = ({self.bytes_us:.0f} us of bytes at {self.bandwidth / 1e12:.2f} "
            f"TB/s + {self.launches:.0f} launches of {self.launch_us:.2f} us) / {self.token_us:.0f} us.",
            "",
            "| kernel | launches | us |",
            "|---|---|---|",
        ]
        lines += [f"| `{name}` | {count:.0f} | {us:.1f} |" for name, (count, us) in self.longest.items()]
        return "\n".join(lines)

    def plot(self, path: Path, title: str) -> None:
        """Writes a bar chart of the groups and the time of their bytes at the measured bandwidth; see `atomic_file`.

        Raises:
            ValueError: matplotlib is not installed, or does not support the file's suffix.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ValueError("a plot needs matplotlib: pip install 'executorch-moe[bench]'") from None
        rows = [*self.shares, Share("gaps", 0, self.gap_us)][::-1]
        figure = Figure(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
        axes = figure.subplots()
        names = [row.group for row in rows]
        axes.barh(names, [row.microseconds for row in rows], label="measured")
        floors = [1e6 * (row.nbytes or 0) / self.bandwidth for row in rows]
        axes.barh(names, floors, height=0.35, color="black", alpha=0.6, label="its bytes at measured bandwidth")
        axes.set(xlabel=f"microseconds of a decode token ({self.token_us:.0f})", title=title)
        axes.grid(True, axis="x", alpha=0.3)
        axes.legend(loc="lower right")
        with atomic_file(path) as aside:
            figure.savefig(aside)


def group_of(kernel: Kernel) -> str:
    """Group of a kernel, by its name and grid.

    A matrix-vector product is an Inductor reduction, whose name may include a norm that is fused into it. The norm of
    one token alone has one block.
    """
    for group, rule in RULES:
        if re.search(rule, kernel.name):
            return group
    reduces = re.match(r"triton_(per|red)_fused.*_sum", kernel.name) is not None
    return "dense" if reduces and kernel.blocks > 1 else "norm, elementwise"


def read_trace(trace: Mapping[str, Any]) -> list[Kernel]:
    """Kernels and copies in a torch.profiler trace, sorted by start.

    Raises:
        ValueError: the trace has none.
    """
    kernels = [
        Kernel(
            event["name"], float(event["ts"]), float(event["dur"]), math.prod(event.get("args", {}).get("grid", [1]))
        )
        for event in trace.get("traceEvents", [])
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and event.get("ph") == "X"
    ]
    if not kernels:
        raise ValueError("the profile has no GPU kernels: run it where torch.profiler can use CUPTI")
    return sorted(kernels, key=lambda kernel: kernel.start)


def own_times(kernels: Iterable[Kernel]) -> list[float]:
    """Microseconds in which each kernel ran after all earlier ones had ended.

    A kernel may start and wait before the one before it has ended, so that durations overlap. Own times do not overlap,
    and add up to the time in which at least one kernel ran.

    Args:
        kernels: sorted by start.
    """
    times, end = [], float("-inf")
    for kernel in kernels:
        own_end = kernel.start + kernel.duration
        times.append(max(0.0, own_end - max(end, kernel.start)))
        end = max(end, own_end)
    return times


def break_down(
    kernels: Sequence[Kernel], steps: int, nbytes: Mapping[str, int], bandwidth: float, launch_us: float
) -> Breakdown:
    """Groups the kernels of `steps` decode tokens.

    Args:
        kernels: sorted by start.
        steps: number of tokens.
        nbytes: group -> bytes that a token must read.
        bandwidth: bytes/s of a large copy.
        launch_us: microseconds of an empty kernel.
    """
    span = kernels[-1].start + kernels[-1].duration - kernels[0].start
    shares: dict[str, Share] = {}
    names: dict[str, list[float]] = {}
    second = False
    own = own_times(kernels)
    for kernel, microseconds in zip(kernels, own, strict=True):
        group = group_of(kernel)
        if _BOTH_GEMMS.search(kernel.name):
            group = "experts GEMM2" if second else "experts GEMM1"
            second = not second
        share = shares.setdefault(group, Share(group, 0, 0.0, nbytes.get(group)))
        share.launches += 1 / steps
        share.microseconds += microseconds / steps
        names.setdefault(kernel.name, []).append(microseconds)
    longest = sorted(names.items(), key=lambda item: -sum(item[1]))[:10]
    return Breakdown(
        steps=steps,
        token_us=span / steps,
        shares=sorted(shares.values(), key=lambda share: -share.microseconds),
        gap_us=(span - sum(own)) / steps,
        bandwidth=bandwidth,
        launch_us=launch_us,
        longest={name: (len(times) / steps, sum(times) / steps) for name, times in longest},
    )


def token_bytes(record: Mapping[str, Any], positions: int) -> dict[str, int]:
    """Bytes that a decode token must read, by group, from an export's record; empty if the record lacks them.

    A token reads the experts to which it is routed, all other weights except the embedding, and the cache: `positions`
    of it, or all, if attention reads and masks positions that are not written yet.
    """
    if "active_experts" not in record:
        return {}
    experts = int(record["expert_bytes"] * record["active_experts"])
    read = positions if record.get("cache_reads") == "written" else record.get("max_context", 1)
    first = int(experts * 2 / 3)  # gate and up, of gate, up and down
    return {
        "experts GEMM1": first,
        "experts GEMM2": experts - first,
        "dense": record["other_bytes"] - record["embedding_bytes"],
        "attention": record["cache_bytes"] * read // record.get("max_context", 1),
    }


def measure_bandwidth(device: torch.device, nbytes: int = 1 << 30) -> float:
    """Bytes/s of a large copy on the device, reads plus writes: median of nine copies."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / statistics.median(_seconds(lambda: target.copy_(source)) for _ in range(9))


def measure_flops(device: torch.device, size: int = 8192) -> float:
    """bf16 FLOP/s of a matrix product [size, size] @ [size, size] on random data: median of nine."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = a @ b
    return 2 * size**3 / statistics.median(_seconds(lambda: torch.mm(a, b, out=product)) for _ in range(9))


def measure_launch(device: torch.device, launches: int = 1000) -> float:
    """Microseconds of an almost empty kernel within a CUDA graph: median of nine replays."""
    x = torch.zeros(32, device=device)
    x.add_(1.0)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            x.add_(1.0)
    return 1e6 * statistics.median(_seconds(graph.replay) for _ in range(9)) / launches


def _seconds(call: Any) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def check_profile(device: torch.device) -> None:
    """Checks that the device can be profiled.

    Raises:
        ValueError: no GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"--profile shows GPU kernels, but the artifact runs on {device.type}: leave --profile out")


def profile_kernels(call: Callable[[], object], device: torch.device) -> list[Kernel]:
    """Kernels and copies on the GPU that `call` starts, sorted by start.

    Raises:
        ValueError: there are none, or torch.profiler cannot use CUPTI.
    """
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text(encoding="utf-8")))


def profile_decode(generator: TextGenerator, prompt_ids: list[int], steps: int, record: Mapping[str, Any]) -> Breakdown:
    """Profiles `steps` decode tokens after a prompt and a warm-up.

    Args:
        generator: the loaded artifact.
        prompt_ids: token ids.
        steps: number of tokens to profile.
        record: the export's record, for `token_bytes`.

    Raises:
        ValueError: no GPU, or tokens that do not fit into the cache.
    """
    device = generator.program.device
    check_profile(device)
    warm = 6
    generator.check_length(len(prompt_ids), warm + steps)
    tokens = generator.stream(prompt_ids)
    for _ in range(warm):
        next(tokens)

    def decode() -> None:
        for _ in range(steps):
            next(tokens)

    kernels = profile_kernels(decode, device)
    nbytes = token_bytes(record, len(prompt_ids) + warm + steps // 2)
    return break_down(kernels, steps, nbytes, measure_bandwidth(device), measure_launch(device))

"""Finds tile configurations by measuring, for the tables of tuning/tables.py.

The GEMMs of a layer are timed separately for each candidate, by the method of timing.py. For few tokens, the fastest
configuration of each GEMM is kept for each number of tokens. For the grouped path, it is kept for each tile height, and
the height with the smallest sum of both GEMMs is taken. The matrix-vector path has few candidates, so whole layers are
timed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from executorch_moe.kernels.experts.plan import Options
from executorch_moe.kernels.gpus import Gpu, gpu_of
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.schemes import Scheme, get_scheme
from executorch_moe.kernels.shapes import LayerShape
from executorch_moe.kernels.tuning.choose import heuristic_few_tokens
from executorch_moe.kernels.tuning.configs import GemmConfig, MatvecConfig, fit
from executorch_moe.kernels.tuning.tables import MatvecRow, TunedLayer, TunedRow, layer_key

from .compile import CompileJob
from .timing import LayerInputs, random_packed, time_graph, with_tokens

LISTS = ("matvec", "few_tokens", "grouped")
"""Lists of configurations in a table's entry."""
FEW_TOKENS = (1, 2, 4, 8, 16)
PAIRS_PER_EXPERT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HEIGHTS = {
    1: (16,),
    2: (16,),
    4: (16,),
    8: (16,),
    16: (16, 32),
    32: (32, 64),
    64: (64,),
    128: (64, 128),
    256: (64, 128, 256),
    512: (128, 256),
}
"""Tile heights to try, by mean number of pairs of an expert."""


@dataclass(frozen=True)
class Trial:
    """One configuration to time, for GEMM `gemm` of a path ("few_tokens" or "grouped") and a number of tokens."""

    path: str
    tokens: int
    gemm: int
    config: GemmConfig


def few_token_candidates(layer: LayerShape, gemm: int, tokens: int) -> Iterator[GemmConfig]:
    """Configurations to time for the few-token path."""
    n, k = layer.rows_and_k(gemm)
    # Short parts of K pay off while there are few programs.
    least = 2 if tokens <= 2 else 14
    splits = [s for s in (1, 2, 3, 4, 8) if s == 1 or (gemm == 2 and k // 128 >= least * s)]
    tiles: tuple[tuple[int, int], ...] = ((64, 2), (64, 4), (128, 4))
    if tokens <= 2:  # few programs: small ones spread more evenly over the multiprocessors
        tiles = ((32, 2), *tiles)
    if tokens >= 4:  # more rows for each warp: fewer instructions for each weight, fewer programs
        tiles += ((128, 2), (256, 4))
    # A program has few K blocks. With all loads in flight at once, it waits for memory only once.
    pipelines: tuple[tuple[int, int], ...] = ((3, 1), (4, 1), (2, 2), (3, 2))
    if tokens <= 4:
        pipelines += ((2, 1), (4, 2))
    for (block_n, warps), (stages, unroll), split_k in itertools.product(tiles, pipelines, splits):
        if n % block_n == 0 and k // 128 >= unroll:
            yield GemmConfig(
                8 if tokens <= 8 else 16, block_n, 1, warps, stages, unroll, split_k=split_k, scale_after=True
            )


def matvec_candidates(layer: LayerShape, gemm: int) -> list[MatvecConfig]:
    """Configurations to time for the matrix-vector path."""
    n, _ = layer.rows_and_k(gemm)
    return [MatvecConfig(rows, reps) for rows, reps in ((16, 8), (32, 8), (32, 16)) if n % rows == 0]


def grouped_candidates(scheme: Scheme, layer: LayerShape, gemm: int, height: int) -> Iterator[GemmConfig]:
    """Configurations to time for the grouped path and a tile height."""
    n, _ = layer.rows_and_k(gemm)
    tiles: tuple[tuple[int, int], ...] = (
        ((256, 4), (128, 4), (256, 8)) if height == 16 else ((128, 4), (256, 8), (128, 8))
    )
    if height == 256:
        tiles = ((128, 8),)  # four warps have too few registers
    scaling = (True,) if height == 16 else (False, True) if height < 128 else (False,)
    if not scheme.packed or scheme.act_group(gemm) or layer.group_size < 128:
        scaling = (False,)  # scale_after has no effect
    ctas = (2, 4) if height == 16 else (1, 2, 3) if height < 128 else (1, 2) if height == 128 else (1,)
    depths = (2, 3) if height == 256 else (3, 4)
    # If an expert has many row blocks, their order decides what is still in L2.
    groups = (1, 8, 32) if height >= 128 else (8,)
    for (block_n, warps), stages, after, per_sm, group in itertools.product(tiles, depths, scaling, ctas, groups):
        if n % block_n == 0:
            yield GemmConfig(height, block_n, group, warps, stages, ctas_per_sm=per_sm, scale_after=after)


class Tuner:
    """Tunes one layer on the GPU of this machine.

    Attributes:
        shape, scheme: of the layer. layer: its padded sizes, the key in the tables.
        replays: number of replays that the median of a measurement is taken over.

    Args:
        layers: number of layers with different weights in a measurement.
        grouped_only: the few-token path keeps the configurations of the heuristic, which saves most compilations.
    """

    grouped_only = False

    def __init__(
        self, shape: LayerShape, scheme: str, layers: int = 3, replays: int = 10, *, grouped_only: bool = False
    ) -> None:
        self.shape, self.scheme = shape, get_scheme(scheme)
        self.grouped_only = grouped_only
        self.gpu: Gpu = gpu_of(torch.cuda.current_device())
        self.layer = replace(shape.padded(), group_size=shape.group_size if self.scheme.packed else 0)
        self.replays = replays
        self._seeded = torch.Generator("cuda").manual_seed(0)
        self._packed = [random_packed(shape, scheme, "cuda", self._seeded) for _ in range(layers)]

    def trials(self) -> list[Trial]:
        """All trials that `run` times."""
        found = []
        for tokens in () if self.grouped_only else FEW_TOKENS:
            for gemm in (1, 2):
                found += [
                    Trial("few_tokens", tokens, gemm, config)
                    for config in few_token_candidates(self.layer, gemm, tokens)
                ]
        for ratio in PAIRS_PER_EXPERT:
            for height, gemm in itertools.product(HEIGHTS[ratio], (1, 2)):
                found += [
                    Trial("grouped", self._tokens(ratio), gemm, config)
                    for config in grouped_candidates(self.scheme, self.layer, gemm, height)
                ]
        return [t for t in found if fit(t.config, self.scheme, t.gemm, self.gpu) == t.config]

    def jobs(self, trials: list[Trial]) -> list[CompileJob]:
        """The compilations that the trials need, each kernel once."""
        # Kernels do not depend on the grid, and on the grouped path not on the number of tokens.
        distinct = {
            (t.path, t.tokens if t.path == "few_tokens" else 0, t.gemm, replace(t.config, ctas_per_sm=1)): t
            for t in trials
        }
        return [CompileJob(self.shape, self.scheme.name, t.tokens, _options(t)) for t in distinct.values()]

    def run(self, on_trial: Callable[[Trial, float], None] = lambda trial, us: None) -> TunedLayer:
        """Time all trials and keep the fastest. `on_trial` is called with each trial and its time in microseconds.

        Trials that take more shared memory than the GPU has are left out.
        """
        times: dict[tuple[str, int, int], list[tuple[float, GemmConfig]]] = {}
        for (path, tokens), trials in itertools.groupby(self.trials(), key=lambda t: (t.path, t.tokens)):
            inputs = self._inputs(tokens)
            for trial in trials:
                try:
                    us = self._time(inputs, trial)
                except OutOfResources:  # `fit` only estimates what Triton allocates
                    continue
                times.setdefault((path, tokens, trial.gemm), []).append((us, trial.config))
                on_trial(trial, us)
        grouped = [self._best_grouped(ratio, times) for ratio in PAIRS_PER_EXPERT]
        few = []
        for tokens in FEW_TOKENS:
            if self.grouped_only:
                gemm1, gemm2 = heuristic_few_tokens(self.gpu, self.scheme, self.layer, tokens)
            else:
                gemm1, gemm2 = (min(times["few_tokens", tokens, gemm], key=_time_of)[1] for gemm in (1, 2))
            few.append(TunedRow(tokens, gemm1, gemm2))
        few = self._few_that_win(few, grouped)
        return TunedLayer(tuple(self._matvec_that_win(few, grouped)), tuple(few), tuple(_merged(grouped)))

    def _tokens(self, ratio: int) -> int:
        return max(1, ratio * self.shape.experts // self.shape.top_k)

    def _inputs(self, tokens: int) -> list[LayerInputs]:
        return [with_tokens(packed, self.shape, tokens, "uniform", self._seeded) for packed in self._packed]

    def _time(self, inputs: list[LayerInputs], trial: Trial) -> float:
        steps: list[Callable[[], object]] = []
        for layer in inputs:
            launches: list[Launch] = []

            def record(launch: Launch, launches: list[Launch] = launches) -> None:
                launches.append(launch)
                launch.run_now()

            out = layer.run(_options(trial), submit=record)
            if layer is inputs[0]:
                layer.answer.check(out, str(trial))
            if trial.path == "few_tokens":  # GEMM2 needs the counters that GEMM1 sets to zero: time both
                steps.append(partial(_run_all, launches))
            else:
                steps.append(next(x for x in launches if x.constexprs.get("GEMM") == trial.gemm).run_now)
        return time_graph(steps, self.replays)

    def _time_layer(self, inputs: list[LayerInputs], options: Options) -> float:
        return time_graph([partial(layer.run, options) for layer in inputs], self.replays)

    def _best_grouped(self, ratio: int, times: dict[Any, list[tuple[float, GemmConfig]]]) -> TunedRow:
        tokens = self._tokens(ratio)
        pairs = []
        for height in HEIGHTS[ratio]:
            timed = [[t for t in times["grouped", tokens, gemm] if t[1].block_m == height] for gemm in (1, 2)]
            if all(timed):
                best = [min(found, key=_time_of) for found in timed]
                pairs.append((best[0][0] + best[1][0], best[0][1], best[1][1]))
        _, gemm1, gemm2 = min(pairs, key=lambda pair: pair[0])
        return TunedRow(ratio, gemm1, gemm2)

    def _few_that_win(self, few: list[TunedRow], grouped: list[TunedRow]) -> list[TunedRow]:
        """The rows for numbers of tokens below the first one at which the whole grouped path is faster."""
        kept = []
        for row in few:
            ratio = row.up_to * self.shape.top_k / self.shape.experts
            other = next((g for g in grouped if ratio <= g.up_to), grouped[-1])
            inputs = self._inputs(int(row.up_to))
            few_us = self._time_layer(inputs, Options(path="few_tokens", gemm1=row.gemm1, gemm2=row.gemm2))
            grouped_us = self._time_layer(inputs, Options(path="grouped", gemm1=other.gemm1, gemm2=other.gemm2))
            if few_us > grouped_us:
                break
            kept.append(row)
        return kept

    def _matvec_that_win(self, few: list[TunedRow], grouped: list[TunedRow]) -> list[MatvecRow]:
        """Rows of the matrix-vector path, below the first number of tokens at which another path is faster."""
        kept: list[MatvecRow] = []
        if not self.scheme.packed or self.scheme.act_group(2):
            return kept
        pairs = list(itertools.product(matvec_candidates(self.layer, 1), matvec_candidates(self.layer, 2)))
        for tokens in FEW_TOKENS:
            inputs = self._inputs(tokens)
            times = {}
            for pair in pairs:
                options = Options(path="matvec", matvec=pair)
                inputs[0].answer.check(inputs[0].run(options), str(pair))
                times[pair] = self._time_layer(inputs, options)
            best = min(pairs, key=lambda pair: times[pair])
            row = next((row for row in few if tokens <= row.up_to), None)
            if row is None:
                ratio = tokens * self.shape.top_k / self.shape.experts
                row = next((g for g in grouped if ratio <= g.up_to), grouped[-1])
                other = Options(path="grouped", gemm1=row.gemm1, gemm2=row.gemm2)
            else:
                other = Options(path="few_tokens", gemm1=row.gemm1, gemm2=row.gemm2)
            if times[best] > self._time_layer(inputs, other):
                break
            kept.append(MatvecRow(tokens, *best))
        return kept


def _run_all(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run_now()


def _time_of(timed: tuple[float, GemmConfig]) -> float:
    return timed[0]


def _options(trial: Trial) -> Options:
    """Options with the trial's configuration for its GEMM, and a simple one of the same height for the other."""
    if trial.path == "few_tokens":
        plain = GemmConfig(trial.config.block_m, 64, 1, num_warps=2, scale_after=True)
    else:
        plain = GemmConfig(trial.config.block_m, 128)
    gemm1, gemm2 = (trial.config, plain) if trial.gemm == 1 else (plain, trial.config)
    return Options(path=trial.path, gemm1=gemm1, gemm2=gemm2)


def _merged(rows: list[TunedRow]) -> Iterator[TunedRow]:
    """Merges adjacent rows with equal configurations."""
    for row, following in itertools.pairwise([*rows, None]):
        assert row is not None
        if following is None or (row.gemm1, row.gemm2) != (following.gemm1, following.gemm2):
            yield row


def entry(layer: LayerShape, scheme: Scheme, tuned: TunedLayer) -> dict[str, Any]:
    """The entry of a layer in a table's `layers`."""

    def rows(found: Sequence[MatvecRow | TunedRow]) -> list[dict[str, Any]]:
        return [{"up_to": row.up_to, "gemm1": asdict(row.gemm1), "gemm2": asdict(row.gemm2)} for row in found]

    return {"layer": layer_key(scheme, layer), **{name: rows(getattr(tuned, name)) for name in LISTS}}


def with_entry(text: str | None, made_by: dict[str, str], new: dict[str, Any]) -> str:
    """The text of a table with an entry added or replaced, one configuration a line.

    Args:
        text: of the table; None for a new one. made_by: GPU, versions and command. new: result of `entry`.

    Raises:
        ValueError: the text is not a table.
    """
    try:
        layers = [] if text is None else json.loads(text)["layers"]
        layers = [old for old in layers if old["layer"] != new["layer"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"this is not a configuration table ({error}): delete the file, or pass another --out"
        ) from None
    layers.append({**new, "made_by": made_by})
    lines = ['{"layers": [']
    for index, layer in enumerate(layers):
        lines.append(f'{{"layer": {json.dumps(layer["layer"])},')
        lines.append(f' "made_by": {json.dumps(layer["made_by"])},')
        for name in LISTS:
            rows = ",\n  ".join(json.dumps(row) for row in layer.get(name, []))
            lines.append(f' "{name}": [\n  {rows}]' + ("}" if name == LISTS[-1] else ","))
        if index < len(layers) - 1:
            lines[-1] += ","
    return "\n".join([*lines, "]}"]) + "\n"

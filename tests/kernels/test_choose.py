"""Configurations of a layer: checked-in tables, heuristics, variants of an export, and the tuner."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.runtime.errors import OutOfResources

from executorch_moe.kernels.experts.plan import Options, run_fused_experts
from executorch_moe.kernels.gpus import MODELS, Gpu, find_model
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.measure.compile import record_launches
from executorch_moe.kernels.measure.timing import random_packed
from executorch_moe.kernels.measure.tune import FEW_TOKENS, HEIGHTS, PAIRS_PER_EXPERT, Trial, Tuner, entry, with_entry
from executorch_moe.kernels.schemes import SCHEMES, get_scheme
from executorch_moe.kernels.shapes import SHAPES, LayerShape
from executorch_moe.kernels.tuning import tables
from executorch_moe.kernels.tuning.choose import (
    MAX_PAIRS,
    MAX_VARIANTS,
    few_token_configs,
    grouped_variants,
    heuristic_few_tokens,
    matvec_configs,
)
from executorch_moe.kernels.tuning.configs import GemmConfig, MatvecConfig, fit
from executorch_moe.kernels.tuning.tables import MatvecRow, TunedLayer, TunedRow, find_table

H200 = find_model("h200").gpu
W4A16 = get_scheme("w4a16")
QWEN35 = LayerShape(256, 8, 2048, 512, 128)
UNKNOWN = LayerShape(60, 4, 2048, 1408, 128)


def check_configs(gpu: Gpu, scheme: str, layer: LayerShape, gemm: int, config: GemmConfig) -> None:
    assert layer.rows_and_k(gemm)[0] % config.block_n == 0
    assert fit(config, get_scheme(scheme), gemm, gpu) == config


@pytest.mark.parametrize("path", sorted(tables.FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_checked_in_tables_are_whole(path: Path) -> None:
    table = json.loads(path.read_text())
    assert table["layers"]
    gpu = next(m.gpu for m in MODELS.values() if tables.table_path(m.gpu) == path)
    for stored in table["layers"]:
        assert stored["made_by"]["command"].startswith("executorch-moe tune ")
        scheme = stored["layer"].pop("scheme")
        layer = LayerShape(**stored["layer"])
        found = find_table(gpu, get_scheme(scheme), layer)
        assert found is not None and found.grouped
        for row in found.matvec:
            assert all(layer.rows_and_k(g)[0] % c.rows == 0 for g, c in ((1, row.gemm1), (2, row.gemm2)))
        for rows in (found.matvec, found.few_tokens, found.grouped):
            assert [r.up_to for r in rows] == sorted({r.up_to for r in rows})
            for row in rows:
                if isinstance(row, TunedRow):
                    check_configs(gpu, scheme, layer, 1, row.gemm1)
                    check_configs(gpu, scheme, layer, 2, row.gemm2)
        assert all(row.gemm1.block_m == row.gemm2.block_m for row in found.grouped)


def test_the_matvec_path_is_for_few_tokens_and_weights_that_are_requested_at_once() -> None:
    def taken(layer: LayerShape, tokens: int, scheme: str = "w4a16", tables: bool = True) -> bool:
        return matvec_configs(H200, get_scheme(scheme), layer.padded(), tokens, tables) is not None

    table = find_table(H200, W4A16, QWEN35)
    assert table is not None and table.matvec
    last = int(table.matvec[-1].up_to)
    assert taken(QWEN35, 1) and taken(QWEN35, last) and not taken(QWEN35, last + 1)
    assert [taken(QWEN35, tokens, tables=False) for tokens in (1, 2, 3)] == [True, True, False]
    assert not taken(QWEN35, 1, "bf16", tables=False)
    assert not taken(SHAPES["mixtral"], 1, tables=False) and not taken(SHAPES["gpt-oss"], 1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((12, 4, 64), "rows=12 must be a power of two"), ((16, 16, 64), "reps=16 must be at most half of rows=16")],
)
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatvecConfig(*sizes)


def test_the_table_decides_and_can_be_left_out() -> None:
    table = find_table(H200, W4A16, QWEN35)
    assert table is not None
    assert few_token_configs(H200, W4A16, QWEN35, 1) == (table.few_tokens[0].gemm1, table.few_tokens[0].gemm2)
    last = int(table.few_tokens[-1].up_to)
    assert few_token_configs(H200, W4A16, QWEN35, last) and few_token_configs(H200, W4A16, QWEN35, last + 1) is None
    (variant,) = grouped_variants(H200, W4A16, QWEN35, 32 * 256)
    assert variant.gemm1 == next(r.gemm1 for r in table.grouped if r.up_to >= 32)
    assert find_table(H200, W4A16, UNKNOWN) is None and find_table(find_model("l4").gpu, W4A16, QWEN35) is None
    assert grouped_variants(H200, W4A16, QWEN35, 64, tables=False) == grouped_variants(
        Gpu(90, 1, H200.max_shared), W4A16, QWEN35, 64
    )


@pytest.mark.parametrize("target", ["a100", "rtx4090", "h200", "rtx5090"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layer", [QWEN35, UNKNOWN, LayerShape(8, 2, 4096, 14336, 128)])
def test_every_number_of_tokens_has_a_configuration(layer: LayerShape, scheme: str, target: str) -> None:
    gpu, kind = find_model(target).gpu, get_scheme(scheme)
    for tokens in (1, 2, 7, 8, 9, 16, 33, 100, 1000, 10**6):
        few = few_token_configs(gpu, kind, layer, tokens)
        (variant,) = grouped_variants(gpu, kind, layer, tokens * layer.top_k)
        for gemm, config in enumerate((variant.gemm1, variant.gemm2), start=1):
            check_configs(gpu, scheme, layer, gemm, config)
            if few is not None:
                check_configs(gpu, scheme, layer, gemm, few[gemm - 1])
    variants = grouped_variants(gpu, kind, layer, None)
    assert 1 <= len(variants) <= MAX_VARIANTS
    assert variants[0].pairs_from == 0 and variants[-1].pairs_to == MAX_PAIRS
    for one, following in itertools.pairwise(variants):
        assert following.pairs_from == one.pairs_to + 1
        assert following.gemm1.block_m > one.gemm1.block_m


def test_an_export_for_any_number_of_tokens_launches_each_variant_once() -> None:
    with torch._subclasses.FakeTensorMode(shape_env=ShapeEnv()) as mode:
        packed = random_packed(QWEN35, "w4a16", "cpu", torch.Generator())
    sym = mode.shape_env.create_unbacked_symint()  # type: ignore[union-attr]
    torch._check(sym >= 2)
    launches: list[Launch] = []
    with mode:
        x, ids = torch.empty(sym, 2048, dtype=torch.bfloat16), torch.empty(sym, 8, dtype=torch.int64)
        run_fused_experts(packed.arguments(x, ids, torch.empty(sym, 8)), gpu=H200, submit=launches.append)
    variants = grouped_variants(H200, W4A16, QWEN35, None)
    for gemm in (1, 2):
        ranges = [
            (x.constexprs["PAIRS_FROM"], x.constexprs["PAIRS_TO"]) for x in launches if x.constexprs.get("GEMM") == gemm
        ]
        assert ranges == [(v.pairs_from, v.pairs_to) for v in variants]


# ------------------------------------------------------------------ tuning


class Dry(Tuner):
    """A tuner without a GPU: it computes the time of a configuration from its fields."""

    def __init__(self, shape: str, scheme: str, few_win_up_to: int) -> None:
        self.shape, self.scheme, self.gpu = SHAPES[shape], get_scheme(scheme), H200
        self.layer = self.shape.padded()
        self.replays = 1
        self.few_win_up_to = few_win_up_to

    def _inputs(self, tokens):  # type: ignore[no-untyped-def]
        return []

    def _time(self, inputs, trial: Trial) -> float:  # type: ignore[no-untyped-def]
        c = trial.config
        return 1.0 + abs(c.block_n - 128) + abs(c.num_stages - 3) + 10 * c.unroll + c.ctas_per_sm + c.split_k

    def _few_that_win(self, few, grouped):  # type: ignore[no-untyped-def]
        return [row for row in few if row.up_to <= self.few_win_up_to]

    def _matvec_that_win(self, few, grouped):  # type: ignore[no-untyped-def]
        return []


@pytest.mark.parametrize(("shape", "scheme"), [("qwen35", "w4a16"), ("mixtral", "w4a8"), ("olmoe", "bf16")])
def test_tuning_keeps_the_fastest(shape: str, scheme: str) -> None:
    tuner = Dry(shape, scheme, few_win_up_to=4)
    trials = tuner.trials()
    assert len(set(trials)) == len(trials)
    for trial in trials:
        check_configs(H200, scheme, tuner.layer, trial.gemm, trial.config)
    assert {t.tokens for t in trials if t.path == "few_tokens"} == set(FEW_TOKENS)
    assert set(HEIGHTS) == set(PAIRS_PER_EXPERT)
    timed: list[Trial] = []
    tuned = tuner.run(on_trial=lambda trial, us: timed.append(trial))
    assert timed == trials
    assert [row.up_to for row in tuned.few_tokens] == [1, 2, 4]
    for row in (*tuned.few_tokens, *tuned.grouped):
        for config in (row.gemm1, row.gemm2):
            assert (config.block_n, config.unroll, config.split_k) == (128, 1, 1)
    assert tuned.grouped[-1].up_to == PAIRS_PER_EXPERT[-1]


def test_tuning_the_grouped_path_only() -> None:
    tuner = Dry("gpt-oss", "mxfp4", few_win_up_to=8)
    tuner.grouped_only = True
    trials = tuner.trials()
    assert {t.path for t in trials} == {"grouped"} and len(set(trials)) == len(trials)
    assert not any(t.config.scale_after for t in trials)  # it has no effect on groups of 32
    tuned = tuner.run()
    heuristic = [heuristic_few_tokens(H200, get_scheme("mxfp4"), tuner.layer, tokens) for tokens in (1, 2, 4, 8)]
    assert [(row.gemm1, row.gemm2) for row in tuned.few_tokens] == heuristic
    assert tuned.grouped[-1].up_to == PAIRS_PER_EXPERT[-1]


def test_tuning_leaves_out_what_does_not_fit() -> None:
    class Full(Dry):
        def _time(self, inputs, trial: Trial) -> float:  # type: ignore[no-untyped-def]
            if trial.config.block_n == 128:  # the fastest ones
                raise OutOfResources(245760, 232448, "shared memory")
            return super()._time(inputs, trial)

    timed: list[Trial] = []
    tuned = Full("qwen35", "w4a16", few_win_up_to=4).run(on_trial=lambda trial, us: timed.append(trial))
    assert timed and not any(trial.config.block_n == 128 for trial in timed)
    assert {row.gemm1.block_n for row in tuned.few_tokens} == {64}


def test_an_entry_replaces_its_own_and_keeps_the_others(tmp_path: Path) -> None:
    def tuned(height: int) -> TunedLayer:
        row = TunedRow(4, GemmConfig(height, 128), GemmConfig(height, 128))
        return TunedLayer((MatvecRow(2, MatvecConfig(), MatvecConfig(32, 16)),), (), (row,))

    made = {"command": "executorch-moe tune"}
    text = with_entry(None, made, entry(QWEN35, W4A16, tuned(16)))
    text = with_entry(text, made, entry(UNKNOWN, W4A16, tuned(32)))
    text = with_entry(text, made, entry(QWEN35, W4A16, tuned(64)))
    path = tmp_path / "table.json"
    path.write_text(text)
    read = tables._read(path)
    assert sorted(layer.grouped[0].gemm1.block_m for layer in read.values()) == [32, 64]
    assert {layer.matvec for layer in read.values()} == {(MatvecRow(2, MatvecConfig(), MatvecConfig(32, 16)),)}
    with pytest.raises(ValueError, match="this is not a configuration table"):
        with_entry("[]", made, entry(QWEN35, W4A16, tuned(16)))


def test_recorded_launches_follow_the_options() -> None:
    for options, expected in ((Options(group_size_m=32), 32), (Options(), 8)):
        gemms = [x for x in record_launches(H200, "w4a16", 64, QWEN35, options) if "GEMM" in x.constexprs]
        assert {x.constexprs["GROUP_SIZE_M"] for x in gemms} == {expected}

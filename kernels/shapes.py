"""Sizes of an expert layer, and the layers of published models by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from executorch_moe.kernels.schemes import K_BLOCK, round_up


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one expert layer.

    Attributes:
        experts: E. top_k: experts of a token.
        hidden: H. intermediate: I.
        group_size: number of weights along K that share one scale. The keys of tuning tables have 0 for bf16 weights.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    group_size: int = 128

    @property
    def label(self) -> str:
        """Name in `SHAPES`, else the five sizes joined by "x", as in 60x4x2048x1408x128."""
        sizes = (self.experts, self.top_k, self.hidden, self.intermediate, self.group_size)
        return next((name for name, shape in SHAPES.items() if shape == self), "x".join(map(str, sizes)))

    def padded(self) -> LayerShape:
        """The layer with H and I padded to multiples of 128, as in packed weights."""
        return replace(self, hidden=round_up(self.hidden, K_BLOCK), intermediate=round_up(self.intermediate, K_BLOCK))

    def rows_and_k(self, gemm: int) -> tuple[int, int]:
        """N (weight rows) and K of GEMM `gemm`, 1 (gate and up) or 2 (down)."""
        return (2 * self.intermediate, self.hidden) if gemm == 1 else (self.hidden, self.intermediate)


SHAPES = {
    "qwen35": LayerShape(256, 8, 2048, 512),
    "qwen3": LayerShape(128, 8, 2048, 768),
    "mixtral": LayerShape(8, 2, 4096, 14336),
    "gpt-oss": LayerShape(32, 4, 2880, 2880, 32),
    "olmoe": LayerShape(64, 8, 2048, 1024),
    "deepseek-v3": LayerShape(256, 8, 7168, 2048),
}
"""Expert layers of published models. Source: their configurations on Hugging Face."""

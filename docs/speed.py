"""Draws docs/speed.svg from docs/speed.json: decode and prefill of a whole model, three implementations.

python docs/speed.py        # needs matplotlib: pip install '.[bench]'
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
COLORS = ("#2563eb", "#94a3b8", "#d6a756")
PANELS = (("Decode, tokens/s", (2, 3)), ("Prefill, tokens/s", (0, 1)))
"""Title of a panel and the columns of speed.json that it shows."""


def draw(figures: dict[str, Any], path: Path) -> None:
    """Writes the chart: one panel for decode, one for prefill; one group of bars for each prompt length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text stays text, and the same figures give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "speed", "font.size": 10}):
        figure, axes = pyplot.subplots(1, 2, figsize=(9.2, 3.5), layout="constrained")
        for axis, (title, columns) in zip(axes, PANELS, strict=True):
            groups = [figures["columns"][column].split()[-1] for column in columns]
            for number, row in enumerate(figures["rows"]):
                values = [row["speeds"][column] for column in columns]
                for group, value in enumerate(values):
                    if value is None:
                        axis.annotate(
                            "not\nmeasured",
                            (group + 0.27 * (number - 1), 0),
                            (0, 4),
                            fontsize=8,
                            textcoords="offset points",
                            ha="center",
                            color="#667",
                        )
                places = [group + 0.27 * (number - 1) for group, value in enumerate(values) if value is not None]
                bars = axis.bar(
                    places, [v for v in values if v is not None], 0.25, label=row["name"], color=COLORS[number]
                )
                axis.bar_label(bars, labels=[f"{v:,.0f}" for v in values if v is not None], fontsize=9, padding=2)
            axis.set_title(title, loc="left", fontsize=11)
            axis.set_xticks(range(len(groups)), [f"prompt of {length}" for length in groups])
            axis.set_yticks([])
            axis.margins(y=0.12)
            axis.spines[["top", "right", "left"]].set_visible(False)
        axes[0].legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.09), ncols=3, fontsize=9)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(json.loads((FOLDER / "speed.json").read_text(encoding="utf-8")), FOLDER / "speed.svg")

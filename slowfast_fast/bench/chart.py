"""The bar chart of a run: how many times faster than stock every variant is, shape by shape."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cases import DIRECTIONS
from .network import NETWORK_DIRECTIONS, OP
from .summary import STOCK

# Ours stand out; the stock variants share quiet colours.
OURS_COLOURS = ("#d62728", "#ff9896", "#8c2d04")
STOCK_COLOURS = ("#9ecae1", "#6baed6", "#3182bd", "#bdbdbd", "#737373")


def require_matplotlib() -> None:
    """Raise ImportError, saying what to install, before anything is measured in vain."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("drawing the chart needs matplotlib: pip install matplotlib") from error


def draw(cases: Sequence[Mapping[str, Any]], path: str | Path, subtitle: str = "") -> None:
    """Write the chart of a document's cases as PNG: one panel per op and direction, one group of bars per shape."""
    require_matplotlib()
    from matplotlib.figure import Figure

    panels: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases:
        if STOCK in case["variants"] and case["ours"] in case["variants"]:
            of_network = "network" in case["shape"]
            directions = NETWORK_DIRECTIONS if of_network else DIRECTIONS
            op = OP if of_network else case["shape"]["op"]
            panels.setdefault(f"{op}, {directions[case['direction']]}", []).append(case)
    if not panels:
        raise ValueError("no measurement has both stock and ours, there is nothing to draw")

    heights = [sum(len(case["variants"]) + 1.5 for case in group) * 0.12 + 0.7 for group in panels.values()]
    figure = Figure(figsize=(11, sum(heights) + 0.8), dpi=110, layout="constrained")
    figure.suptitle(f"Times faster than stock eager (NCDHW)\n{subtitle}", fontsize=11)
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    colours = _colours(cases)
    for axis, (title, group) in zip(axes, panels.items(), strict=True):
        top, ticks, labels = 0.0, [], []
        for case in group:
            names = sorted(case["variants"], key=list(colours).index)
            for offset, name in enumerate(names):
                ratio = case["variants"][name]["speedup_over_stock"]
                axis.barh(top + offset, ratio, height=0.9, color=colours[name])
                axis.text(ratio, top + offset, f" {ratio:.2f}", va="center", fontsize=6)
            ticks.append(top + (len(names) - 1) / 2)
            labels.append(case["name"].split(" ", 1)[1].rsplit(" ", 1)[0])
            top += len(names) + 1.5
        axis.set_yticks(ticks, labels, fontsize=7)
        axis.invert_yaxis()
        axis.axvline(1, color="black", linewidth=0.8)
        axis.margins(x=0.06, y=0.01)
        axis.set_title(title, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    handles = [axes[0].barh(0, 0, color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    figure.savefig(path, format="png")


def _colours(cases: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A colour for each variant that ran, ours first."""
    names = list(dict.fromkeys(name for case in cases for name in case["variants"]))
    ours = [name for name in names if name.startswith("slowfast_fast")]
    others = [name for name in names if name not in ours]
    return {
        **{name: OURS_COLOURS[i % len(OURS_COLOURS)] for i, name in enumerate(ours)},
        **{name: STOCK_COLOURS[i % len(STOCK_COLOURS)] for i, name in enumerate(others)},
    }

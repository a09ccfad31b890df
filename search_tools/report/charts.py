"""The charts of a study's report, as figures that Plotly's JavaScript draws in the page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from ..study.front import Found, best_so_far, evaluated

_HOVER_WIDTH = 36  # letters in a line of a hover label: a phone has room for no more
_GREY, _BLUE, _ORANGE = "#8a93a6", "#3d7ff0", "#f0a63c"
_GRID = "rgba(128, 128, 128, 0.25)"  # seen on white and on black
_HOVER = (
    "<b>candidate %{customdata[0]}</b><br>%{customdata[1]} fewer MACs<br>PSNR %{customdata[2]}<br>"
    "rFID %{customdata[3]}<br>error %{customdata[4]}<br>%{customdata[5]}<extra></extra>"
)


def pareto_chart(found: Sequence[Found], on_front: Sequence[Found], best: Found) -> dict[str, Any]:
    """Return the chart of speed-up against paired error, the front and the best candidate marked."""
    from plotly.graph_objects import Figure, Scatter

    apart = {one.number for one in (*on_front, best)}
    groups = [
        ("candidates", [one for one in evaluated(found) if one.number not in apart], _points(_GREY, 7, opacity=0.6)),
        ("front", on_front, {"mode": "lines+markers", "line": {"shape": "vh", "width": 1.5, "color": _BLUE}}),
        ("best", [best], _points(_ORANGE, 15, symbol="star", line={"width": 1, "color": "#7a4d10"})),
    ]
    figure = Figure(
        [
            Scatter(
                name=name,
                x=[one.speedup for one in group],
                y=[one.evaluation.mse or None for one in group],  # an error of 0 has no place on a logarithmic axis
                customdata=[_hover_values(one) for one in group],
                hovertemplate=_HOVER,
                **style,
            )
            for name, group, style in groups
        ]
    )
    figure.update_xaxes(title="speed-up in MACs over the teacher", ticksuffix="x")
    figure.update_yaxes(
        title="paired error to the teacher (MSE)", **_log_axis([one.evaluation.mse for one in evaluated(found)])
    )
    return _finished(figure, 440)


def progress_chart(found: Sequence[Found], speedup: float, over: str) -> dict[str, Any]:
    """Return the chart of the best candidate so far, its rFID above its PSNR.

    Args:
        found: as they finished.
        speedup: that the best has at least.
        over: "candidates" or "seconds", the axis along.
    """
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    found = [one.as_searched for one in found]
    along, seconds = [], 0.0
    for count, one in enumerate(found, 1):
        seconds += one.seconds
        along.append(count if over == "candidates" else seconds)
    best = list(best_so_far(found, speedup))
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for row, key in enumerate(("rfid", "psnr_db"), 1):
        judged = [(at, one) for at, one in zip(along, found, strict=True) if one.evaluation is not None]
        curve = [(at, one) for at, one in zip(along, best, strict=True) if one is not None]
        for name, points, style in (
            ("candidates", judged, _points(_GREY, 5, opacity=0.5)),
            ("best so far", curve, {"mode": "lines", "line": {"shape": "hv", "width": 2, "color": _BLUE}}),
        ):
            values = [getattr(one.evaluation, key) for _, one in points]
            figure.add_trace(
                Scatter(
                    name=name,
                    legendgroup=name,
                    showlegend=row == 1,
                    x=[at for at, _ in points],
                    y=[value if math.isfinite(value) else None for value in values],
                    customdata=[_hover_values(one) for _, one in points],
                    hovertemplate=_HOVER,
                    **style,
                ),
                row=row,
                col=1,
            )
    figure.update_yaxes(title="rFID", **_log_axis([one.evaluation.rfid for one in evaluated(found)]), row=1)
    figure.update_yaxes(title="PSNR, dB", row=2)
    figure.update_xaxes(title={"candidates": "candidates", "seconds": "seconds of evaluation"}[over], rangemode="tozero", row=2)
    return _finished(figure, 420)


def _log_axis(values: Sequence[float]) -> dict[str, Any]:
    """Return a logarithmic axis; ticked at 1, 2 and 5 where the values span a decade."""
    positive = [value for value in values if value > 0] or [1.0]
    wide = max(positive) > 10 * min(positive)
    return {"type": "log", "exponentformat": "power", **({"dtick": "D2"} if wide else {"nticks": 6})}


def _points(colour: str, size: int, **marker: Any) -> dict[str, Any]:
    return {"mode": "markers", "marker": {"color": colour, "size": size, **marker}}


def _hover_values(one: Found) -> list[str]:
    """Return what a hover label says of a candidate, and last its schedule's text as it is."""
    measured = one.evaluation
    psnr = f"{measured.psnr_db:.2f} dB" if math.isfinite(measured.psnr_db) else "same"
    text = str(one.schedule)
    # A line ends behind a segment where one does in reach.
    lines = "<br>".join(re.findall(rf".{{1,{_HOVER_WIDTH}}}(?:(?<=\|)|$)|.{{{_HOVER_WIDTH}}}", text))
    return [str(one.number), f"{one.speedup:.2f}x", psnr, f"{measured.rfid:.3g}", f"{measured.mse:.3g}", lines, text]


def _finished(figure: Any, height: int) -> dict[str, Any]:
    """Return a figure as plain values; the page adds the colours of its text."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 70, "r": 15, "t": 30, "b": 50},
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        hovermode="closest",
        hoverlabel={"align": "left", "font": {"family": "monospace", "size": 12}},
    )
    figure.update_xaxes(gridcolor=_GRID, zeroline=False, linecolor=_GRID)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False, linecolor=_GRID, title_standoff=8)
    return json.loads(figure.to_json())

"""A picture of a dashboard, drawn by us from the answers of a real Prometheus, with each panel where Grafana puts it.

    python deploy/monitoring/preview.py job preview.png                      a recorded run, with a Prometheus of its own
    python deploy/monitoring/preview.py job preview.png --prometheus http://localhost:9090 \
        --set namespace=demo --set job_name=digits --minutes 30

True are the layout, the queries, the data, legends, units, thresholds and stacking; fonts and colours are only alike. What it is
not: Grafana. Needs matplotlib, and for the recording Prometheus and promtool.
"""

import argparse
import contextlib
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

try:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.dates as mdates
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch
except ImportError:
    sys.exit("preview: matplotlib is not installed: pip install matplotlib")

from monitoring import recording
from monitoring.grafana import DASHBOARDS, PICKED, fill, interval, load, panels
from monitoring.server import Prometheus, replay

Json = dict[str, Any]

CELL, LINE, GAP = 60, 34, 8  # Grafana's grid, in pixels
BACK, CARD, TEXT, FAINT, GRID = "#111217", "#181b1f", "#d8d9da", "#8e8e8e", "#2c3235"
PALETTE = ["#73BF69", "#F2CC0C", "#5794F2", "#FF780A", "#F2495C", "#B877D9", "#37872D", "#FADE2A", "#447EBC", "#C15C17"]
COLORS = {
    "text": TEXT,
    "green": "#73BF69",
    "dark-green": "#37872D",
    "yellow": "#FADE2A",
    "orange": "#FF9830",
    "red": "#F2495C",
    "blue": "#5794F2",
    "purple": "#B877D9",
    "super-light-purple": "#DEB6F2",
}


def shown(value: float, unit: str, decimals: int | None = None) -> str:
    """A number as Grafana writes it in the unit."""
    if not math.isfinite(value):
        return str(value)

    def number(each: float, spare: int) -> str:
        text = f"{each:.{spare if decimals is None else decimals}f}"
        return text if decimals is not None or "." not in text else text.rstrip("0").rstrip(".")

    def scaled(base: float, prefixes: str, word: str) -> str:
        power = min(len(prefixes) - 1, max(0, int(math.log(abs(value), base)))) if abs(value) >= 1 else 0
        return f"{number(value / base**power, 2)} {prefixes[power].strip()}{word}"

    if unit == "s":
        for limit, factor, word in ((1e-3, 1e6, "µs"), (1, 1e3, "ms"), (60, 1, "s"), (3600, 1 / 60, "min")):
            if abs(value) < limit:
                return f"{number(value * factor, 2)} {word}" if value else "0 s"
        return f"{number(value / 3600, 2)} h"
    if unit == "percentunit":
        return f"{number(value * 100, 1)}%"
    if unit == "Bps":
        return scaled(1000, " kMGT", "B/s")
    if unit == "bytes":
        return scaled(1024, " KMGT", "iB" if abs(value) >= 1024 else "B")
    if unit in ("cps", "reqps"):
        return f"{number(value, 2)} {'c' if unit == 'cps' else 'req'}/s"
    if unit.startswith("suffix:"):
        return f"{number(value, 1)} {unit.removeprefix('suffix:').strip()}"
    return number(value, 3 if abs(value) < 100 else 0)


def legend(target: Json, labels: dict[str, str]) -> str:
    text = target["legendFormat"]
    if text == "__auto":
        return ", ".join(f"{name}={word}" for name, word in labels.items()) or "value"
    for name, word in labels.items():
        text = text.replace("{{" + name + "}}", word)
    return text


def level(value: float, defaults: Json) -> str:
    for mapping in defaults.get("mappings", []):
        option = mapping["options"].get(f"{value:g}")
        if option:
            return COLORS[option["color"]]
    color = "text"
    for each in defaults["thresholds"]["steps"]:
        if each["value"] is None or value >= each["value"]:
            color = each["color"]
    return COLORS[color]


def words(value: float, defaults: Json) -> str:
    for mapping in defaults.get("mappings", []):
        option = mapping["options"].get(f"{value:g}")
        if option:
            return option["text"]
    return shown(value, defaults["unit"], defaults.get("decimals"))


class Picture:
    def __init__(self, dashboard: Json, server: Prometheus, picked: dict[str, str], start: int, end: int) -> None:
        self.dashboard, self.server, self.picked, self.start, self.end = dashboard, server, picked, start, end
        self.step = max(5, (end - start) // 160)
        rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
        self.width, self.height = 24 * CELL, rows * LINE + 44
        self.figure = plt.figure(figsize=(self.width / 100, self.height / 100), dpi=100, facecolor=BACK)
        self.empty: list[str] = []
        self.events = [
            (float(when), COLORS[annotation["iconColor"]])
            for annotation in dashboard["annotations"]["list"]
            if annotation["enable"]
            for series in self.ask(annotation, instant=False)
            for when, _ in series["values"]
        ]

    def box(self, place: Json, left: float = 0, top: float = 0, right: float = 0, bottom: float = 0) -> list[float]:
        """Figure coordinates of a panel, less margins in pixels."""
        x, y = place["x"] * CELL + GAP / 2 + left, 44 + place["y"] * LINE + GAP / 2 + top
        w, h = place["w"] * CELL - GAP - left - right, place["h"] * LINE - GAP - top - bottom
        return [x / self.width, 1 - (y + h) / self.height, w / self.width, h / self.height]

    def note(self, place: Json, x: float, y: float, text: str, size: float, color: str = TEXT, **more: Any) -> None:
        left, bottom, _, height = self.box(place)
        at = (left + x / self.width, bottom + height - y / self.height)
        self.figure.text(*at, text, fontsize=size, color=color, va="top", **more)

    def ask(self, target: Json, *, instant: bool, step: int = 0) -> list[Json]:
        step = step or self.step
        expr = fill(target["expr"], self.picked, seconds=self.end - self.start, interval=step)
        if instant:
            return self.server.query(expr, time=self.end)
        return self.server.query_range(expr, start=self.start, end=self.end, step=step)

    def draw(self) -> None:
        title = self.dashboard["title"] + "    " + "  ".join(f"{name}: {word}" for name, word in self.picked.items())
        self.figure.text(12 / self.width, 1 - 12 / self.height, title, fontsize=12, color=TEXT, va="top", weight="bold")
        self.figure.text(
            1 - 12 / self.width,
            1 - 14 / self.height,
            "preview, not drawn by Grafana",
            fontsize=8,
            color=FAINT,
            va="top",
            ha="right",
        )
        for panel in self.dashboard["panels"]:
            place = panel["gridPos"]
            if panel["type"] == "row":
                self.note(place, 6, 8, "⌄  " + panel["title"], 10, weight="bold")
                continue
            x, y, w, h = self.box(place)
            self.figure.add_artist(
                FancyBboxPatch((x, y), w, h, boxstyle="square,pad=0", fc=CARD, ec=GRID, lw=0.8, zorder=-1)
            )
            self.note(place, 8, 7, panel["title"], 8.5, weight="bold")
            getattr(self, panel["type"])(panel, place)

    def axes(self, place: Json, bottom: int, right: int = 12) -> Any:
        axes = self.figure.add_axes(self.box(place, left=62, top=28, right=right, bottom=bottom), facecolor=CARD)
        axes.grid(color=GRID, lw=0.6)
        axes.tick_params(colors=FAINT, labelsize=7, length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_xlim(self._when(self.start), self._when(self.end))
        axes.xaxis.set_major_formatter(mdates.DateFormatter("%H:%M"))
        axes.xaxis.set_major_locator(mdates.AutoDateLocator(maxticks=7))
        for when, color in self.events:
            axes.axvline(self._when(when), color=color, lw=0.7, ls=(0, (2, 3)))
        return axes

    @staticmethod
    def _when(seconds: float) -> float:
        return seconds / 86400

    def nothing(self, panel: Json, place: Json) -> None:
        self.empty.append(panel["title"])
        self.note(place, place["w"] * CELL / 2 - 20, place["h"] * LINE / 2, "No data", 9, FAINT)

    def stat(self, panel: Json, place: Json) -> None:
        defaults = panel["fieldConfig"]["defaults"]
        (target,) = panel["targets"]
        instant = target["instant"]
        result = self.ask(target, instant=instant)
        if not result:
            return self.nothing(panel, place)
        points = [result[0]["value"]] if instant else result[0]["values"]
        finite = [(float(when), float(value)) for when, value in points if math.isfinite(float(value))]
        value = finite[-1][1] if finite else math.nan
        color = level(value, defaults)
        if panel["options"]["colorMode"] == "background":
            x, y, w, h = self.box(place)
            self.figure.add_artist(
                FancyBboxPatch((x, y), w, h, boxstyle="square,pad=0", fc=color, ec=color, zorder=-0.5)
            )
            color = "white"
        if panel["options"]["graphMode"] == "area" and len(finite) > 1:
            spark = self.figure.add_axes(self.box(place, top=place["h"] * LINE * 0.6, bottom=3, left=3, right=3))
            spark.axis("off")
            xs, ys = zip(*finite, strict=True)
            spark.fill_between(xs, ys, min(ys), color=color, alpha=0.25, lw=0)
            spark.plot(xs, ys, color=color, lw=0.8)
        text = words(value, defaults)
        self.note(
            place,
            place["w"] * CELL / 2 - 4,
            place["h"] * LINE * 0.36,
            text,
            17 if len(text) < 11 else 12,
            color,
            ha="center",
            weight="bold",
        )

    def timeseries(self, panel: Json, place: Json) -> None:
        defaults, options = panel["fieldConfig"]["defaults"], panel["options"]
        custom = defaults["custom"]
        step = interval(panel, self.step)
        curves = [
            (legend(target, series["metric"]), [(float(t), float(v)) for t, v in series["values"]])
            for target in panel["targets"]
            for series in sorted(
                self.ask(target, instant=False, step=step), key=lambda each: sorted(each["metric"].items())
            )
        ]
        if not curves:
            return self.nothing(panel, place)
        table = options["legend"]["displayMode"] == "table"
        axes = self.axes(
            place, bottom=44 if not table else 26, right=30 if not table else int(place["w"] * CELL * 0.36)
        )
        every = range(self.start, self.end + 1, step)
        stacked = custom["stacking"]["mode"] == "normal"
        floor = [0.0] * len(every)
        own = {each["matcher"]["options"]: {} for each in panel["fieldConfig"]["overrides"]}
        for each in panel["fieldConfig"]["overrides"]:
            own[each["matcher"]["options"]] |= {setting["id"]: setting["value"] for setting in each["properties"]}
        dashed = {name for name, settings in own.items() if "custom.lineStyle" in settings}
        second = axes.twinx() if any("custom.axisPlacement" in settings for settings in own.values()) else None
        for number, (name, points) in enumerate(curves):
            at = dict(points)
            ys = [value if math.isfinite(value := at.get(float(when), math.nan)) else math.nan for when in every]
            xs = [self._when(when) for when in every]
            fixed = own.get(name, {}).get("color", {}).get("fixedColor")
            color = COLORS.get(fixed, fixed) or PALETTE[number % len(PALETTE)]
            if custom["drawStyle"] == "bars":
                heights = [0 if math.isnan(y) else y for y in ys]
                aside = second is not None and "custom.axisPlacement" in own.get(name, {})
                if second is not None:  # two axes: the bars stand side by side
                    shift, share = self._when(step) * (0.2 if aside else -0.2), 0.4
                else:
                    shift, share = 0.0, 0.8
                (second if aside else axes).bar(
                    [x + shift for x in xs],
                    heights,
                    bottom=floor if stacked else None,
                    width=self._when(step) * share,
                    color=color,
                    label=name,
                )
                floor = [a + b for a, b in zip(floor, heights, strict=True)] if stacked else floor
            elif stacked:
                heights = [0 if math.isnan(y) else y for y in ys]
                top = [a + b for a, b in zip(floor, heights, strict=True)]
                edge = "post" if custom["lineInterpolation"] == "stepAfter" else None
                axes.fill_between(
                    xs, floor, top, color=color, alpha=custom["fillOpacity"] / 100, lw=0, label=name, step=edge
                )
                floor = top
            else:
                style = "steps-post" if custom["lineInterpolation"] == "stepAfter" else "default"
                axes.plot(xs, ys, color=color, lw=1.1, label=name, ls="--" if name in dashed else "-", drawstyle=style)
                if (
                    name not in dashed
                    and custom["scaleDistribution"]["type"] == "linear"
                    and len(curves) < 5
                    and defaults.get("min") == 0
                ):
                    axes.fill_between(xs, ys, 0, color=color, alpha=custom["fillOpacity"] / 100, lw=0)
        if custom["scaleDistribution"]["type"] == "log":
            axes.set_yscale("log")
        if "min" in defaults:
            _, high = axes.get_ylim()
            axes.set_ylim(bottom=defaults["min"], top=high if high > defaults["min"] else 1)
        if "max" in defaults:
            axes.set_ylim(top=defaults["max"])
        axes.yaxis.set_major_formatter(
            lambda value, _: shown(value, "none" if defaults["unit"].startswith("suffix") else defaults["unit"])
        )
        axes.yaxis.set_minor_formatter(lambda *_: "")
        handles, names = axes.get_legend_handles_labels()
        if second is not None:
            for side in second.spines.values():
                side.set_visible(False)
            second.tick_params(colors=FAINT, labelsize=7, length=0)
            more = second.get_legend_handles_labels()
            handles, names = handles + more[0], names + more[1]
        if table:
            last = [next((v for _, v in reversed(points) if math.isfinite(v)), math.nan) for _, points in curves]
            names = [f"{name}   {shown(value, defaults['unit'])}" for name, value in zip(names, last, strict=True)]
        axes.legend(
            handles,
            names,
            loc="upper left",
            bbox_to_anchor=(1.02, 1.02) if table else (-0.06, -0.13),
            ncol=1 if table else 8,
            fontsize=7,
            frameon=False,
            labelcolor=TEXT,
            handlelength=1.2,
            columnspacing=1,
        )
        return None

    def heatmap(self, panel: Json, place: Json) -> None:
        result = self.ask(panel["targets"][0], instant=False)
        if not result:
            return self.nothing(panel, place)
        result.sort(key=lambda each: float(each["metric"]["le"]))
        every = range(self.start, self.end + 1, self.step)
        rows, below = [], [0.0] * len(every)
        for series in result:
            at = {float(when): float(value) for when, value in series["values"]}
            row = [at.get(float(when), 0.0) for when in every]
            rows.append([max(0.0, a - b) for a, b in zip(row, below, strict=True)])
            below = row
        axes = self.axes(place, bottom=26, right=30)
        colors = plt.get_cmap("Oranges").with_extremes(under=CARD)
        grid = [[math.sqrt(cell) for cell in row] for row in rows]
        xs = [self._when(when - self.step / 2) for when in (*every, self.end + self.step)]
        axes.pcolormesh(xs, range(len(rows) + 1), grid, cmap=colors, vmin=0.3)
        unit = panel["fieldConfig"]["defaults"]["unit"]
        axes.set_yticks([each + 1 for each in range(len(rows))])
        axes.set_yticklabels([shown(float(series["metric"]["le"]), unit) for series in result])
        return None

    def table(self, panel: Json, place: Json) -> None:
        organize = next(each["options"] for each in panel["transformations"] if each["id"] == "organize")
        names = organize["renameByName"]
        units = {
            override["matcher"]["options"]: override["properties"][0]["value"]
            for override in panel["fieldConfig"]["overrides"]
        }
        rows: dict[tuple[str, str], dict[str, str]] = {}
        for target in panel["targets"]:
            column = names[f"Value #{target['refId']}"]
            for series in self.ask(target, instant=True):
                key = (series["metric"]["namespace"], series["metric"]["job_name"])
                rows.setdefault(key, {})[column] = shown(float(series["value"][1]), units[column])
        if not rows:
            return self.nothing(panel, place)
        columns = list(names.values())
        for number, column in enumerate(columns):
            x = 10 + number * place["w"] * CELL / len(columns)
            self.note(place, x, 34, column, 8, "#6E9FFF", weight="bold")
            for line, (key, row) in enumerate(sorted(rows.items())):
                text = key[number] if number < 2 else row.get(column, "")
                self.note(place, x, 60 + 24 * line, text, 8.5, "#6E9FFF" if number == 1 else TEXT)
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Draws a dashboard from the answers of a Prometheus.")
    parser.add_argument("dashboard", choices=DASHBOARDS)
    parser.add_argument("file", type=Path, help="a .png or .svg")
    parser.add_argument("--prometheus", metavar="URL", help="default: one of its own, over a recorded run")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of the dashboard")
    parser.add_argument("--minutes", type=int, default=30, help="up to now; the recording is always drawn whole")
    arguments = parser.parse_args()
    picked = PICKED[arguments.dashboard] | dict(each.split("=", 1) for each in arguments.set)
    with contextlib.ExitStack() as stack:
        if arguments.prometheus:
            server, end = Prometheus(arguments.prometheus.rstrip("/")), int(time.time())
            start = end - arguments.minutes * 60
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server = stack.enter_context(replay(folder, recording.play().openmetrics()))
            start, end = recording.START, recording.END
        picture = Picture(load(arguments.dashboard), server, picked, start, end)
        picture.draw()
    picture.figure.savefig(arguments.file, facecolor=BACK)
    drawn = len(panels(picture.dashboard))
    print(
        f"{arguments.file}: {drawn} panels" + (f", without data: {', '.join(picture.empty)}" if picture.empty else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

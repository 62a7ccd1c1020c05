"""Runs -> one self-contained HTML file: the plots' library, pictures and numbers are inside, nothing is loaded."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mf_dist.report import facts
from mf_dist.report.collect import Run, read_runs
from mf_dist.report.curves import LOSSES, SPEED, charts, distances, missing
from mf_dist.report.pictures import Shown, classes, grids, last_grids, neighbours
from mf_dist.report.results import compared, headline, measured
from mf_dist.runtime.atomic_files import write_atomic
from mf_dist.runtime.errors import UserError

HERE = Path(__file__).parent
LIMIT = 9_900_000
"""Bytes of a report."""
SHARES = {"grids": 0.45, "classes": 0.3, "last": 0.1, "neighbours": 0.1}
"""Of the room for a run's pictures."""


def write_report(folders: list[Path], out: Path) -> None:
    """Writes `out`, whole or not at all. UserError where a folder is no run, or so many runs do not fit."""
    runs = read_runs(folders)
    empty = {name: Shown([]) for name in SHARES}
    room = (LIMIT - len(_render(runs, [empty] * len(runs)).encode())) // len(runs)
    page = _render(runs, [_pictures(run, room) for run in runs]).encode()
    if len(page) > LIMIT:
        raise UserError(f"a report of these {len(runs)} runs has {len(page) / 1e6:.1f} MB: give fewer runs")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, lambda file: file.write(page))


def _pictures(run: Run, room: int) -> dict[str, Shown]:
    rooms = {name: max(0, int(share * room)) for name, share in SHARES.items()}
    drawn = grids(run, rooms["grids"])
    return {
        "grids": drawn,
        "last": last_grids(run, drawn, rooms["last"]),
        "neighbours": neighbours(run, rooms["neighbours"]),
        "classes": classes(run, rooms["classes"]),
    }


def _render(runs: list[Run], pictures: list[dict[str, Shown]]) -> str:
    plots = {"curves": distances(runs) + charts(runs, LOSSES), "speed": charts(runs, SPEED)}
    shown = [{"frames": found["grids"].items, "classes": found["classes"].items} for found in pictures]
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = facts.short
    return environment.get_template("page.html").render(
        runs=[_run(number, run, found) for number, (run, found) in enumerate(zip(runs, pictures, strict=True))],
        overview=[*(compared(runs) if len(runs) > 1 else []), *facts.overview(runs)],
        plots=plots,
        missing={"curves": missing(runs, plots["curves"], LOSSES), "speed": missing(runs, plots["speed"], SPEED)},
        thinned={section: facts.thinned(drawn) for section, drawn in plots.items()},
        differences=facts.differing(runs),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        data={"plots": plots, "runs": shown},
        style=_own("page.css"),
        script=_own("page.js"),
        plotly=_plotly(),
    )


def _run(number: int, run: Run, pictures: dict[str, Shown]) -> dict[str, Any]:
    return {
        "number": number,
        "name": run.name,
        "folder": str(run.folder),
        "status": facts.status(run),
        "headline": headline(run),
        "measured": measured(run),
        "history": facts.history(run),
        "faults": facts.faults(run),
        "config": facts.sections(run),
        "environment": facts.environment(run),
        "problems": run.problems,
        "pictures": pictures,
    }


def _own(name: str) -> Markup:
    """A file of this package, which is trusted; everything else is escaped."""
    return Markup((HERE / name).read_text(encoding="utf-8"))


def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())

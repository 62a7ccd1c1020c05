"""Renders runs as one self-contained HTML file: plot library, pictures and numbers are embedded, nothing is loaded."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mf_dist.report import facts
from mf_dist.report.collect import Run, read_runs
from mf_dist.report.curves import LOSSES, SPEED, charts, distances, missing
from mf_dist.report.pictures import Selection, classes, grids, last_grids, neighbours
from mf_dist.report.results import compared, headline, measured
from mf_dist.report.sweeps import sweeps
from mf_dist.runtime.atomic_files import write_atomic
from mf_dist.runtime.errors import UserError, import_error
from mf_dist.runtime.figures import three_digits

HERE = Path(__file__).parent
LIMIT = 9_900_000
"""Maximum size of a report in bytes."""
SHARES = {"grids": 0.45, "classes": 0.3, "last": 0.1, "neighbours": 0.1}
"""Shares of the bytes available for a run's pictures."""


def write_report(folders: list[Path], out: Path) -> None:
    """Writes `out` atomically. Raises UserError if a folder is not a run or the report exceeds LIMIT."""
    runs = read_runs(folders)
    empty = {name: Selection([]) for name in SHARES}
    budget = (LIMIT - len(_encoded(_render(runs, [empty] * len(runs))))) // len(runs)
    page = _encoded(_render(runs, [_pictures(run, budget) for run in runs]))
    if len(page) > LIMIT:
        raise UserError(f"a report of these {len(runs)} runs has {three_digits(len(page) / 1e6)} MB: give fewer runs")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, lambda file: file.write(page))


def _encoded(page: str) -> bytes:
    """In UTF-8; of a folder whose name is not UTF-8, the other bytes are escaped."""
    return page.encode(errors="backslashreplace")


def _pictures(run: Run, budget: int) -> dict[str, Selection]:
    budgets = {name: max(0, int(share * budget)) for name, share in SHARES.items()}
    frames = grids(run, budgets["grids"])
    return {
        "grids": frames,
        "last": last_grids(run, frames, budgets["last"]),
        "neighbours": neighbours(run, budgets["neighbours"]),
        "classes": classes(run, budgets["classes"]),
    }


def _render(runs: list[Run], pictures: list[dict[str, Selection]]) -> str:
    plots = {
        "guidance": sweeps(runs),
        "curves": distances(runs) + charts(runs, LOSSES),
        "speed": charts(runs, SPEED),
    }
    absent = {"curves": missing(runs, plots["curves"], LOSSES), "speed": missing(runs, plots["speed"], SPEED)}
    run_data = [{"frames": of_run["grids"].items, "classes": of_run["classes"].items} for of_run in pictures]
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = facts.format_value
    return environment.get_template("page.html").render(
        runs=[_run(number, run, of_run) for number, (run, of_run) in enumerate(zip(runs, pictures, strict=True))],
        overview=[*(compared(runs) if len(runs) > 1 else []), *facts.overview(runs)],
        plots=plots,
        missing={"guidance": [], **absent},
        thinned={section: facts.thinned(drawn) for section, drawn in plots.items()},
        differences=facts.differing(runs),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        data={"plots": plots, "runs": run_data},
        style=_package_file("page.css"),
        script=_package_file("page.js"),
        plotly=_plotly(),
    )


def _run(number: int, run: Run, pictures: dict[str, Selection]) -> dict[str, Any]:
    return {
        "number": number,
        "name": run.name,
        "folder": str(run.folder),
        "status": facts.status(run),
        "headline": headline(run),
        "measured": measured(run),
        "history": facts.history(run),
        "faults": facts.faults(run),
        "profile": facts.profile(run),
        "config": facts.sections(run),
        "environment": facts.environment(run),
        "problems": run.problems,
        "pictures": pictures,
    }


def _package_file(name: str) -> Markup:
    """A file of this package, which is trusted and not escaped, unlike everything else."""
    return Markup((HERE / name).read_text(encoding="utf-8"))


def _plotly() -> Markup:
    try:
        from plotly.offline import get_plotlyjs
    except Exception as error:
        raise import_error("plotly", "draws the curves", error) from None
    return Markup(get_plotlyjs())

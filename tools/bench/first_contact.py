"""What tools/bench/first_contact.sh needs beside programs: figures of what a line did, and the table of all lines.

    python tools/bench/first_contact.py run runs/digits --json run.json        # figures of a training run
    python tools/bench/first_contact.py evaluation runs/digits/eval --json evaluation.json
    python tools/bench/first_contact.py table OUT                              # OUT/first_contact.md and .json

OUT holds what the script wrote, one line for each check or prediction, fields separated by tabs: list.tsv (name,
seconds allowed), done.tsv (name, seconds taken, exit code), expected.tsv (name, key, relation, value, basis); and
results/NAME.json (numbers by key, nested keys joined by a dot), logs/NAME.out and NAME.err.
"""

import argparse
import json
import re
import sys

from mf_dist.runtime.atomic_files import write_atomic, write_json
from mf_dist.runtime.errors import command_line
from mf_dist.runtime.paths import expanded_path

TOLERANCE = 0.2
"""Largest relative difference from a prediction that is no miss."""
SAVE_WAIT, FIRST_STEP = r"saving step \d+: training waited (\S+) s", r"first step after (\S+) s"
"""In what a training run prints."""


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="figures of a training run")
    run.add_argument("path", type=expanded_path, help="the run's folder")
    run.add_argument("--log", type=expanded_path, help="what it printed: adds the wait for a save, the first step")
    run.add_argument("--against", type=expanded_path, help="another run: adds the relative difference of the last loss")
    run.add_argument("--json", type=expanded_path, required=True)
    evaluation = commands.add_parser("evaluation", help="seconds of an evaluation by stage")
    evaluation.add_argument("path", type=expanded_path, help="folder with metrics.json")
    evaluation.add_argument("--json", type=expanded_path, required=True)
    table = commands.add_parser("table", help="prediction beside measurement")
    table.add_argument("path", type=expanded_path, help="the script's output folder")
    table.add_argument("--tiny", action="store_true", help="say that shapes were small and predictions do not apply")
    return parser.parse_args()


def facts_of_run(folder, log, against):
    from mf_dist.report.collect import read_run

    run = read_run(folder, folder.name)
    last = run.training[-1]
    facts = {"status": run.status.get("status"), "step": last["step"]}
    keys = ("seconds_per_step", "images_per_second", "data_wait_share", "memory_gib", "raw_loss_r_equals_t")
    facts |= {key: last[key] for key in keys if key in last}
    seconds = [line["evaluation_seconds"] for line in run.lines if "evaluation_seconds" in line]
    facts |= {"evaluation_s": seconds[-1]} if seconds else {}
    if run.profile:
        facts["idle_share"] = run.profile["idle_share"]
        facts["waits"] = {row["name"]: row["calls"] for row in run.profile["waits"]}
        facts["ms_of"] = {row["name"]: row["ms"] for row in run.profile["classes"]}
    if log:
        text = log.read_text(encoding="utf-8")
        for key, pattern in {"save_wait_s": SAVE_WAIT, "first_step_s": FIRST_STEP}.items():
            found = re.findall(pattern, text)
            facts |= {key: max(float(number.replace(",", "")) for number in found)} if found else {}
    if against:
        other = read_run(against, against.name).training[-1]
        loss = "raw_loss_r_equals_t"
        facts["loss_difference"] = abs(last[loss] / other[loss] - 1)
    return facts


def facts_of_evaluation(folder):
    entry = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))[-1]
    return {"num_samples": entry["num_samples"], "precision": entry["precision"], "seconds": entry["seconds"]}


def lines_of(path):
    """The fields of each line; none if there is no such file."""
    if not path.is_file():
        return []
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def flat(values, prefix=""):
    """Nested dicts as one, with dotted keys; without lists and what is not known."""
    joined = {}
    for key, value in values.items():
        if isinstance(value, dict):
            joined |= flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list | None):
            joined[prefix + key] = value
    return joined


def numbers_of(path):
    """What a line has measured; nothing if it did not come so far, or was killed while it wrote."""
    try:
        return flat(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return {}


def outcome(name, done, out):
    """A sentence: passed, failed with the last line of stderr, over the time limit, or not run."""
    if name not in done:
        return "not run"
    seconds, code = done[name]
    if code == 0:
        return f"passed in {seconds} s"
    if code in (124, 137):
        return f"FAILED: over its time limit after {seconds} s"
    errors = out / f"logs/{name}.err"
    text = errors.read_text(encoding="utf-8", errors="replace") if errors.is_file() else ""
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "nothing on stderr")
    return f"FAILED: exit code {code} after {seconds} s: {last[:200]}"


def compare(relation, expected, measured):
    """(measured / predicted or None, whether it misses) for a value of results/NAME.json."""
    if relation == "is":
        return None, str(measured) != expected
    if not isinstance(measured, int | float):
        return None, True
    predicted = float(expected)
    ratio = measured / predicted if predicted else None
    too_high = measured > (1 + TOLERANCE) * predicted
    return ratio, too_high or (relation == "about" and measured < (1 - TOLERANCE) * predicted)


def collect(out):
    """All checks in order, each with its outcome, numbers and predictions."""
    done = {name: (int(seconds), int(code)) for name, seconds, code in lines_of(out / "done.tsv")}
    checks = []
    for name, limit in lines_of(out / "list.tsv"):
        measured = numbers_of(out / f"results/{name}.json") if name in done else {}
        predictions = []
        for _, key, relation, value, basis in (
            fields for fields in lines_of(out / "expected.tsv") if fields[0] == name
        ):
            ratio, is_missed = compare(relation, value, measured[key]) if key in measured else (None, None)
            predictions.append(
                {
                    "key": key,
                    "relation": relation,
                    "predicted": value,
                    "measured": measured.get(key),
                    "ratio": ratio,
                    "is_missed": is_missed,
                    "basis": basis,
                }
            )
        checks.append(
            {
                "name": name,
                "limit_s": int(limit),
                "outcome": outcome(name, done, out),
                "measured": measured,
                "predictions": predictions,
            }
        )
    return checks


def shown(value):
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def markdown(checks, is_tiny):
    failed = [check["name"] for check in checks if check["outcome"].startswith("FAILED")]
    missed = [f"{c['name']}: {p['key']}" for c in checks for p in c["predictions"] if p["is_missed"]]
    device = next((check["measured"] for check in checks if check["name"] == "device"), {})
    lines = [
        f"# First contact: {device.get('device', 'unknown device')}, torch {device.get('torch', 'unknown')}",
        "",
        *(["Small shapes, to try the script itself: the predictions do not apply.", ""] if is_tiny else []),
        f"{sum(c['outcome'].startswith('passed') for c in checks)} of {len(checks)} checks passed; failed: "
        f"{', '.join(failed) or 'none'}; missed by more than {TOLERANCE:.0%}: {', '.join(missed) or 'none'}.",
        "",
        "| check | quantity | predicted | measured | measured / predicted | basis of the prediction |",
        "|---|---|---|---|---|---|",
    ]
    words = {"about": "", "at_most": "at most ", "is": ""}
    for check in checks:
        lines.append(f"| **{check['name']}** | {check['outcome'].replace('|', '/')} | | | | |")
        for p in check["predictions"]:
            verdict = {True: " **missed**", False: "", None: ""}[p["is_missed"]]
            cells = (p["key"], words[p["relation"]] + p["predicted"], shown(p["measured"]) + verdict, shown(p["ratio"]))
            lines.append(f"| | {' | '.join(cells)} | {p['basis']} |")
    lines += ["", "## All figures", ""]
    for check in (check for check in checks if check["measured"]):
        figures = ", ".join(f"{key} {shown(value)}" for key, value in check["measured"].items())
        lines.append(f"- {check['name']}: {figures}")
    return "\n".join(lines) + "\n"


@command_line
def main() -> int:
    args = parse()
    if args.command == "run":
        write_json(args.json, facts_of_run(args.path, args.log, args.against))
    elif args.command == "evaluation":
        write_json(args.json, facts_of_evaluation(args.path))
    else:
        checks = collect(args.path)
        write_json(args.path / "first_contact.json", {"tolerance": TOLERANCE, "checks": checks})
        write_atomic(args.path / "first_contact.md", lambda file: file.write(markdown(checks, args.tiny).encode()))
        print(args.path / "first_contact.md")
        return int(any(check["outcome"].startswith("FAILED") for check in checks))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every command in a document still works: its file is there, its own parser takes its arguments, its config resolves.

Documents are README.md, docs/, the comments of configs/ and slurm/, and what each program says of itself by --help. In
a command, words in capitals stand for a user's own, and ... for further arguments.
"""

import argparse
import ast
import dataclasses
import importlib
import importlib.util
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import get_type_hints
from unittest.mock import patch

import pytest
from conftest import ROOT, repository_files
from test_job_scripts import SCRIPTS

from mf_dist.config.schema import Config, load_config, resolve
from mf_dist.runtime.errors import UserError

MARKDOWN = [ROOT / "README.md", *repository_files("docs", "*.md", 8)]
COMMENTED = [*repository_files("configs", "*.yaml", 11), *repository_files("slurm", "*.*", 7)]
PYTHON = [*repository_files("tools", "*.py", 25), *repository_files("mf_dist", "*.py", 80)]
AT_LEAST = {"md": 60, "yaml": 20, "sh": 6, "py": 55}
"""Commands known to be in documents of each kind."""
PREFIX = r"(?:[$>] )?(?:\w+=\S+ )*(?:(?:time|nice|bash) )?(?:\./)?"
PROGRAM = r"(?:(?:\.venv/bin/)?python3?|torchrun|sbatch|srun|make|(?:tools|slurm)/[\w/]+\.(?:py|sh))"
COMMAND = re.compile(rf"{PREFIX}({PROGRAM} .*)")
USAGE = re.compile(r"\[(?:--|[A-Z])")
"""Optional arguments in brackets: a description of a call, not one."""
SBATCH = {"nodes", "time", "array", "test-only", "signal", "exclude", "no-requeue", "dependency", "gres", "partition"}
"""Options of sbatch that documents use; it is not installed where these tests run."""
FOLDERS = "mf_dist|tools|configs|slurm|tests|docs"


def commands_in(document: Path) -> list[str]:
    """All commands of a document: continued lines joined, comments of the shell left out but for "or: COMMAND"."""
    text, spans = document.read_text(encoding="utf-8"), []
    if document in MARKDOWN:
        is_code, in_fence = [], False
        for line in text.splitlines():
            in_fence ^= line.lstrip().startswith("```")
            is_code.append(in_fence or line.startswith(("   ", "\t")))
        prose = "\n".join(line for line, code in zip(text.splitlines(), is_code, strict=True) if not code)
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
        text = "\n".join(line for line, code in zip(text.splitlines(), is_code, strict=True) if code)
    elif document in COMMENTED:
        lines = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
        text = "\n".join(line.partition(":   ")[2] or line for line in lines)
    else:
        text = ast.get_docstring(ast.parse(text)) or ""
    codes = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        code, _, comment = line.partition(" # ")
        codes += [code, comment.strip().removeprefix("or: ")] if comment.strip().startswith("or: ") else [code]
    pieces = [piece.strip() for code in codes for piece in re.split(r"&&|[;&|]", code)] + spans
    if document in PYTHON:  # sentences may begin with the name of a tool
        pieces = [piece for piece in pieces if not piece.startswith("tools/")]
    return [found[1] for piece in pieces if (found := COMMAND.fullmatch(piece)) and not USAGE.search(piece)]


def commands() -> list[tuple[str, str]]:
    """(document, command) for all of them."""
    found = [
        (path.relative_to(ROOT).as_posix(), command)
        for path in [*MARKDOWN, *COMMENTED, *PYTHON]
        for command in commands_in(path)
    ]
    for kind, count in AT_LEAST.items():
        assert sum(path.endswith(f".{kind}") for path, _ in found) >= count, f"commands of *.{kind} are not found"
    return found


class Parsed(BaseException):
    """Ends a program after its parser."""


@cache
def program(path: Path):
    sys.path.insert(0, str(path.parent))  # benches import each other
    try:
        spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def parse(path: Path, arguments: list[str]) -> argparse.Namespace | None:
    """What the program at `path` makes of its arguments, its own checks of them included; None for --help."""
    module, is_partial = program(path), "..." in arguments
    arguments = [argument for argument in arguments if argument != "..."]

    def caught(method):
        def run(parser, *_, **__):
            if not is_partial:
                raise Parsed(method(parser, arguments))
            for option in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
                assert option in parser._option_string_actions, f"{path.name} has no {option}"
            raise Parsed(argparse.Namespace())

        return run

    methods = ("parse_args", "parse_intermixed_args")
    hooks = {name: caught(getattr(argparse.ArgumentParser, name)) for name in methods}
    checks_itself = hasattr(module, "parse") and not is_partial
    with patch.object(sys, "argv", [str(path), *arguments]):
        try:
            if checks_itself:
                return module.parse()
            with patch.multiple(argparse.ArgumentParser, **hooks):
                module.main()
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit as end:
            assert not end.code, "the program's parser refuses it"
            return None
    raise AssertionError(f"{path.name} ends without a parser")


def check_config(config: str, overrides: list[str], ranks: int) -> None:
    """It loads with the overrides, and trains on `ranks` ranks on a dataset that fits."""
    if config.isupper():
        config = "configs/digits_cpu.yaml"
    loaded = load_config(str(ROOT / config), overrides)
    usual = {"latent_size": 32, "latent_channels": 4, "num_classes": 1000}
    given = {name: getattr(loaded.model, name) for name in usual}
    manifest = {name: usual[name] if given[name] is None else given[name] for name in usual}
    statistics = {name: [1.0] * manifest["latent_channels"] for name in ("channel_mean", "channel_std")}
    resolve(loaded, {**manifest, **statistics, "flip": True}, ranks)


def check_python(words: list[str], ranks: int) -> None:
    """python [-m MODULE | FILE] ARGUMENTS."""
    if words[:2] == ["-m", "simcuda"]:  # whose import would turn this process into one on a simulated GPU
        assert (ROOT / words[2]).is_file()
        return
    if words[0] == "-m":
        path, arguments = ROOT / (words[1].replace(".", "/") + ".py"), words[2:]
    else:
        path, arguments = ROOT / words[0], words[1:]
    assert path.is_file(), f"{path} is not there"
    parsed = parse(path, arguments)
    if getattr(parsed, "step", None) == "node":
        check_config(parsed.rest[0], parsed.rest[1:], ranks)
    elif getattr(parsed, "config", None) and getattr(parsed, "overrides", None) is not None:
        check_config(parsed.config, parsed.overrides, ranks)
    elif "..." in arguments and words[0] == "-m":
        named = [word for word in arguments if word.endswith(".yaml")]
        check_config(*(named or ["CONFIG"]), [word for word in arguments if "=" in word and word[0] != "-"], ranks)


def check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    program_at = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    options = [word for word in words[:program_at] if word != "..."]
    parsed = get_args_parser().parse_args([*options, "program"])
    check_python(words[program_at:], int(parsed.nproc_per_node) * int(parsed.nnodes.split(":")[-1]))


def check_sbatch(words: list[str]) -> None:
    """A script that the job scripts' own tests know; its arguments go to the program that it starts."""
    script_at = next(i for i, word in enumerate(words) if not word.startswith("--"))
    options = {word.removeprefix("--").partition("=")[0] for word in words[:script_at]}
    assert options <= SBATCH, f"are {options - SBATCH} options of sbatch? Then add them to SBATCH"
    script, arguments = ROOT / words[script_at], words[script_at + 1 :]
    assert script in SCRIPTS, f"{script} is no job script"
    text = script.read_text(encoding="utf-8")
    size = {name: int(value) for name, value in re.findall(r"--(nodes|gres)=(?:gpu:)?(\d+)", f"{text} {words}")}
    start = shlex.split(text.splitlines()[-1])
    if start[0] == "train":
        check_config(start[1], arguments, size["nodes"] * size["gres"])
    else:
        check_python([start[1], *arguments], 1)


def check_pipeline(words: list[str]) -> None:
    """slurm/pipeline.sh TRAIN_SCRIPT RUN_DIR DATA_DIR ENCODE_OPTIONS... [-- OVERRIDES...]"""
    train, run, data, *rest = words
    cut = rest.index("--") if "--" in rest else len(rest)
    check_sbatch(["slurm/encode_latents.sh", "--out", data, *rest[:cut]])
    check_sbatch([train, f"run_dir={run}", f"data.path={data}", *rest[cut + 1 :]])


def check_shell(words: list[str]) -> None:
    """A shell script of tools/, which has no parser to ask: its options stand in it."""
    text = (ROOT / words[0]).read_text(encoding="utf-8")
    for option in (word for word in words[1:] if word.startswith("--")):
        assert re.search(rf"^ +.*{option}\b.*\)", text, re.M), f"{words[0]} has no {option}"


def check_make(words: list[str]) -> None:
    """Targets, and variables that the Makefile has."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"\.PHONY: (.*)", text)[1].split()
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert re.search(rf"^{name} [?:]?=", text, re.M) if is_variable else name in targets, f"make has no {name}"


def check_command(command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "srun":
        words = words[next(i for i, word in enumerate(words) if word in ("python", "torchrun")) :]
    if words[0] == "make":
        check_make(words[1:])
    elif words[0] == "sbatch":
        check_sbatch(words[1:])
    elif words[0] == "torchrun":
        check_torchrun(words[1:])
    elif words[0] == "slurm/pipeline.sh":
        check_pipeline(words[1:])
    elif words[0].endswith(".sh"):
        check_shell(words)
    else:
        check_python(words if words[0].startswith("tools/") else words[1:], 1)


@pytest.mark.parametrize(("document", "command"), commands())
def test_command(document, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a program may try at once whether it can write its output
    check_command(command)


@pytest.mark.parametrize(
    "command",
    [
        "python tools/no_such_tool.py --out x",
        "python -m mf_dist.no_such_module",
        "python tools/sample.py --no-such-option",
        "tools/fid_eval.py --nfe 0",
        "python -m mf_dist.train configs/no_such_config.yaml",
        "python -m mf_dist.train CONFIG train.no_such_key=1",
        "python -m mf_dist.train ... train.no_such_key=1",
        "torchrun --nproc_per_node=3 -m mf_dist.train configs/digits_cpu.yaml",
        "torchrun --no_such_option=3 -m mf_dist.train configs/digits_cpu.yaml",
        "python -m mf_dist.jobs.preflight node --into DIR configs/no_such_config.yaml",
        "sbatch --nodez=2 slurm/train_xl.sh",
        "sbatch slurm/train_xl.sh train.no_such_key=1",
        "sbatch slurm/fid_eval.sh --no-such-option",
        "make demo NO_SUCH_VARIABLE=3",
        "make no_such_target",
        "tools/bench/first_contact.sh OUT --no-such-option",
    ],
)
def test_a_wrong_command_is_seen(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, UserError, SystemExit)):
        check_command(command)


def test_commands_are_found_in_every_form(tmp_path, monkeypatch):
    path = tmp_path / "page.md"
    monkeypatch.setitem(globals(), "MARKDOWN", [path])
    path.write_text(
        "Text `make one` and `tools/two.py\n--x` and `not a command`.\n\n    $ python3 three.py \\\n        --y\n"
        "- item\n\n   NAME=1 time torchrun four.py   # or: sbatch five.sh\n```\nmake six && make seven\n"
        "python -m m eval.nfe=[1,2]\nusage [--option]\n```\n\tbash slurm/eight.sh --z\n"
    )
    assert commands_in(path) == [
        "python3 three.py --y",
        "torchrun four.py",
        "sbatch five.sh",
        "make six",
        "make seven",
        "python -m m eval.nfe=[1,2]",
        "slurm/eight.sh --z",
        "make one",
        "tools/two.py --x",
    ]


@pytest.mark.parametrize("document", [*MARKDOWN, *COMMENTED, *PYTHON, ROOT / "Makefile"], ids=lambda p: p.name)
def test_files_that_are_named_are_there(document):
    text = document.read_text(encoding="utf-8")
    named = {path.rstrip(".") for path in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]+", text)}
    generated = {"slurm/site.env"}
    assert not [path for path in sorted(named - generated) if not (ROOT / path).exists()]


@pytest.mark.parametrize("document", MARKDOWN, ids=lambda path: path.name)
def test_modules_that_are_named_are_there(document):
    """`room/module.py`, and dotted names of the package that are no config keys."""
    parts = {path.name.removesuffix(".py") for path in (ROOT / "mf_dist").iterdir()}
    fields = {
        section: set(type_.__dataclass_fields__)
        for section, type_ in get_type_hints(Config).items()
        if dataclasses.is_dataclass(type_)
    }
    for span in re.findall(r"`([^`\s]+)`", document.read_text(encoding="utf-8")):
        if re.fullmatch(r"[\w/]+\.py", span):
            assert (ROOT / span).is_file() or (ROOT / "mf_dist" / span).is_file(), span
        names = span.split("=")[0].split(".")
        is_key = len(names) == 2 and names[1] in fields.get(names[0], ())
        if (
            re.fullmatch(r"\w+(\.\w+)+", ".".join(names))
            and names[0] in parts
            and not is_key
            and names[-1] not in ("html", "json")
        ):
            *module, attribute = ["mf_dist", *names]
            found = importlib.import_module(".".join(module))
            assert hasattr(found, attribute) or importlib.util.find_spec(".".join([*module, attribute])), span

"""Every command in a document still works: its file is there, its own parser takes its arguments, its config resolves.

Documents are README.md, docs/, the comments of configs/ and slurm/, and what each program says of itself by --help. In
a command, words in capitals stand for a user's own, and ... for further arguments.
"""

import argparse
import ast
import importlib.util
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import ROOT
from test_job_scripts import SCRIPTS

from mf_dist.config.schema import load_config, resolve

MARKDOWN = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMENTED = [*sorted((ROOT / "configs").rglob("*.yaml")), *sorted((ROOT / "slurm").rglob("*.*"))]
PYTHON = [*sorted((ROOT / "tools").rglob("*.py")), *sorted((ROOT / "mf_dist").rglob("*.py"))]
COMMAND = re.compile(r"((\.venv/bin/)?python|torchrun|sbatch|srun|make|slurm/\w+\.sh) ")
INLINE = re.compile(rf"{COMMAND.pattern}|tools/[\w/]+\.py ")
"""A command on a line of its own, and in backticks."""
FOLDERS = "mf_dist|tools|configs|slurm|tests|docs"


def commands_in(document: Path) -> list[str]:
    """All commands of a document: continued lines joined, comments of the shell left out but for "or: COMMAND"."""
    text, spans = document.read_text(encoding="utf-8"), []
    if document in MARKDOWN:
        prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
        text = "\n".join(line for line in text.splitlines() if line.startswith("    "))
    elif document in COMMENTED:
        lines = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
        text = "\n".join(line.partition(":   ")[2] or line for line in lines)
    else:
        text = ast.get_docstring(ast.parse(text)) or ""
    lines = [line for joined in re.sub(r"\\\n *", "", text).splitlines() for line in joined.split("or: ")]
    codes = [code.strip() for line in lines for code in re.split(r"&&|[;&|]", line.partition(" # ")[0])]
    return [c for c in codes if COMMAND.match(c) and "[" not in c] + [span for span in spans if INLINE.match(span)]


def commands() -> list[tuple[str, str]]:
    """(document, command) for all of them."""
    documents = [*MARKDOWN, *COMMENTED, *PYTHON]
    found = [(path.relative_to(ROOT).as_posix(), command) for path in documents for command in commands_in(path)]
    assert len(found) > 100, "fewer commands than the documents are known to have: is the extraction broken?"
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


def check_config(config: str, overrides: list[str], ranks: int) -> None:
    """It loads with the overrides, and trains on `ranks` ranks on a dataset that fits."""
    if config.isupper():
        config = "configs/digits_cpu.yaml"
    loaded = load_config(str(ROOT / config), overrides)
    usual = {"latent_size": 32, "latent_channels": 4, "num_classes": 1000}
    said = {name: getattr(loaded.model, name) for name in usual}
    resolve(loaded, {name: usual[name] if said[name] is None else said[name] for name in usual} | {"flip": True}, ranks)


def check_python(words: list[str], ranks: int) -> None:
    """python [-m MODULE | FILE] ARGUMENTS."""
    if words[0] == "-m":
        path, arguments = ROOT / (words[1].replace(".", "/") + ".py"), words[2:]
    else:
        path, arguments = ROOT / words[0], words[1:]
    assert path.is_file(), f"{path} is not there"
    parsed = parse(path, arguments)
    if getattr(parsed, "config", None) and getattr(parsed, "overrides", None) is not None:
        check_config(parsed.config, parsed.overrides, ranks)


def check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    program_at = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    options = [word for word in words[:program_at] if word != "..."]
    parsed = get_args_parser().parse_args([*options, "program"])
    check_python(words[program_at:], int(parsed.nproc_per_node) * int(parsed.nnodes.split(":")[-1]))


def check_sbatch(words: list[str]) -> None:
    """A script that the job scripts' own tests know; its arguments go to the program that it starts."""
    script_at = next(i for i, word in enumerate(words) if not word.startswith("--"))
    script, arguments = ROOT / words[script_at], words[script_at + 1 :]
    assert script in SCRIPTS, f"{script} is no job script"
    text = script.read_text(encoding="utf-8")
    asked = {name: int(value) for name, value in re.findall(r"--(nodes|gres)=(?:gpu:)?(\d+)", f"{text} {words}")}
    start = shlex.split(text.splitlines()[-1])
    if start[0] == "train":
        check_config(start[1], arguments, asked["nodes"] * asked["gres"])
    else:
        check_python([start[1], *arguments], 1)


def check_pipeline(words: list[str]) -> None:
    """slurm/pipeline.sh TRAIN_SCRIPT RUN_DIR DATA_DIR ENCODE_OPTIONS... [-- OVERRIDES...]"""
    train, run, data, *rest = words
    cut = rest.index("--") if "--" in rest else len(rest)
    check_sbatch(["slurm/encode_latents.sh", "--out", data, *rest[:cut]])
    check_sbatch([train, f"run_dir={run}", f"data.path={data}", *rest[cut + 1 :]])


@pytest.mark.parametrize(("document", "command"), commands())
def test_command(document, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a program may try at once whether it can write its output
    words = shlex.split(command, comments=True)
    if words[0] == "srun":
        words = words[1:]
    if words[0] == "make":
        targets = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1].split()
        assert words[1] in targets
    elif words[0] == "sbatch":
        check_sbatch(words[1:])
    elif words[0] == "torchrun":
        check_torchrun(words[1:])
    elif words[0] == "slurm/pipeline.sh":
        check_pipeline(words[1:])
    else:
        check_python(words if words[0].startswith("tools/") else words[1:], 1)


@pytest.mark.parametrize("document", [*MARKDOWN, *COMMENTED, *PYTHON, ROOT / "Makefile"], ids=lambda p: p.name)
def test_files_that_are_named_are_there(document):
    text = document.read_text(encoding="utf-8")
    named = {path.rstrip(".") for path in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]+", text)}
    generated = {"slurm/site.env"}
    assert not [path for path in sorted(named - generated) if not (ROOT / path).exists()]

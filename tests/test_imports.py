"""The architecture: which part of the package imports which, which library only one part knows, what no file calls."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT, repository_files

MAY_IMPORT = {  # each part may import itself and the parts on its line; the order of the lines is from the top down
    "tools": "train training evaluation sampling report data objectives models config fault_tolerance checkpoint vae "
    "runtime",
    "__init__": "sampling",
    "jobs": "train data config fault_tolerance checkpoint runtime",
    "train": "training data config fault_tolerance runtime",
    "training": "evaluation sampling report data objectives models config fault_tolerance checkpoint vae runtime",
    "evaluation": "sampling data objectives config fault_tolerance vae runtime",
    "sampling": "data objectives models config checkpoint vae runtime",
    "report": "config fault_tolerance checkpoint runtime",
    "data": "config fault_tolerance vae runtime",
    "objectives": "models config",
    "models": "config",
    "config": "runtime",
    "fault_tolerance": "runtime",
    "checkpoint": "runtime",
    "vae": "runtime",
    "runtime": "",
}
ONLY_IN = {
    "deepspeed": ["training/engine.py"],
    "diffusers": ["vae.py"],
    "webdataset": ["data/shard_writer.py"],
    "wandb": ["training/logger.py"],
    "timm": ["evaluation/dinov2.py"],
    "torch_fidelity": ["evaluation/inception.py", "evaluation/metrics.py"],
}
"""Libraries that these files alone import."""
NEVER_IN = {
    "config": ["torch", "numpy"],
    "models": ["torch.distributed", "numpy"],
    "objectives": ["torch.distributed", "numpy"],
}
FORBIDDEN = (
    "weights_only=False",
    "pickle.load",
    "yaml.load(",
    "allow_pickle=True",
    "shell=True",
    "os.system(",
    "eval(",
)


FILES = repository_files("mf_dist", "*.py", 80)
TOOLS = repository_files("tools", "*.py", 25)


def name_of(path: Path) -> str:
    """Below mf_dist/, or tools/..."""
    return path.relative_to(ROOT).as_posix().removeprefix("mf_dist/")


def part_of(path: Path) -> str:
    return name_of(path).split("/")[0].removesuffix(".py")


def allowed(part: str) -> set[str]:
    return {part, *MAY_IMPORT.get(part, "").split()}


def imports(path: Path) -> set[str]:
    """Full dotted names of everything a file imports, at the top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def uses(path: Path, library: str) -> bool:
    return any(name == library or name.startswith(library + ".") for name in imports(path))


def test_the_table_runs_downwards():
    """With each file's imports inside the table, no part can import one that imports it."""
    parts = list(MAY_IMPORT)
    for number, part in enumerate(parts):
        assert allowed(part) <= {*parts[number:]}, f"{part} stands below what it may import"
    assert {part_of(path) for path in [*FILES, *TOOLS]} == {*parts}


@pytest.mark.parametrize("path", [*FILES, *TOOLS], ids=name_of)
def test_who_imports_what(path):
    part = part_of(path)
    imported = {name.split(".")[1] for name in imports(path) if name.startswith("mf_dist.")}
    assert imported <= allowed(part), f"{name_of(path)} imports upwards, or past the table: {imported - allowed(part)}"
    if part != "tools":
        for library, places in ONLY_IN.items():
            assert name_of(path) in places or not uses(path, library), f"{name_of(path)} imports {library}"
    for library in ["tools", "tests", "conftest", *NEVER_IN.get(part, [])]:
        assert not uses(path, library), f"{name_of(path)} imports {library}"


def test_no_files_import_each_other():
    modules = {"mf_dist." + name_of(path).removesuffix(".py").replace("/", "."): path for path in FILES}
    to_see, seen = {name: imports(path) & modules.keys() for name, path in modules.items()}, set()
    while ready := {name for name, wanted in to_see.items() if wanted <= seen | {name}}:
        seen |= ready
        to_see = {name: wanted for name, wanted in to_see.items() if name not in ready}
    assert not to_see, f"a circle is among {sorted(to_see)}"


def test_two_modules_stand_in_the_package_root():
    assert {path.name for path in (ROOT / "mf_dist").glob("*.py")} == {"__init__.py", "train.py", "vae.py"}


@pytest.mark.parametrize("path", [*FILES, *TOOLS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_forbidden_calls_do_not_occur(path):
    text = path.read_text(encoding="utf-8").replace(".eval(", "")
    assert not [call for call in FORBIDDEN if call in text]

"""Rules of the house that a machine can check."""

import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
MODULES = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("cada/**/*.py"))]
HUB_MODULES = [ROOT / f"{name}_cada.py" for name in ("configuration", "losses", "modeling", "pipeline", "processing")]


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids="-".join)
def test_ruff_finds_nothing(command):
    result = subprocess.run([sys.executable, "-m", "ruff", *command, ROOT], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_no_file_and_no_function_is_too_long():
    """600 lines (the model: 780), 60 of a function; 9 parameters, where no library's interface demands more."""
    files = [*MODULES, *ROOT.glob("benchmarks/*.py")]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path.name for path, count in lines.items() if count > 600} <= {"modeling_cada.py"}
    assert max(lines.values()) <= 780
    long, wide = [], []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args
                count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
                long += [node.name] if node.end_lineno - node.lineno >= 60 else []
                wide += (
                    [f"{path.name}: {node.name}"]
                    if count > 9 + (arguments.args[:1] != [] and arguments.args[0].arg == "self")
                    else []
                )
    assert long == []
    # typer makes the options of a command from parameters; the others are methods that transformers calls.
    commands = {f"cli.py: {name}" for name in ("convert_checkpoint", "index", "search")}
    assert set(wide) <= commands | {"modeling_cada.py: forward", "processing_cada.py: _preprocess"}


# The floors of the house: a module imports from its own floor and those before it. Rooms that share a floor, in
# parentheses, never import each other.
FLOORS = (
    ("configuration_cada", "losses_cada", "modeling_cada", "processing_cada", "pipeline_cada", "cada"),
    ("cada.files",),
    ("cada.data",),
    ("cada.evaluation",),
    ("cada.hub",),
    ("cada.explain", "cada.export"),
    ("cada.drawing",),
    ("cada.training", "cada.gallery"),
    ("cada.serve",),
    ("train_cada",),
    ("cada.demo",),
    ("cada.cli",),
    ("cada.__main__",),
)


def room_of(module: str) -> str:
    """`cada.data` for `cada.data.pairs`."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "cada" else module


def test_setup_lists_every_module():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert sorted(setup["options"]["py_modules"].split()) == sorted(path.stem for path in ROOT.glob("*.py"))
    packages = {".".join(path.relative_to(ROOT).parent.parts) for path in ROOT.glob("cada/**/__init__.py")}
    assert set(setup["options"]["packages"].split()) == packages | {"model_cards"}


def test_modules_import_only_what_stands_before_them():
    """The way of the data goes forward only."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for path in MODULES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for other in {room_of(module) for module in imported if room_of(module) in floor} - {room_of(name)}:
                own = floor[room_of(name)]
                assert floor[other] < own or (own == 0 == floor[other]), f"{name} imports {other}"


@pytest.mark.parametrize("path", HUB_MODULES, ids=lambda path: path.stem)
def test_what_travels_with_a_checkpoint_needs_base_packages_only(path):
    """transformers reads the imports outside `try` and refuses to load where one of them is not installed."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"from __future__|isinstance\([^)]*config, *CADA|Auto\w+\.register\(", text)
    needed = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            needed |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            needed.add(node.module.split(".")[0])
    assert needed - sys.stdlib_module_names <= {"huggingface_hub", "PIL", "numpy", "torch", "transformers"}


def test_public_names_are_documented():
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) or not tree.body, path.name
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_the_page_of_the_design_names_what_is_there():
    """Every file that it names exists, and holds the names that stand behind it."""
    file, names = None, 0
    for word in re.findall(r"`([^`]+)`", (ROOT / "docs/design.md").read_text(encoding="utf-8").split("## Rules")[0]):
        if "/" in word or word.endswith(".py"):
            file = ROOT / word
            assert file.exists(), word
        elif file is not None and file.suffix == ".py" and re.fullmatch(r"\w+", word):
            names += 1
            assert re.search(rf"\b{word}\b", file.read_text(encoding="utf-8")), f"{word} is not in {file.name}"
    assert names > 20


def test_links_of_the_documents_lead_somewhere():
    """Files and headings. The README is short, as readers are in a hurry."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
    links = 0
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, target
            links += 1
    assert links > 20


def test_options_that_messages_name_exist():
    """As they are spelled, in `cada` or in train_cada.py, whose parser takes dashes too."""
    import typer
    from transformers import HfArgumentParser

    from cada.cli import app
    from cada.training.arguments import CADATrainingArguments, DataArguments, ModelArguments

    parser = HfArgumentParser((ModelArguments, DataArguments, CADATrainingArguments))
    known = {option for action in parser._actions for option in action.option_strings}
    for command in typer.main.get_command(app).commands.values():
        known |= {option for parameter in command.params for option in parameter.opts}
    known |= {"--mixed_precision"}  # of `accelerate launch`
    named = {}
    for path in MODULES:
        for option in re.findall(r"--[a-z][a-z0-9_-]*[a-z0-9]", path.read_text(encoding="utf-8")):
            named.setdefault(option, path.name)
    assert {option: file for option, file in named.items() if option not in known} == {}
    assert len(named) > 60

"""The order of the house: what may import what, what is declared, how long a file may be, where tests lie."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

import rad

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
FILES = {folder: sorted((ROOT / folder).rglob("*.py")) for folder in ("rad", "training", "tests")}
MAX_LINES = 450
DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn", "yaml": "pyyaml"}
PART_OF = {"gradio_client": "gradio", "mcp": "gradio"}  # gradio pins the first, its extra mcp brings the second
OPTIONAL = {"spaces", "bitsandbytes"}  # a Space has the first; train.py says how to install the second


def imported(path: Path) -> set[str]:
    """All that a file imports, also inside functions, by absolute names such as "rad.data.load_dataset"."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join(filter(None, (*parents, node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def distributions(names: set[str]) -> set[str]:
    return {PART_OF.get(name, DISTRIBUTIONS.get(name, name)).replace("_", "-") for name in names}


def declared(lines: list[str]) -> set[str]:
    """Distributions that lines of a requirements file or an extra name."""
    names = {match[0] for line in lines if (match := re.match(r"[\w-]+", line.replace("_", "-")))}
    own = [name for line in lines for name in re.findall(r"[\w-]+", line.partition("rad-diffusion")[2])]
    return names.union(*(declared(EXTRAS[name]) for name in own))


def declared_in(file: str) -> set[str]:
    return declared((ROOT / file).read_text().splitlines())


@pytest.mark.parametrize(
    ("folder", "extras", "files"),
    [
        ("rad", ["train"], ["requirements.txt"]),
        ("training", ["train", "test", "ray"], ["requirements.txt", "requirements-bench.txt"]),
        ("tests", ["test"], ["requirements.txt", "requirements-bench.txt"]),
    ],
)
def test_what_is_imported_is_declared(folder, extras, files):
    paths = FILES[folder] + ([ROOT / "app.py"] if folder == "rad" else [])
    own = {"rad", "app"} | {path.stem for path in FILES["training"] + FILES["tests"]}
    foreign = set().union(*(top(imported(path)) for path in paths)) - own - OPTIONAL - sys.stdlib_module_names
    known = set().union(*(declared(EXTRAS[name]) for name in extras), *map(declared_in, files))
    assert not distributions(foreign) - known, "imported and not declared"


def test_what_the_library_needs_is_imported():
    names = set().union(*(top(imported(path)) for paths in FILES.values() for path in paths))
    assert not declared_in("requirements.txt") - distributions(names), "declared and not imported"


def test_no_cycle_of_imports_and_none_of_what_stands_on_the_package():
    modules = {}
    for path in FILES["rad"]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if path.stem == "__init__" else parts)] = imported(path)
    outside = {"app", "training"} | {path.stem for path in FILES["training"]}
    assert not {name: top(names) & outside for name, names in modules.items() if top(names) & outside}

    def module(name: str) -> str:  # that a name lies in, or is
        return name if name in modules else name.rpartition(".")[0]

    graph = {name: {module(each) for each in names} & modules.keys() for name, names in modules.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("path", FILES["rad"], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_long_file_says_why(path):
    first, *others = path.read_text().splitlines() or [""]
    assert len(others) < MAX_LINES or first.startswith("# Long because ")


def test_one_spelling():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = {name: (ROOT / name).read_text() for name in names if name.endswith((".py", ".md", ".toml", ".yaml"))}
    other = re.compile(r"(?<![a-z])can([ _]not|'t)(?![a-z])", re.IGNORECASE)
    assert not [name for name, text in texts.items() if name != "tests/test_house.py" and other.search(text)]


def test_tests_mirror_the_folders():
    def folders(root: str) -> set[str]:
        return {path.parent.relative_to(ROOT / root).as_posix() for path in FILES[root]}

    assert folders("tests") == folders("rad") | {"training"}


@pytest.mark.parametrize("kind", [DiffusionPipeline, ModelMixin, SchedulerMixin])
def test_all_component_classes_are_exported(kind):
    def below(cls: type) -> set[type]:
        return {cls}.union(*map(below, cls.__subclasses__()))

    own = {cls.__name__ for cls in below(kind) if cls.__module__.startswith("rad.") and "Mixin" not in cls.__name__}
    assert own and own <= set(rad.__all__) and rad.__all__ == sorted(rad.__all__)


def test_the_readme_leads_to_every_page_and_no_link_is_dead():
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    pages += sorted((ROOT / "training" / "docs").glob("*.md"))
    links = {
        page: {to for to in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()) if "://" not in to} for page in pages
    }
    assert not [f"{page.name}: {to}" for page in pages for to in links[page] if not (page.parent / to).exists()]
    assert {page.relative_to(ROOT).as_posix() for page in pages[1:]} <= links[pages[0]]


def test_pre_commit_runs_a_ruff_that_the_project_allows():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (bound,) = (line for line in EXTRAS["test"] if line.startswith("ruff>="))
    version, least = (tuple(map(int, re.findall(r"\d+", text))) for text in (repo["rev"], bound))
    assert version >= least


def test_lint_comes_before_the_tests():
    assert "mypy" in (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    ci = (ROOT / ".ci" / "run").read_text()
    assert 0 < ci.index("make lint") < ci.index("make test")

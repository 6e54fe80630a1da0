"""The layers of the package import one way, and what must stay light stays light."""

import ast
import graphlib
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pisces_jax"

# From the bottom up: a unit (a folder, or a module at the top of the package) imports from its own layer or a
# lower one. A module that is not named here is a command, at the top.
LAYERS = [
    {"__init__", "utils"},
    {"sharding"},
    {"models"},
    {"data", "cross_entropy", "objectives", "flow"},
    {"training", "inference", "evaluation", "weights"},
]
COMMANDS = len(LAYERS)

# The order of layers would allow these, but whoever makes examples knows nothing of who learns from them.
NEVER = {"data": {"models", "sharding", "objectives", "flow"}}


def layer(unit):
    return next((i for i, units in enumerate(LAYERS) if unit in units), COMMANDS)


def unit_of(path):
    if path.stem == "__main__":  # the command of a package is a command
        return f"{path.parent.name}.__main__"
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """(line, dotted name) of everything that the file imports, also inside functions."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imported_unit(name):
    """`pisces_jax.data.example.Text` → "data"; None for a name of another package."""
    package, _, rest = name.partition(".")
    if package != PACKAGE.name:
        return None
    first = rest.partition(".")[0]
    inside = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file()
    return first if first and inside else "__init__"


FILES = sorted(PACKAGE.rglob("*.py"))
EDGES = [
    (path, line, unit_of(path), unit)
    for path in FILES
    for line, name in imports(path)
    if (unit := imported_unit(name)) is not None and unit != unit_of(path)
]


def test_the_package_is_there():
    assert {"models", "data"} <= {unit_of(path) for path in FILES}
    assert any(a == "models" and b == "sharding" for _, _, a, b in EDGES), "no import is found"


def test_imports_go_down():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {a} imports {b}"
        for path, line, a, b in EDGES
        if layer(b) > layer(a) or b in NEVER.get(a, ())
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_unit_imports_itself_by_way_of_another():
    graph = {}
    for _, _, a, b in EDGES:
        graph.setdefault(a, set()).add(b)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize(
    "folder, foreign",
    [
        ("data", {"jax", "jaxlib", "flax", "optax", "orbax", "clu"}),
        ("models", {"grain", "tensorflow_datasets", "PIL", "ml_collections", "orbax", "clu"}),
    ],
)
def test_packages_that_a_layer_does_without(folder, foreign):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for line, name in imports(path)
        if name.partition(".")[0] in foreign
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def run_python(code, *args):
    result = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_data_workers_need_no_jax():
    """With JAX impossible to import, every module of `data` still loads.

    Grain itself imports JAX where it finds it (for its profiler) and goes on where it does not, so "never
    imported" cannot be had; that nothing in a data worker needs it can.
    """
    modules = [name_of(path) for path in FILES if unit_of(path) == "data"]
    run_python(
        "import importlib, sys\n"
        "sys.modules['jax'] = sys.modules['jaxlib'] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)",
        *modules,
    )


COMMAND_MODULES = sorted(name_of(path) for path in FILES if 'if __name__ == "__main__"' in path.read_text())


@pytest.mark.parametrize("module", COMMAND_MODULES)
def test_a_spawned_worker_of_a_command_imports_no_jax(module):
    """What `multiprocessing` does in a new worker of `python -m MODULE` is to import that module again."""
    run_python(
        "import multiprocessing.spawn, sys\n"
        "multiprocessing.spawn._fixup_main_from_name(sys.argv[1])\n"
        "assert '__mp_main__' in sys.modules and 'jax' not in sys.modules",
        module,
    )


def test_nothing_imports_tensorflow():
    """Only the TensorBoard writer does, when it is used; where it is not installed, an attempt counts."""
    modules = [name_of(path) for path in FILES if path.stem != "__main__"]
    run_python(
        "import importlib, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'tensorflow':\n"
        "            tried.append(name)\n"
        "tried = []\n"
        "sys.meta_path.insert(0, Finder())\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'tensorflow' not in sys.modules, f'{name} imports tensorflow'\n"
        "    assert not tried, f'{name} tries to import {tried}'",
        *modules,
    )

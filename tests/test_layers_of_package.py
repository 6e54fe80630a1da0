"""The layers of the package import one way, what must stay light stays light, and no file is too long."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pisces_jax"
COMMANDS = "commands"

# From the bottom up. A unit is a folder or a module at the top of the package. It imports from lower layers only, and
# within its own layer what `SAME_LAYER` allows. Commands are the top layer; a unit with no place here is an error.
LAYERS = [
    {"__init__"},
    {"utils"},
    {"sharding"},
    {"ops"},
    {"models"},
    {"losses", "data", "weights"},
    {"training", "inference", "evaluation", "planning", "shapes_world"},
    {COMMANDS},
]
SAME_LAYER = {
    ("weights", "data"),  # a published folder holds a tokenizer beside the weights
    ("inference", "training"),
    ("planning", "training"),
    ("planning", "inference"),  # it compiles what draws
    ("shapes_world", "evaluation"),
}
# The order would allow these, but what makes examples knows nothing of what learns from them.
NEVER = {"data": {"models", "losses", "sharding", "ops", "weights"}}

FILE_LINES = 400
COMMAND_LINES = 100


def is_command(path):
    """Modules that are run: at the top of the package, or the `__main__` of a folder."""
    return (path.parent == PACKAGE or path.stem == "__main__") and 'if __name__ == "__main__"' in path.read_text()


def unit_of(path):
    return COMMANDS if is_command(path) else path.relative_to(PACKAGE).with_suffix("").parts[0]


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
    first, *others = rest.split(".")
    if (PACKAGE / f"{first}.py").is_file():
        return unit_of(PACKAGE / f"{first}.py")
    if "__main__" in others:
        return COMMANDS
    return first if first and (PACKAGE / first).is_dir() else "__init__"


def layer(unit):
    (found,) = (i for i, units in enumerate(LAYERS) if unit in units)
    return found


def allowed(importer, imported):
    """Whether a file of one unit may import another unit."""
    if imported in NEVER.get(importer, ()):
        return False
    return layer(imported) < layer(importer) or (importer, imported) in SAME_LAYER


FILES = sorted(PACKAGE.rglob("*.py"))
UNITS = {unit_of(path) for path in FILES}
EDGES = sorted(
    {
        (path, line, unit_of(path), unit)
        for path in FILES
        for line, name in imports(path)
        if (unit := imported_unit(name)) is not None and unit != unit_of(path)
    }
)


def test_every_unit_has_a_layer():
    assert UNITS == set().union(*LAYERS)
    assert any(a == "models" and b == "sharding" for _, _, a, b in EDGES), "no import is found"
    assert all(layer(a) == layer(b) for a, b in SAME_LAYER)


def test_what_is_allowed():
    """Examples of the rule, so that it is known to forbid."""
    for a, b in ("models", "ops"), ("planning", "training"), ("weights", "data"), (COMMANDS, "shapes_world"):
        assert allowed(a, b) and not allowed(b, a)
    for a, b in ("data", "models"), ("data", "losses"), ("evaluation", "training"), ("training", "shapes_world"):
        assert not allowed(a, b)
    assert not allowed("utils", "sharding") and not allowed("losses", "weights")


def test_imports_go_down():
    wrong = [f"{path.relative_to(ROOT)}:{line}: {a} imports {b}" for path, line, a, b in EDGES if not allowed(a, b)]
    assert not wrong, "\n" + "\n".join(wrong)


def lines(path):
    return len(path.read_text().splitlines())


def test_files_are_short():
    wrong = {str(path.relative_to(ROOT)): lines(path) for path in FILES if lines(path) > FILE_LINES}
    assert not wrong


def test_commands_are_thin():
    """Flags, one call, output."""
    commands = [path for path in FILES if is_command(path) and path.parent == PACKAGE]
    assert len(commands) > 5
    wrong = {path.name: lines(path) for path in commands if lines(path) >= COMMAND_LINES}
    assert not wrong


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


def test_nothing_private_of_jax_is_imported():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in FILES
        for line, name in imports(path)
        if name.startswith("jax._src")
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def run_python(code, *args):
    result = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_data_workers_need_no_jax():
    """With JAX impossible to import, every module of `data` still loads.

    Grain itself imports JAX where it is installed (for its profiler) and works without it. So JAX is imported all the
    same, but nothing in a data worker needs it.
    """
    modules = [name_of(path) for path in FILES if unit_of(path) == "data"]
    run_python(
        "import importlib, sys\n"
        "sys.modules['jax'] = sys.modules['jaxlib'] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)",
        *modules,
    )


@pytest.mark.parametrize("module", [name_of(path) for path in FILES if is_command(path)])
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

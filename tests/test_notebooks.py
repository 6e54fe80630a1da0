"""The notebooks run from start to end, as they are, and hold their outputs, so that they can be read on the web."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_from_start_to_end(path, tmp_path, request):
    """Its cells in order, in a process of their own; a kernel adds nothing to them but the pictures."""
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in code_cells(path)))
    environment = {**os.environ, "MPLBACKEND": "agg"}
    if path.stem == "shapes":  # which looks into a finished run
        environment["PISCES_WORKDIR"] = f"{request.getfixturevalue('trained')}/run"
    done = subprocess.run(
        [sys.executable, script], cwd=path.parent, env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_saved(path):
    for cell in code_cells(path):
        assert all(output["output_type"] != "error" for output in cell["outputs"])
    outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [cell["execution_count"] for cell in code_cells(path)] == list(range(1, len(code_cells(path)) + 1))

"""Prints the lower bounds of setup.py as exact pins, so that the lowest supported versions can be tested.

python .ci/lowest.py > constraints-lowest.txt
make test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt
"""

import pathlib
import re

SETUP = pathlib.Path(__file__).resolve().parent.parent / "setup.py"

for name, version in re.findall(r'"([\w.-]+)>=([\w.]+)(?:;[^"]*)?"', SETUP.read_text()):
    print(f"{name}=={version}")

#!/usr/bin/env bash
# A line break inside an import makes nbdev's exported module import the package by its absolute name.
#
# Guess, before the run: how an import is wrapped is layout; `from pkg.core import (a, b)` becomes
#   `from .core import ...` in the module, on one line or on four.
# Seen 2026-12-01, nbdev 2.4.14: on one line the import becomes relative, also inside parentheses;
#   with a line break after the parenthesis it stays `from pkg.core import`. So a code formatter on
#   the notebooks (ruff, black) changes what the package imports, where it changes no Python code.
# Hurts: whoever hashes modules to know whether code has changed, and whoever copies or renames the
#   package: some modules of the copy then take their parts from the installed original.
# Here: export cells import in several statements of one line; tests/test_repo.py.
. "$(dirname "$0")/lib.sh"
packages nbdev==2.4.14 fastcore==1.12.47 execnb==0.1.18 ghapi==1.1.1 'setuptools<81'
mkdir -p nbs pkg
cat > settings.ini <<'INI'
[DEFAULT]
repo = pkg
lib_name = pkg
version = 0.0.1
min_python = 3.9
license = apache2
doc_path = _docs
lib_path = pkg
nbs_path = nbs
recursive = True
tst_flags = notest
put_version_in_init = True
branch = main
custom_sidebar = False
doc_host =
doc_baseurl = /
git_url =
title = pkg
audience = Developers
author = a
author_email = a@example.org
copyright = a
description = a
keywords = a
language = English
status = 3
user = a
INI
touch pkg/__init__.py
"$PY" - <<'PYTHON'
import json

CELLS = [
    "#| default_exp more",
    "#| export\nfrom pkg.core import (one, two)",
    "#| export\nfrom pkg.core import (\n    three,\n    four,\n)",
]
cell = lambda k, s: dict(
    cell_type="code", execution_count=None, id=f"c{k}", metadata={}, outputs=[], source=s
)
book = dict(cells=[cell(*c) for c in enumerate(CELLS)], metadata={}, nbformat=4, nbformat_minor=5)
json.dump(book, open("nbs/more.ipynb", "w"))
PYTHON
"$HERE/venv/bin/nbdev_export"
"$PY" - <<'PYTHON'
text = open("pkg/more.py").read()
found = [line for line in text.splitlines() if line.startswith("from ")]
print(*found, sep="\n")
assert found == ["from .core import (one, two)", "from pkg.core import ("], "the behaviour changed"
print("as recorded")
PYTHON

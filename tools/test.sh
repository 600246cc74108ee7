#!/usr/bin/env bash
# Installs the package for development and runs every check. Arguments go to pytest.
# The environment variables PYTHON and VENV are explained in install.sh.
set -euo pipefail

tools=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
venv=$(bash "$tools/install.sh" dev)
cd -- "$tools/.."

check() {
    echo "== $*"
    "$venv/bin/python" -P -m "$@"
}
check ruff check
check ruff format --check
check mypy
# Two processes, a file in one of them: models stream in both. In the order of their names, for short files come last.
check pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

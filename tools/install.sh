#!/usr/bin/env bash
# Usage: install.sh EXTRAS. Installs the package with its extras into a virtual environment, through
# the constraints file, unless nothing has changed since the last time; prints the environment's path.
# PYTHON: the interpreter to make the environment with; VENV: where it is (default .venv).
set -euo pipefail

extras=$1
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
cd -- "$root"

if [[ ! -x $venv/bin/python ]]; then
    echo "== making a virtual environment in $venv" >&2
    "${PYTHON:-python3}" -m venv "$venv" >&2
fi
# The names of the modules and of the page's files count too: a strict editable install does not see a new file by itself.
stamp=$venv/layerstream-$extras.installed
state=$(echo "$root"; cat pyproject.toml constraints.txt; find pipeline stages tools \( -name '*.py' -o -path '*/page/*' \) | sort)
if [[ $(cat "$stamp" 2>/dev/null) != "$state" ]] ||
    ! "$venv/bin/python" -c 'import layerstream.stages.errors' 2>/dev/null; then
    echo "== installing layerstream[$extras] (the first time takes minutes)" >&2
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
        -c constraints.txt -e ".[$extras]" >&2
    echo "$state" >"$stamp"
fi
echo "$venv"

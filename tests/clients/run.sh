#!/usr/bin/env bash
# Tries clients that others wrote on a real server: run.sh [NAME ...], without names all of catalogue.py. The first time,
# each is installed in its pinned version into a folder of its own in ${CLIENTS:-~/.cache/layerstream-clients}, from PyPI
# or npm. PYTHON and VENV as in tools/install.sh, or CLIENTS_PYTHON with all of the extra dev installed. Those for node
# need node 20 or later.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(cd -- "$here/../.." && pwd)
python=${CLIENTS_PYTHON:-$(bash "$root/tools/install.sh" dev)/bin/python}
folder=${CLIENTS:-$HOME/.cache/layerstream-clients}
mkdir -p -- "$folder"
LAYERSTREAM_CLIENTS=$(cd -- "$folder" && pwd)
export LAYERSTREAM_CLIENTS
"$python" "$here/install.py" "$LAYERSTREAM_CLIENTS" "$@"
names=("${@/#/[}")
names=("${names[@]/%/]}")
chosen=$(IFS='|'; echo "${names[*]}" | sed 's/|/ or /g')
cd -- "$root"
if (($#)); then
    exec "$python" -P -m pytest tests/clients -k "$chosen"
fi
exec "$python" -P -m pytest tests/clients

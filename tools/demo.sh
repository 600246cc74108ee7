#!/usr/bin/env bash
# Installs the package and runs the demo: a checkpoint of 1 GB, streamed under a third of that in
# memory. Arguments go to `layerstream demo`: a model's folder or hub id, options; try --help.
# The environment variables PYTHON and VENV are explained in install.sh.
set -euo pipefail

venv=$(bash "$(dirname -- "${BASH_SOURCE[0]}")/install.sh" hf,cli)
exec "$venv/bin/layerstream" demo "$@"

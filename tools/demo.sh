#!/usr/bin/env bash
# Installs the package and runs the demo: a small model from the hub, or a checkpoint of 1 GB where the hub does not answer,
# streamed under a third of its size in memory, beside what the page cache would give. Arguments go to `layerstream demo`: a model's folder or hub id, options; try --help.
# The environment variables PYTHON and VENV are explained in install.sh.
set -euo pipefail

venv=$(bash "$(dirname -- "${BASH_SOURCE[0]}")/install.sh" hf,cli)
exec "$venv/bin/layerstream" demo "$@"

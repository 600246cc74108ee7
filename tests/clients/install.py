"""Installs clients, each into a folder of its own: ``python install.py FOLDER [NAME ...]``. Without names, all of them."""

import json
import subprocess
import sys
import venv
from pathlib import Path

from catalogue import CLIENTS, Client

__all__ = ["main"]


def main() -> int:
    """Install the clients that are named; exit code 2 if one is unknown."""
    folder, *names = sys.argv[1:]
    if unknown := [name for name in names if name not in CLIENTS]:
        sys.stderr.write(f"unknown: {', '.join(unknown)}; there are {', '.join(CLIENTS)}\n")
        return 2
    for name in names or CLIENTS:
        _install(CLIENTS[name], Path(folder, name).resolve(), name)
    return 0


def _install(client: Client, folder: Path, name: str) -> None:
    stamp, wanted = folder / "installed.json", json.dumps(client.packages)
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    sys.stderr.write(f"== installing {name}\n")
    if client.is_node:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--prefix", str(folder), "--no-save", *client.packages]
    else:
        venv.create(folder, with_pip=True)
        command = [str(folder / "bin/python"), "-m", "pip", "install", "-q", *client.packages]
    subprocess.run(command, check=True)
    stamp.write_text(wanted)


if __name__ == "__main__":
    sys.exit(main())

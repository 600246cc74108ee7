"""Stand-ins for what the benchmark compares with: packages, servers and interpreters that tests may not have."""

import sys
from pathlib import Path

__all__ = ["interpreter_with", "llama_server", "program"]

# As AirLLM does: it writes files of its own when it is first opened, and is called like a model.
AIRLLM = """
from pathlib import Path
import transformers

class AutoModel:
    @staticmethod
    def from_pretrained(folder, *, device, layer_shards_saving_path):
        (Path(layer_shards_saving_path) / "split").write_text("layers")
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
"""

LLAMA_SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

if sys.argv[1:] == ["--version"]:
    print("version: 1 (stand-in)", file=sys.stderr)
    sys.exit()
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert open(options["--model"], "rb").read(4) == b"GGUF"

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({"status": "ok"})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply({"timings": {"prompt_n": len(asked["prompt"]), "prompt_ms": 1500.0}})

    def reply(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""


def program(path: Path, code: str) -> Path:
    """An executable at ``path`` that runs the Python ``code`` under our interpreter."""
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(0o755)
    return path


def llama_server(folder: Path) -> Path:
    """A llama-server in ``folder`` that answers as the real one does, after 1.5 seconds as it says."""
    folder.mkdir()
    return program(folder / "llama-server", LLAMA_SERVER)


def interpreter_with(folder: Path, **packages: str) -> Path:
    """Another interpreter, in ``folder``, which has our packages but for layerstream, and ``packages`` beside them."""
    folder.mkdir()
    for name, code in packages.items():
        (folder / f"{name}.py").write_text(code)
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{folder}" exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path

"""Stand-ins for the peers of the benchmark: packages, servers and interpreters that tests may not have."""

import sys
from pathlib import Path

from layerstream.tools.compare.contenders import Contender
from layerstream.tools.compare.rounds import Outcome, Setup, run_rounds

__all__ = [
    "AIRLLM",
    "READY",
    "interpreter_with",
    "make_setup",
    "run_contenders",
    "save_llama_server",
    "save_program",
    "scripted_contender",
]

# As AirLLM does: it writes its own files when first opened, and is called like a model.
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
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply({"timings": {"prompt_n": len(content["prompt"]), "prompt_ms": 1500.0}})

    def reply(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""

# A worker that has opened its model; tests append what it does next.
READY = """
import json, os, signal, sys
def answer(**content):
    print(json.dumps(content), flush=True)
request = json.loads(sys.stdin.readline())
answer(open_seconds=1.0, children=[], notes={}, versions={})
"""


def save_program(path: Path, code: str) -> Path:
    """Write an executable to ``path`` that runs the Python ``code`` with our interpreter."""
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(0o755)
    return path


def save_llama_server(folder: Path) -> Path:
    """Write a llama-server to ``folder`` that answers like the real one, and reports 1.5 seconds per prompt."""
    folder.mkdir()
    return save_program(folder / "llama-server", LLAMA_SERVER)


def interpreter_with(folder: Path, **packages: str) -> Path:
    """Write an interpreter to ``folder`` that has our packages except layerstream, and also ``packages``."""
    folder.mkdir()
    for name, code in packages.items():
        (folder / f"{name}.py").write_text(code)
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{folder}" exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def make_setup(folder: Path) -> Setup:
    """Make a setup for contenders that read no model."""
    (folder / "work").mkdir()
    return Setup(
        model=folder,
        prompt_ids=(1, 2),
        work=folder / "work",
        gguf=None,
        limit_bytes=None,
        cold=True,
        warm=True,
        timeout_seconds=60,
    )


def scripted_contender(folder: Path, name: str, code: str) -> Contender:
    """Make a contender whose interpreter runs ``code`` in place of the worker."""
    return Contender(name=name, opener=name, python=str(save_program(folder / name, code)))


def run_contenders(setup: Setup, *contenders: Contender, rounds: int = 1) -> Outcome:
    """Run ``contenders`` in turn."""
    return run_rounds(contenders, setup, rounds=rounds, advance=lambda _: None)

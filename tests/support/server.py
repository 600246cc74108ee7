"""A real `layerstream serve` process on a free port, and a model for it that says something."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from layerstream.tools.synthetic.byte_tokenizer import BOS, EOS, PAD, VOCAB_SIZE, tokenizer_files
from support.models import save_model

__all__ = ["CONTEXT_TOKENS", "Server", "save_speaking_model", "serving", "until"]

CONTEXT_TOKENS = 8192
_COMMAND = (sys.executable, "-W", "error", "-m", "layerstream.tools.cli", "serve")
_SECONDS = 60  # for what takes one, on a machine with other things to do

_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('The system speaks first.') }}{% endif %}"
    "{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_speaking_model(folder: Path, *, template: bool = True) -> Path:
    """A tiny model of bytes. It prefers ASCII and some of Latin-1, so that its texts are varied."""
    save_model(
        folder,
        "llama",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    tensors = load_file(folder / "model.safetensors")
    spoken = torch.tensor([*range(32, 127), 0xC3, *range(0xA0, 0xB0), EOS])
    head = torch.zeros_like(tensors["lm_head.weight"])
    head[spoken] = tensors["lm_head.weight"][spoken]
    tensors["lm_head.weight"] = head
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    files = tokenizer_files()
    if template:
        files["tokenizer_config.json"]["chat_template"] = _TEMPLATE
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        threading.Event().wait(0.02)


class Server:
    """A server process, and what it has logged."""

    def __init__(self, model: Path, *options: str) -> None:
        self.lines: list[str] = []
        self.url = ""
        self._told = threading.Event()
        self.process = subprocess.Popen(
            [*_COMMAND, str(model), "--device", "cpu", "--port", "0", *options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def ready(self) -> None:
        """Return when it listens."""
        assert self._told.wait(_SECONDS), "the server is not ready"
        assert self.url, self.log

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.lines.append(line)
                if (found := re.search(r"ready on (http://\S+)", line)) is not None:
                    self.url = found[1]
                    self._told.set()
        self._told.set()

    def stop(self) -> int:
        """Have it end as a service manager does; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        code = self.process.wait(_SECONDS)
        self._reader.join(_SECONDS)
        return code


@contextmanager
def serving(model: Path, *options: str) -> Iterator[Server]:
    """A server for as long as the block runs. It has to end well, and to have logged no traceback."""
    server = Server(model, *options)
    try:
        server.ready()
        yield server
        if server.process.poll() is None:
            assert server.stop() == 0, server.log
        assert "Traceback" not in server.log, server.log
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.wait()

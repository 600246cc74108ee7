"""A real `layerstream serve` process on a free port, and a model for it that generates varied text."""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from layerstream.tools.synthetic.byte_tokenizer import BOS, EOS, PAD, VOCAB_SIZE, tokenizer_files
from support.forked import COMMAND, ForkedProcess
from support.models import save_model

__all__ = ["CONTEXT_TOKENS", "Server", "running_server", "save_chat_model", "wait_until"]

CONTEXT_TOKENS = 8192
_TIMEOUT_SECONDS = (
    300  # for operations of a second; on a busy machine pytest's own limit comes first
)

_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('The system speaks first.') }}{% endif %}"
    "{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_chat_model(folder: Path, *, template: bool = True, ends: bool = True) -> Path:
    """Save a tiny model with byte tokens. It generates ASCII and some Latin-1, so that its texts are varied.

    Args:
        folder: Where it is saved.
        template: Whether it has a chat template.
        ends: Whether it ever ends an answer by itself.
    """
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
    printable = torch.tensor([*range(32, 127), 0xC3, *range(0xA0, 0xB0), *([EOS] if ends else [])])
    head = torch.zeros_like(tensors["lm_head.weight"])
    head[printable] = tensors["lm_head.weight"][printable]
    tensors["lm_head.weight"] = head
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    files = tokenizer_files()
    if template:
        files["tokenizer_config.json"]["chat_template"] = _TEMPLATE
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll ``condition``, which another process fulfils."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        threading.Event().wait(0.02)


class Server:
    """A server process, and what it has logged."""

    def __init__(self, model: Path, *options: str) -> None:
        self.lines: list[str] = []
        self.url = ""
        self._started = threading.Event()
        reading, writing = os.pipe()
        self.process = ForkedProcess(
            COMMAND,
            ["serve", model, "--device", "cpu", "--port", "0", *options],
            stdin=0,
            stdout=1,
            stderr=writing,
            environment={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        os.close(writing)
        self._reader = threading.Thread(target=self._read, args=(reading,))
        self._reader.start()

    def wait_until_ready(self) -> None:
        """Wait until it listens."""
        assert self._started.wait(_TIMEOUT_SECONDS), "the server is not ready"
        assert self.url, self.log

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor) as lines:
            for line in lines:
                self.lines.append(line)
                if (found := re.search(r"ready on (http://\S+)", line)) is not None:
                    self.url = found[1]
                    self._started.set()
        self._started.set()

    def stop(self) -> int:
        """Terminate it as a service manager does; returns its exit code."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        """Wait until it has ended; returns its exit code."""
        code = self.process.wait(_TIMEOUT_SECONDS)
        self._reader.join(_TIMEOUT_SECONDS)
        return code


@contextmanager
def running_server(model: Path, *options: str) -> Iterator[Server]:
    """Run a server during the block; checks that it exits with 0, and has logged no traceback."""
    server = Server(model, *options)
    try:
        server.wait_until_ready()
        yield server
        if server.process.poll() is None:
            assert server.stop() == 0, server.log
        assert "Traceback" not in server.log, server.log
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.wait()

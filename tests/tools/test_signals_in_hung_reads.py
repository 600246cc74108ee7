"""A file that hangs, in a system call that no signal interrupts, while a command opens a model: signals still end it."""

import os
import tempfile
from pathlib import Path

import pytest
from support.forked import ForkedProcess
from support.models import save_model

# A mutex that is taken already stands for the hung read: the kernel goes on waiting for it after each signal.
PROGRAM = """
import builtins, ctypes, io, sys
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
usual = io.open

def hanging(file, *args, **options):
    if str(file).endswith(".safetensors"):
        print("hangs", flush=True)
        libc.pthread_mutex_lock(mutex)
    return usual(file, *args, **options)

builtins.open = io.open = hanging
from layerstream.tools.cli import main
sys.exit(main())
"""
COMMANDS = {
    "plan": (),
    "verify": (),
    "generate": ("--prompt", "a"),
    "profile": (),
    "chat": (),
    "convert": ("DST", "--to", "int8"),
    "bench": ("--against", "accelerate"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_ends_a_command_whose_file_hangs(tmp_path: Path, command: str) -> None:
    model = save_model(tmp_path / "model", "llama")
    options = [str(tmp_path / each) if each == "DST" else each for each in COMMANDS[command]]
    reading, writing = os.pipe()
    with tempfile.TemporaryFile("w+") as errors, Path(os.devnull).open() as nothing:
        process = ForkedProcess(
            PROGRAM,
            [command, model, *options],
            stdin=nothing.fileno(),
            stdout=writing,
            stderr=errors.fileno(),
        )
        os.close(writing)
        try:
            with os.fdopen(reading) as output:
                assert output.readline() == "hangs\n"
                process.terminate()
                assert process.wait(30) == 143
        finally:
            process.kill()
        errors.seek(0)
        assert errors.read() == ""

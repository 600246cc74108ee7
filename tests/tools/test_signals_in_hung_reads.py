"""A file that hangs, in a system call that no signal interrupts, while a command opens a model: signals still end it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
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
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, command, str(model), *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "hangs\n"
            process.send_signal(signal.SIGTERM)
            _, error = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, error) == (143, "")

"""``layerstream chat``, in a real terminal and without one."""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import transformers
from support.forked import run_forked
from support.models import save_model
from support.server import save_chat_model
from support.terminal import Terminal, in_terminal

from layerstream.tools.cli import main

SIZES = ("--host", "36MiB", "--reader", "direct", "--device", "cpu", "--prompt-tokens", "64")
SHORT = (*SIZES, "--max-new-tokens", "8", "--greedy")
LONG = (*SIZES, "--max-new-tokens", "2000", "--greedy")
WITHOUT_RICH = (
    "import sys; sys.modules['rich'] = None\n"
    "from layerstream.tools.cli import main; sys.exit(main())"
)
SUMMARY = r"\((\d+) tokens, the first after [^)]+ \(expected [^)]+\), then [\d.]+ tokens/s; ([\d.]+) tokens per sweep\)"
ENTERED = r">>> "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def answers(model: Path) -> "Answers":
    return Answers(model)


class Answers:
    """What transformers answers, the model not streamed."""

    def __init__(self, model: Path) -> None:
        self._model = transformers.LlamaForCausalLM.from_pretrained(model)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def __call__(self, *messages: str, system: str | None = None, count: int = 8) -> str:
        said = [] if system is None else [{"role": "system", "content": system}]
        for number, text in enumerate(messages):
            said.append({"role": "assistant" if number % 2 else "user", "content": text})
        text = self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        ids = self._tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        made = self._model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]
        return str(self._tokenizer.decode(made, skip_special_tokens=True))


@contextmanager
def chatting(model: Path, *options: str, program: str | None = None) -> Iterator[Terminal]:
    """A chat that waits for the first message."""
    with in_terminal("chat", model, *options, program=program) as terminal:
        terminal.expect("/help lists the commands")
        terminal.expect(ENTERED)
        yield terminal


def say(terminal: Terminal, text: str) -> str:
    """Type a message, wait for the answer and the next prompt; returns what was shown between."""
    before = len(terminal.text)
    terminal.type(text + "\n")
    terminal.expect(SUMMARY)
    terminal.expect(ENTERED)
    return terminal.text[before:]


def piped(model: Path, text: str | bytes, *options: str) -> subprocess.CompletedProcess[str]:
    return run_forked("chat", model, *options, text=text)


# -- in a terminal ---------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [None, WITHOUT_RICH], ids=["with rich", "without rich"])
def test_an_answer_is_that_of_the_whole_conversation(
    model: Path, answers: Answers, program: str | None
) -> None:
    with chatting(model, *SHORT, program=program) as terminal:
        first = answers("Hello")
        assert first in say(terminal, "Hello")
        assert answers("Hello", first, "Go on") in say(terminal, "Go on")
        terminal.type("\x04")
        assert terminal.end() == 0


def test_each_answer_ends_with_its_tokens_per_second_and_per_sweep(model: Path) -> None:
    with chatting(model, *SHORT) as terminal:
        shown = say(terminal, "Hello")
        found = re.search(SUMMARY, shown)
        assert found is not None
        assert (int(found[1]), float(found[2])) == (8, 1.0)


def test_commands_reset_and_instruct_and_save(
    model: Path, answers: Answers, tmp_path: Path
) -> None:
    saved = tmp_path / "saved.json"
    with chatting(model, *SHORT) as terminal:
        terminal.type("/help\n")
        for command in ("/help", "/reset", "/system", "/save", "/stats", "/exit"):
            terminal.expect(f"\n{command} ")
        say(terminal, "Hello")
        terminal.type("/reset\n")
        terminal.expect("forgotten")
        terminal.type("/system Be brief.\n")
        terminal.expect("the model is told: Be brief")
        terminal.expect(ENTERED)
        answer = answers("Hello", system="Be brief.")
        assert answer in say(terminal, "Hello")
        terminal.type("/stats\n")
        terminal.expect("What each stage did")
        terminal.expect("16 tokens in 16 sweeps: 1.00 tokens per sweep")
        terminal.expect("memory: .* added by the model, of a host budget of 36 MiB")
        terminal.type(f"/save {saved}\n")
        terminal.expect("saved in")
        terminal.type("/unknown\n")
        terminal.expect("There is no command /unknown")
        terminal.type("/exit\n")
        assert terminal.end() == 0
    assert json.loads(saved.read_text())["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": answer},
    ]


def test_a_file_of_somebody_else_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("kept")
    result = piped(model, f"/save {other}\n", *SHORT)
    assert (result.returncode, other.read_text()) == (1, "kept")
    assert "exists; choose another name" in result.stderr


def test_a_message_may_have_several_lines(model: Path, answers: Answers) -> None:
    with chatting(model, *SHORT) as terminal:
        assert answers("a\nb") in say(terminal, "a\\\nb")
        terminal.type("/reset\n")
        terminal.expect(ENTERED)
        assert answers("a\n\nb") in say(terminal, '"""a\n\nb"""')


def test_pasted_lines_are_one_message(model: Path, answers: Answers) -> None:
    with chatting(model, *SHORT) as terminal:
        assert answers("a\nb") in say(terminal, "\x1b[200~a\nb\x1b[201~")
        terminal.type("/reset\n")
        terminal.expect(ENTERED)
        assert answers("größe 漢字 🙂") in say(terminal, "größe 漢字 🙂")


def test_in_a_narrow_terminal_what_is_waited_for_takes_one_line() -> None:
    program = (
        "from layerstream.tools.console.chat_terminal import ChatTerminal\n"
        "terminal = ChatTerminal(); terminal.wait('a long line of words'); input(); terminal.wait('another one of them')"
    )
    with in_terminal(program=program) as terminal:
        terminal.expect(r"\(a long line of words\)")
        terminal.resize(columns=12)
        terminal.type("\n")
        terminal.expect(r"\(another on")
        assert terminal.end() == 0
        assert terminal.text.endswith("(another on")


def test_ctrl_c_stops_the_answer_and_not_the_chat(tmp_path: Path) -> None:
    endless = save_chat_model(tmp_path / "model", ends=False)
    with chatting(endless, *LONG) as terminal:
        terminal.type("Hello\n")
        terminal.expect("Hello\n.{20}")
        terminal.type("\x03")
        found = terminal.expect(r"\(stopped; (\d+) tokens")
        assert 0 < int(found[1]) < 2000
        terminal.expect(ENTERED)
        terminal.interrupt_prompt("ends the chat")
        terminal.expect(ENTERED)
        terminal.type("Again\n")
        terminal.expect("Again\n.{20}")
        terminal.type("\x03")
        terminal.expect(r"\(stopped; ")
        terminal.expect(
            ENTERED
        )  # typed before readline reads keys, Ctrl-D is no end of input to it
        terminal.type("\x04")
        assert terminal.end() == 0


# -- without one -----------------------------------------------------------------------------------


def test_without_a_terminal_lines_are_read_and_answers_alone_go_to_stdout(
    model: Path, answers: Answers
) -> None:
    result = piped(model, "Hello\nGo on\n", *SHORT)
    first = answers("Hello")
    assert result.stdout == f"{first}\n{answers('Hello', first, 'Go on')}\n"
    assert (result.returncode, len(re.findall(SUMMARY, result.stderr))) == (0, 2)


def test_bytes_that_are_no_text_end_nothing(model: Path) -> None:
    result = piped(model, b"\xff\xfe\n", *SHORT)
    assert result.returncode == 0, result.stderr


def test_a_failed_message_without_a_terminal_is_an_error_and_the_next_is_answered(
    model: Path, answers: Answers
) -> None:
    result = piped(model, "/no\nHello\n", *SHORT)
    assert (result.returncode, result.stdout) == (1, f"{answers('Hello')}\n")
    assert result.stderr.startswith("layerstream: error: There is no command /no; /help lists them")


def test_a_conversation_beyond_the_context_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    for path in model.iterdir():
        (small / path.name).write_bytes(path.read_bytes())
    config = json.loads((small / "config.json").read_text())
    config["max_position_embeddings"] = 40
    (small / "config.json").write_text(json.dumps(config))
    result = piped(small, f"{'x' * 50}\nHi\n", *SHORT)
    assert result.returncode == 1
    assert "and this model reads 40 at most; /reset begins a new one" in result.stderr
    assert re.search(SUMMARY, result.stderr)


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_model_without_a_chat_template_is_refused_before_it_is_opened(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_chat_model(tmp_path / "model", template=False)
    options = ["--prompt", "a", "--chat"] if command == "generate" else []
    assert main([command, str(folder), *options]) == 1
    assert "has no chat template, so it is no model to talk to" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    assert main(["chat", str(folder)]) == 1
    assert "has no tokenizer, which a chat needs" in capsys.readouterr().err


def test_generate_applies_the_template_once(
    model: Path, answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max-new-tokens", "8", "--device", "cpu", "--chat"]
    assert main(["generate", str(model), "--prompt", "Hello", *options]) == 0
    assert capsys.readouterr().out == f"{answers('Hello')}\n"
    assert main(["generate", str(model), "--prompt-ids", "1,2", *options]) == 1
    assert "leave out --prompt-ids" in capsys.readouterr().err

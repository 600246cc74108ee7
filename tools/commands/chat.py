"""``layerstream chat``: talk to a model whose weights stream."""

import argparse
import json
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerstream.stages.errors import LayerstreamError, ModelError
from layerstream.stages.text import format_bytes, format_seconds
from layerstream.tools.console.arguments import (
    MODEL_HELP,
    add_dtype_argument,
    add_generation_arguments,
    add_model_arguments,
    add_verify_argument,
    positive_int,
)
from layerstream.tools.console.chat_terminal import ChatTerminal
from layerstream.tools.console.files import naming
from layerstream.tools.console.progress import waiting
from layerstream.tools.console.signals import end_on_signals
from layerstream.tools.console.tables import print_table
from layerstream.tools.console.token_text import TerminalText
from layerstream.tools.running.adapters import add_adapter_arguments, find_model, tokenizer_of
from layerstream.tools.running.answer_times import Stopwatch, first_token_seconds
from layerstream.tools.running.chat_model import (
    Answering,
    ChatModel,
    chat_options,
    opened_for_chat,
)
from layerstream.tools.running.context import context_in
from layerstream.tools.running.conversation import Conversation
from layerstream.tools.running.generation import STAGE_COLUMNS, check_generates, stage_rows
from layerstream.tools.running.read_ahead import reading_ahead
from layerstream.tools.running.speculation import add_speculation_argument, load_speculation

if TYPE_CHECKING:
    from layerstream.pipeline.machine.measurement import Input

__all__ = ["HELP", "add_arguments", "run"]

HELP = "talk to a model whose weights stream"

_WAIT_SECONDS = 0.5  # between two updates of the line about the first token
_IMPATIENT_SECONDS = (
    2.0  # from the first Ctrl-C, which may be pressed twice, to one that is meant otherwise
)
_ENDS = ("/exit", "/quit", "/bye")
_HELP_TEXT = '''\
/help           this
/reset          forget what was said
/system [TEXT]  tell the model TEXT before all else from now on; without TEXT show what it is told
/save FILE      write the conversation to FILE, as JSON
/stats          what the machine has done so far
/exit           end, as Ctrl-D does
""" begins and ends a message of several lines; a line that ends with \\ goes on in the next.
A message that begins with / needs a blank before it. Ctrl-C stops an answer.'''


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("model", metavar="PATH", help=MODEL_HELP)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before all else")
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja template instead of the model's"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=positive_int,
        default=1024,
        metavar="N",
        help="length of the conversation that memory is reserved for; a longer one takes what is left (default: 1024)",
    )
    add_generation_arguments(parser, max_new_tokens=512, greedy=False)
    add_adapter_arguments(parser, named=False)
    add_speculation_argument(parser)
    add_model_arguments(parser)
    add_dtype_argument(parser)
    add_verify_argument(parser)
    parser.add_argument("--verbose", action="store_true", help="log what happens to stderr")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    template = None if args.chat_template is None else args.chat_template.read_text("utf-8")
    sources = find_model(args)
    path = sources.model
    with ExitStack() as stack:
        with reading_ahead(args):
            tokenizer = tokenizer_of(sources)
            conversation = Conversation(tokenizer, path=path, template=template, system=args.system)
            conversation.prompt("a")  # a model that cannot chat is refused before it is opened
            speculation = load_speculation(args.speculate, device=args.device)
            with waiting("opening the model"):
                model = stack.enter_context(opened_for_chat(sources, args))
        check_generates(model.model.module, path)
        options = chat_options(model.model, args, speculation)
        return _Chat(model, tokenizer, conversation, options, name=args.model).run()


class _Chat:
    """The loop of reading and answering."""

    def __init__(
        self,
        model: ChatModel,
        tokenizer: Any,
        conversation: Conversation,
        options: dict[str, Any],
        *,
        name: str,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._conversation = conversation
        self._options = options
        self._name = name
        self._terminal = ChatTerminal()
        self._saved: set[Path] = set()

    def run(self) -> int:
        """Answer until the input ends; returns the exit code: 1 if a message without a terminal has failed."""
        terminal, failed = self._terminal, False
        if terminal.interactive:
            terminal.note(self._welcome())
        with terminal.interrupts():
            while True:
                try:
                    text = terminal.read()
                    if text is None or text.strip() in _ENDS:
                        break
                    self._handle(text)
                except KeyboardInterrupt:
                    print("\n(Ctrl-D or /exit ends the chat)")
                except (LayerstreamError, OSError) as error:
                    failed = True
                    terminal.note(f"layerstream: error: {' '.join(str(error).split())}")
        return int(failed and not terminal.interactive)

    def _welcome(self) -> str:
        plan = self._model.model.plan
        step = plan.prediction.decode.seconds
        size = format_bytes(plan.disk_bytes_per_sweep + plan.expert_bytes_per_step)
        mapped = plan.reader == "mmap"
        reads = f"reads {size}{' in mapped files' if mapped else ''}"
        return (
            f"{self._name}: every token {reads}, and is expected to take {format_seconds(step)}"
            f"{_doubt(plan.inputs)}.\n/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends."
        )

    def _handle(self, text: str) -> None:
        if not text.strip():
            return
        if not text.startswith("/"):
            self._answer(text.removeprefix(" ") if text.startswith(" /") else text)
            return
        command, _, argument = text.partition(" ")
        commands = {
            "/help": lambda _: print(_HELP_TEXT),
            "/reset": self._reset,
            "/system": self._system,
            "/save": self._save,
            "/stats": self._stats,
        }
        if command not in commands:
            raise ModelError(
                f"There is no command {command}; /help lists them. Put a blank before a message that begins with /."
            )
        commands[command](argument.strip())

    # -- commands ----------------------------------------------------------------------------------

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._terminal.note("(forgotten)")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = text
        told = self._conversation.system
        self._terminal.note(
            f"(the model is told: {told})" if told else "(the model is told nothing)"
        )

    def _save(self, name: str) -> None:
        if not name:
            raise ModelError("/save needs the name of a file.")
        path = Path(name).expanduser()
        if path.exists() and path.resolve() not in self._saved:
            raise ModelError(f"{path} exists; choose another name, or remove it first.")
        saved = {"model": self._name, "messages": self._conversation.messages}
        text = json.dumps(saved, indent=2, ensure_ascii=False) + "\n"
        with naming(path):
            path.write_text(text, encoding="utf-8")
        self._saved.add(path.resolve())
        self._terminal.note(f"(saved in {path})")

    def _stats(self, _: str) -> None:
        stats, timings = self._model.stats(), self._model.timings()
        print_table("What each stage did", STAGE_COLUMNS, stage_rows(timings.stages))
        print(
            f"{stats.tokens_generated} tokens in {stats.sweeps} sweeps: {stats.tokens_per_sweep:.2f} tokens per sweep, "
            f"{format_bytes(stats.bytes_per_token)} read for each"
        )
        if stats.experts_wanted:
            share = stats.expert_hits / stats.experts_wanted
            print(f"experts: {share:.0%} of {stats.experts_wanted} were in memory")
        if (added_bytes := self._model.added_bytes()) is not None:
            budget = format_bytes(self._model.model.plan.host_memory.budget_bytes)
            print(
                f"memory: {format_bytes(added_bytes)} added by the model, of a host budget of {budget}"
            )

    # -- answering ---------------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        prompt = self._conversation.prompt(text)
        options = self._options | {"max_new_tokens": self._new_tokens(len(prompt))}
        timings = self._model.timings()
        expected = first_token_seconds(
            self._model.model.plan,
            prompt_tokens=len(prompt),
            sweeps=timings.sweeps,
            forecast=timings.forecast,
        )
        watch, interrupts = Stopwatch(), _Interrupts()
        with self._terminal.on_interrupt(interrupts):
            answering = self._model.answer(prompt, options)
            interrupts.watch(answering)
            tokens = self._show(answering, watch, interrupts, expected_seconds=expected)
        if answering.error is not None:
            print()
            raise answering.error
        if tokens:
            said = self._tokenizer.decode(tokens, skip_special_tokens=True)
            self._conversation.add(text, said)
        print()
        self._terminal.note(_summary(watch, answering.sweeps, expected, stopped=interrupts.came))

    def _show(
        self,
        answering: Answering,
        watch: Stopwatch,
        interrupts: "_Interrupts",
        *,
        expected_seconds: float,
    ) -> list[int]:
        """Show the answer as it comes; returns its tokens, without that which ends it."""
        text, tokens = TerminalText(self._tokenizer), list[int]()
        ends = self._options["eos_token_id"] or []
        while True:
            try:
                token = answering.next(_WAIT_SECONDS)
            except TimeoutError:
                passed, due = format_seconds(watch.waited_seconds), format_seconds(expected_seconds)
                if interrupts.came:
                    self._terminal.wait("stopping at the next layer; Ctrl-C again ends the chat")
                elif not watch.tokens:
                    self._terminal.wait(f"first token: {passed} of about {due}")
                continue
            if token is None:
                self._terminal.write(text.finish())
                self._terminal.waited()
                return tokens
            watch.token()
            if token not in ends:
                tokens.append(token)
                self._terminal.write(text.add(token))

    def _new_tokens(self, prompt_tokens: int) -> int:
        """The most tokens of an answer, by the arguments and by the model's context."""
        most: int = self._options["max_new_tokens"]
        context = context_in(self._model.model.module.config.get_text_config().to_dict())
        if context is None:
            return most
        if prompt_tokens >= context:
            raise ModelError(
                f"The conversation has {prompt_tokens} tokens, and this model reads {context} at most; /reset begins "
                "a new one."
            )
        return min(most, context - prompt_tokens)


class _Interrupts:
    """Stops an answer at Ctrl-C. That may take as long as a layer computes, so another one ends the program, but not at once."""

    def __init__(self) -> None:
        self._answering: Answering | None = None
        self._first_seconds: float | None = None

    @property
    def came(self) -> bool:
        """Whether there was one."""
        return self._first_seconds is not None

    def watch(self, answering: Answering) -> None:
        """Stop ``answering`` at the next one, or now if one has come."""
        self._answering = answering
        if self.came:
            answering.stop()

    def __call__(self) -> None:
        now = time.monotonic()
        if self._first_seconds is None:
            self._first_seconds = now
        if self._answering is not None:
            self._answering.stop()
        if now - self._first_seconds > _IMPATIENT_SECONDS:
            end_on_signals()
            signal.raise_signal(signal.SIGINT)


def _summary(watch: Stopwatch, sweeps: int, expected: float, *, stopped: bool) -> str:
    if watch.first_seconds is None:
        return "(stopped before the first token)" if stopped else "(no answer)"
    per_sweep = watch.tokens / max(sweeps, 1)
    return (
        f"({'stopped; ' if stopped else ''}{watch.tokens} tokens, the first after {format_seconds(watch.first_seconds)} "
        f"(expected {format_seconds(expected)}), then {watch.tokens_per_second:.2f} tokens/s; "
        f"{per_sweep:.2f} tokens per sweep)"
    )


def _doubt(inputs: Sequence["Input"]) -> str:
    """A remark if what the expectation depends on was measured on a busy machine."""
    origins = {each.origin for each in inputs}
    if "contended" in origins:
        return " (measured while others kept this machine busy: the first answers will correct it)"
    return " (as assumed, not measured)" if "assumed" in origins else ""

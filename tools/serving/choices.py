"""What is to be generated for a request: its choices, each with its own sampling, limits and end."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from layerstream.pipeline import AdmissionError, StreamedModel
from layerstream.tools.running.speculation import Speculation
from layerstream.tools.serving.answer_parser import AnswerParser
from layerstream.tools.serving.generation import Choice, generation_arguments
from layerstream.tools.serving.limits import Limits
from layerstream.tools.serving.prompts import Prompts
from layerstream.tools.serving.protocol import ChatRequest, CompletionRequest
from layerstream.tools.serving.sampling import end_tokens, logits_processors, sampling_options

__all__ = ["ApiRequest", "Choices"]

# OpenAI's default for text completions.
_COMPLETION_TOKENS = 16

ApiRequest = ChatRequest | CompletionRequest


class Choices:
    """Makes the choices of requests.

    Args:
        model: The model, open.
        tokenizer: The model's tokenizer.
        prompts: Checks token ids.
        limits: How many tokens a request may have.
        response_template: Tells the parts of a chat's answer; None if the model has none.
        speculation: How tokens are guessed; None for one token in each sweep.
        adapters: Names of adapters that requests may ask for in place of the model's.
    """

    def __init__(
        self,
        model: StreamedModel,
        tokenizer: Any,
        prompts: Prompts,
        limits: Limits,
        *,
        response_template: Any | None,
        speculation: Speculation | None = None,
        adapters: Collection[str] = (),
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._limits = limits
        self._response_template = response_template
        self._speculation = speculation
        self._adapters = adapters

    def adapter(self, name: str) -> str | None:
        """The adapter that requests to the model called ``name`` use."""
        return name if name in self._adapters else None

    def __call__(self, request: ApiRequest, prompts: Sequence[Sequence[int]]) -> list[Choice]:
        """The answers to generate, ordered by prompt."""
        settings = self._model.module.generation_config
        self._prompts.check_tokens([*request.biases, *request.stop_token_ids])
        answers = [(prompt, number) for prompt in prompts for number in range(request.n)]
        # A seed promises the tokens that transformers would draw, one after the other.
        speculates = request.speculate and request.seed is None and request.logprob_count is None
        choices = [
            Choice(
                index=index,
                prompt=prompt,
                new_tokens=self._new_tokens(request, prompt),
                stops=request.stops,
                ends=end_tokens(request, settings),
                sampling=sampling_options(
                    request, settings, device=self._model.plan.device, number=number
                ),
                processors=logits_processors(request, prompt_tokens=len(prompt)),
                logprobs=request.logprob_count,
                echo=self._echo(request, index // request.n, prompt),
                adapter=self.adapter(request.model),
                new_parser=self._parser(request, prompt),
                single_call=isinstance(request, ChatRequest) and not request.parallel_tool_calls,
                speculation=self._speculation if speculates else None,
            )
            for index, (prompt, number) in enumerate(answers)
        ]
        # What is refused for good has a status of its own, since nothing was sent yet.
        return [self._checked(choice) for choice in choices]

    def _checked(self, choice: Choice) -> Choice:
        """Check that ``choice`` will be admitted, without speculation if that takes too much memory."""
        try:
            self._model.check(**generation_arguments(self._model, self._tokenizer, choice))
        except AdmissionError:
            if choice.speculation is None:
                raise
            return self._checked(replace(choice, speculation=None))
        return choice

    def _new_tokens(self, request: ApiRequest, prompt: Sequence[int]) -> int:
        asked, chat = request.max_new_tokens, isinstance(request, ChatRequest)
        if not chat and asked is None:
            asked = min(_COMPLETION_TOKENS, max(1, self._limits.context - len(prompt)))
        param = "messages" if chat else "prompt"
        return self._limits.new_tokens(len(prompt), asked=asked, param=param)

    def _parser(
        self, request: ApiRequest, prompt: Sequence[int]
    ) -> Callable[[], AnswerParser] | None:
        """Makes the parsers of answers to a chat, if the model has a response template."""
        if not isinstance(request, ChatRequest) or self._response_template is None:
            return None
        template, prefix = self._response_template, str(self._tokenizer.decode(prompt))
        return partial(AnswerParser, template, prefix=prefix, tools=request.offered_tools)

    def _echo(self, request: ApiRequest, number: int, prompt: Sequence[int]) -> str | None:
        """The text of prompt ``number`` if the answer begins with it."""
        if not isinstance(request, CompletionRequest) or not request.echo:
            return None
        given = request.prompt if isinstance(request.prompt, str) else request.prompt[number]
        decoded = self._tokenizer.decode(prompt, skip_special_tokens=True)
        return given if isinstance(given, str) else str(decoded)

"""``quire chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from quire.cli.options import (
    Dtype,
    EngineArgs,
    EngineOptions,
    MaxModelLen,
    MaxTokens,
    Model,
    SamplingArgs,
    SamplingOptions,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from quire.errors import InvalidRequestError

if TYPE_CHECKING:
    from quire.llm import LLM
    from quire.sampling_params import SamplingParams

HELP = "/reset forgets the conversation, /exit ends it; Ctrl-C stops an answer"


class Conversation:
    """The messages so far, and what the model says next.

    Parameters
    ----------
    llm : LLM
        Must have a chat template.
    params : SamplingParams
        For every answer, of which there is one: ``n`` must be 1.
    system : str, optional
        The system message that every conversation begins with.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        self._llm = llm
        self._params = params
        self._system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said."""
        self.messages = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})

    def answer(self, text: str) -> Generator[str, None, None]:
        """Say ``text`` and yield the pieces of the answer as they come.

        What the model said until the generator was closed is kept; a message that got no answer
        is not.

        Raises
        ------
        InvalidRequestError
            The conversation no longer fits, or the template refuses it.
        """
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            token_ids = self._llm.llm_engine.processor.render_chat(
                self.messages, chat_template=self._llm.config.model.chat_template
            )
            with self._llm.stream({"prompt_token_ids": token_ids}, self._params) as stream:
                for output in stream:
                    pieces.append(output.outputs[0].text)
                    yield pieces[-1]
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages.pop()


def chat(
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    engine_arg: EngineArgs = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    sampling_arg: SamplingArgs = None,
) -> None:
    """Talk with a model. Lines that are piped in are turns of the conversation."""
    engine = EngineOptions(
        model=model, dtype=dtype, max_model_len=max_model_len, engine_args=engine_arg
    )
    sampling = SamplingOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop,
        sampling_args=sampling_arg,
    )
    with engine.make_llm() as llm:
        params = sampling.make_params(llm)
        if params.n > 1:
            raise typer.BadParameter(
                f"n must be 1 in a chat, which goes on from one answer, got {params.n}",
                param_hint="--sampling-arg",
            )
        conversation = Conversation(llm, params, system)
        for line in _turns():
            if line == "/exit":
                break
            if line == "/reset":
                conversation.reset()
            elif line.startswith("/"):
                typer.echo(HELP, err=True)
            else:
                _say(conversation, line)


def _turns() -> Iterator[str]:
    """Yield what the user types, without empty lines, until the input ends."""
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  line editing and history in input()
        typer.echo(HELP, err=True)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            typer.echo()
            break
        if line:
            yield line


def _say(conversation: Conversation, text: str) -> None:
    pieces = conversation.answer(text)
    try:
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()
    except KeyboardInterrupt:
        pieces.close()
        typer.echo(" [stopped]")
    except InvalidRequestError as error:
        typer.echo(f"error: {error}\n{HELP}", err=True)

"""``quire chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from quire.cli.options import (
    ApiKey,
    Dtype,
    EngineArgs,
    EngineOptions,
    Lora,
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
    Url,
    make_speaker,
)
from quire.cli.remote import RemoteError
from quire.errors import InvalidRequestError

if TYPE_CHECKING:
    from quire.cli.speaker import Piece, Speaker

HELP = "/reset forgets the conversation, /exit ends it; Ctrl-C stops an answer"


class Conversation:
    """The messages so far, and what the model says next.

    Parameters
    ----------
    speaker : Speaker
        Gives one answer at a time.
    system : str, optional
        The system message that every conversation begins with.
    """

    def __init__(self, speaker: Speaker, system: str | None = None) -> None:
        self._speaker = speaker
        self._system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said."""
        self.messages = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})

    def answer(self, text: str) -> Generator[Piece, None, None]:
        """Say ``text`` and yield the pieces of the answer as they come.

        What the model said until the generator was closed is kept; a message that got no answer
        is not.

        Raises
        ------
        InvalidRequestError
            The conversation no longer fits, or the template refuses it.
        """
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            with closing(self._speaker.answer(self.messages)) as pieces:
                for piece in pieces:
                    if not piece.is_reasoning:
                        said.append(piece.text)
                    yield piece
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": "".join(said)})
            else:
                self.messages.pop()


def chat(
    model: Model = None,
    lora: Lora = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    url: Url = None,
    api_key: ApiKey = None,
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
        model=model,
        dtype=dtype,
        max_model_len=max_model_len,
        engine_args=engine_arg,
        lora=lora,
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
    with make_speaker(engine, sampling, url, api_key) as speaker:
        if speaker.num_completions > 1:
            raise typer.BadParameter(
                "n must be 1 in a chat, which goes on from one answer, "
                f"got {speaker.num_completions}",
                param_hint="--sampling-arg",
            )
        conversation = Conversation(speaker, system)
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
    reasoned = False
    try:
        for piece in pieces:
            if reasoned and not piece.is_reasoning:
                typer.echo("\n")
            reasoned = piece.is_reasoning
            typer.secho(piece.text, nl=False, dim=reasoned or None)
        typer.echo()
    except KeyboardInterrupt:
        pieces.close()
        typer.echo(" [stopped]")
    except InvalidRequestError as error:
        typer.echo(f"error: {error}\n{HELP}", err=True)
    except RemoteError as error:
        # Whoever types may wait for the server; what is piped in would be lost line by line.
        if not sys.stdin.isatty():
            raise
        typer.echo(f"error: {error}", err=True)

"""The command line of ``quire serve`` and ``python -m quire.server``."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

app = typer.Typer(
    name="quire serve", add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True
)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A folder, a name on the hub, or quire/demo.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on; 0 takes a free one.")] = 8000,
) -> None:
    """Serve a model over HTTP, in the way that OpenAI's clients speak."""
    asyncio.run(_serve(model, host, port))


async def _serve(model: str, host: str, port: int) -> None:
    import uvicorn

    from quire.async_llm import AsyncLLM
    from quire.server.app import build_app
    from quire.server.service import Service
    from quire.server.settings import ServerSettings

    async with AsyncLLM(model) as llm:
        settings = ServerSettings(served_model_names=(model,))
        service = Service(llm, settings, await llm.get_tokenizer())
        config = uvicorn.Config(build_app(service), host=host, port=port, log_level="info")
        await uvicorn.Server(config).serve()

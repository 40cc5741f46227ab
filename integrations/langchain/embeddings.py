"""VLLMEmbeddings: LangChain's embeddings on an engine in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.embeddings import Embeddings
from pydantic import field_validator

from quire.integrations.langchain.adapter_holder import AdapterHolder
from quire.integrations.langchain.engine_holder import no_flag
from quire.utils.checks import refuse

if TYPE_CHECKING:
    from quire.async_llm import AsyncLLM
    from quire.pooling_params import PoolingParams


class VLLMEmbeddings(AdapterHolder, Embeddings):
    """Texts as vectors: the hidden states of a model on quire's engine, pooled.

    The engine is made with the object, or shared with every other object that asks for the same
    checkpoint and engine arguments. All texts of a call run as one batch.

    Parameters
    ----------
    model, tensor_parallel_size, trust_remote_code, dtype, download_dir, vllm_kwargs, client
        Which engine, as for :class:`~quire.integrations.langchain.vllm.VLLM`.
    pooling : {"last", "mean", "cls"}, optional
        Which hidden states become the vector: of the last token, the mean of all, or of the first
        token. Left out, it is what the engine takes for the model's.
    normalize : bool, default True
        Make each vector one of length 1.
    dimensions : int, optional
        Keep only so many numbers of each vector, for models that were trained for that.
    truncate_prompt_tokens : int, optional
        Keep only so many of each text's last tokens; -1 as many as there is room for.
    query_prefix, document_prefix : str, default ""
        Written before each query and each document, as many models want it: ``"query: "``.
    lora_request : LoRARequest or str, optional
        The adapter to run with, as for ``VLLM``.
    show_progress : bool, default False
        Show a progress bar while documents are embedded.

    Raises
    ------
    TypeError
        For an argument that does not exist; the message has the nearest.
    InvalidRequestError
        For parameters out of their range.
    ConfigError, ModelNotFoundError, ModelLoadError, OutOfMemoryError
        As from :class:`quire.LLM`.

    Examples
    --------
    >>> from quire.integrations.langchain import VLLMEmbeddings
    >>> embeddings = VLLMEmbeddings(model="quire/demo", pooling="mean")
    >>> vector = embeddings.embed_query("What is the capital of France?")
    >>> round(sum(x * x for x in vector), 3)
    1.0
    """

    pooling: Literal["last", "mean", "cls"] | None = None
    normalize: bool = True
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None
    query_prefix: str = ""
    document_prefix: str = ""
    show_progress: bool = False

    @field_validator("dimensions", "truncate_prompt_tokens", mode="before")
    @classmethod
    def _no_number(cls, value: Any) -> Any:
        return no_flag(value)

    def _check_fields(self) -> None:
        super()._check_fields()
        self._pooling_params()

    def _pooling_params(self) -> PoolingParams:
        from quire.pooling_params import PoolingParams

        return PoolingParams(
            pooling=self.pooling,
            normalize=self.normalize,
            dimensions=self.dimensions,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
        )

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return a vector per text, as one batch of the engine.

        Parameters
        ----------
        texts : list of str

        Returns
        -------
        list of list of float

        Raises
        ------
        InvalidRequestError
            For what is no text, and one that is too long; the message has its index.
        """
        return self._embed(_prefixed("texts", self.document_prefix, texts), self.show_progress)

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a text that documents are looked up for."""
        [vector] = self._embed(_prefixed("text", self.query_prefix, [text]), False)
        return vector

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return a vector per text, together with all else that runs."""
        return await self._aembed(_prefixed("texts", self.document_prefix, texts))

    async def aembed_query(self, text: str) -> list[float]:
        """Return the vector of a text that documents are looked up for."""
        [vector] = await self._aembed(_prefixed("text", self.query_prefix, [text]))
        return vector

    def _embed(self, prompts: list[str], use_tqdm: bool) -> list[list[float]]:
        llm = self._open_lease().llm
        if not prompts:
            return []
        adapter = self._found_own()  # one for all, also if it changes meanwhile
        outputs = llm.embed(
            prompts, self._pooling_params(), use_tqdm=use_tqdm, lora_request=adapter
        )
        return [output.outputs.embedding for output in outputs]

    async def _aembed(self, prompts: list[str]) -> list[list[float]]:
        engine = self._open_lease().async_llm
        params = self._pooling_params()
        adapter = await self._afound_own()
        tasks = [
            asyncio.ensure_future(_vector(engine, prompt, params, adapter)) for prompt in prompts
        ]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise


async def _vector(
    engine: AsyncLLM, prompt: str, params: PoolingParams, lora_request: Any
) -> list[float]:
    output = await engine.embed(prompt, params, lora_request=lora_request)
    return output.outputs.embedding


def _prefixed(name: str, prefix: str, texts: Iterable[Any]) -> list[str]:
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise refuse(name, texts, "a list of strings")  # each letter of one would be a text
    texts = list(texts)  # a generator can be read once
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise refuse(name if name == "text" else f"{name}[{i}]", text, "a string")
    return [prefix + text for text in texts]

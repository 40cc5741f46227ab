"""VLLMEmbeddings: the engine's vectors, by LangChain's names."""

from __future__ import annotations

import asyncio
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire import PoolingParams
from quire.errors import EngineClosedError, InvalidRequestError
from quire.integrations.langchain import VLLM
from quire.integrations.langchain.embeddings import VLLMEmbeddings

TEXTS = ["What is the capital of France?", "Hello", "2 + 3"]


@pytest.fixture(scope="module")
def embeddings() -> Iterator[VLLMEmbeddings]:
    with VLLMEmbeddings(model="quire/demo") as embeddings:
        yield embeddings


def close(left: list[float], right: list[float]) -> bool:
    return all(math.isclose(a, b, abs_tol=0.02) for a, b in zip(left, right, strict=True))


@settings(max_examples=20)
@given(
    pooling=st.sampled_from(["last", "mean", "cls", None]),
    normalize=st.booleans(),
    dimensions=st.sampled_from([None, 8]),
    prefix=st.sampled_from(["", "query: "]),
)
def test_vectors_are_the_engines(
    embeddings: VLLMEmbeddings, pooling: Any, normalize: bool, dimensions: Any, prefix: str
) -> None:
    """Documents, queries and the async forms are LLM.embed of the prefixed texts."""
    own = VLLMEmbeddings(
        client=embeddings.client,
        pooling=pooling,
        normalize=normalize,
        dimensions=dimensions,
        document_prefix=prefix,
        query_prefix=prefix * 2,
    )
    params = PoolingParams(pooling=pooling, normalize=normalize, dimensions=dimensions)
    prompts = [prefix + text for text in TEXTS] + [prefix * 2 + TEXTS[0]]
    expected = [
        output.outputs.embedding
        for output in embeddings.client.embed(prompts, params, use_tqdm=False)
    ]
    found = [*own.embed_documents(TEXTS), own.embed_query(TEXTS[0])]
    tasks = asyncio.run(_both(own))
    scale = 1.0 if normalize else max(map(abs, expected[0]))
    for vectors in (found, tasks):
        for left, right in zip(vectors, expected, strict=True):
            assert close([x / scale for x in left], [x / scale for x in right])
            assert len(left) == (dimensions or len(right))


async def _both(own: VLLMEmbeddings) -> list[list[float]]:
    return [*await own.aembed_documents(TEXTS), await own.aembed_query(TEXTS[0])]


def test_like_texts_are_near(embeddings: VLLMEmbeddings) -> None:
    """Vectors have length 1, and a text is nearest to itself."""
    vectors = embeddings.embed_documents(TEXTS)
    for i, text in enumerate(TEXTS):
        query = embeddings.embed_query(text)
        assert math.isclose(sum(x * x for x in query), 1, abs_tol=1e-3)
        products = [sum(a * b for a, b in zip(query, v, strict=True)) for v in vectors]
        assert products.index(max(products)) == i
    assert embeddings.embed_documents([]) == []


def test_engine_is_shared(embeddings: VLLMEmbeddings) -> None:
    """Models of other kinds are on the same engine; a pickle and a copy are, too."""
    assert VLLM(model="quire/demo").client is embeddings.client
    again = pickle.loads(pickle.dumps(embeddings))
    assert again.client is embeddings.client
    copied = embeddings.model_copy(update={"pooling": "mean"})
    assert copied.pooling == "mean"
    copied.close()
    with pytest.raises(EngineClosedError):
        copied.embed_query("a")
    assert embeddings.embed_query("a")


def test_bad_arguments_are_refused(embeddings: VLLMEmbeddings) -> None:
    """Mistyped names, values out of range and what is no text are errors that say so."""
    with pytest.raises(TypeError, match="did you mean 'pooling'"):
        VLLMEmbeddings(model="quire/demo", poling="mean")
    with pytest.raises(ValueError, match="pooling"):
        VLLMEmbeddings(model="quire/demo", pooling="sum")
    with pytest.raises(InvalidRequestError, match="dimensions"):
        VLLMEmbeddings(model="quire/demo", dimensions=0)
    with pytest.raises(InvalidRequestError, match=r"texts\[1\] must be a string"):
        embeddings.embed_documents(["a", 5])  # type: ignore[list-item]
    with pytest.raises(InvalidRequestError, match="texts must be a list"):
        embeddings.embed_documents("abc")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="texts must be a list"):
        embeddings.embed_documents(None)  # type: ignore[arg-type]
    once = (text for text in ("a", "b"))
    assert len(embeddings.embed_documents(once)) == 2  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="text must be a string"):
        embeddings.embed_query(None)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="dimensions"):
        VLLMEmbeddings(client=embeddings.client, dimensions=10**6).embed_query("a")

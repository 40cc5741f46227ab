"""``/v1/embeddings``: the vectors that the engine gives, in OpenAI's shapes."""

from __future__ import annotations

import pytest

from quire import LLM, PoolingParams

openai = pytest.importorskip("openai")
np = pytest.importorskip("numpy")

TEXTS = ["The capital of France is Paris.", "Three plus four is seven.", "Hello"]


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.api_key) as client:
        yield client


@pytest.fixture(scope="module")
def expected():
    with LLM("quire/demo") as llm:
        tokenizer = llm.get_tokenizer()
        ids = [tokenizer.encode_prompt(text, True) for text in TEXTS]
        vectors = [o.outputs.embedding for o in llm.embed(TEXTS, use_tqdm=False)]
        means = [
            o.outputs.embedding
            for o in llm.embed(TEXTS, PoolingParams(pooling="mean", dimensions=16), use_tqdm=False)
        ]
        return ids, vectors, means


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("as_ids", [False, True])
def test_vectors_are_the_engines(client, expected, encoding, as_ids):
    ids, vectors, _ = expected
    answer = client.embeddings.create(
        model="quire/demo", input=ids if as_ids else TEXTS, encoding_format=encoding
    )
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    for item, vector in zip(answer.data, vectors, strict=True):
        got = item.embedding
        if isinstance(got, str):
            import base64

            got = np.frombuffer(base64.b64decode(got), "<f4")
        # bfloat16 kernels give the same bits whatever is in the batch.
        np.testing.assert_allclose(got, vector, atol=1e-6)


def test_one_text_and_further_fields(client, expected):
    _, vectors, means = expected
    [item] = client.embeddings.create(model="quire/demo", input=TEXTS[0]).data
    np.testing.assert_allclose(item.embedding, vectors[0], atol=1e-6)
    [item] = client.embeddings.create(
        model="quire/demo", input=TEXTS[0], dimensions=16, extra_body={"pooling": "mean"}
    ).data
    np.testing.assert_allclose(item.embedding, means[0], atol=1e-6)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("input", {"input": []}),
        ("input", {"input": ""}),
        ("input", {"input": ["fine", ""]}),
        ("input", {"input": [[1, 10**9]]}),
        ("input", {"input": "long " * 5000}),
        ("dimensions", {"dimensions": 0}),
        ("dimensions", {"dimensions": 10**6}),
        ("encoding_format", {"encoding_format": "int8"}),
        ("model", {"model": "nobody"}),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(client, field, fields):
    body = {"model": "quire/demo", "input": "Hello", **fields}
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/embeddings", body=body, cast_to=object)
    assert caught.value.status_code == (404 if field == "model" else 400)
    assert caught.value.body["param"].startswith(field)

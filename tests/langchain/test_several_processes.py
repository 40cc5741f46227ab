"""LangChain's VLLM over an engine of several processes."""

from __future__ import annotations

from langchain_core.prompts import PromptTemplate

from quire.integrations.langchain import VLLM


def test_a_chain_runs_on_two_ranks():
    """Nothing but the argument is needed, and the processes go with the object."""
    options = {"max_new_tokens": 8, "temperature": 0, "dtype": "float32"}
    prompt = PromptTemplate.from_template("The capital of {country} is")
    answers = []
    for size in (1, 2):
        llm = VLLM(model="quire/demo", tensor_parallel_size=size, **options)
        answers.append((prompt | llm).batch([{"country": "France"}, {"country": "Japan"}]))
        llm.close()
    assert answers[0] == answers[1]
    assert "Paris" in answers[1][0]

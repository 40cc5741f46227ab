"""Packages that import vllm run on quire, unmodified; those that are not installed are skipped.

`make test-consumers` installs all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")

RUN = "quire.integrations.vllm"
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "PYTHONSAFEPATH": "1",
}


def run_script(code: str, tmp_path: Path, *, timeout: float = 300) -> str:
    """Run a script with the stand-in; return what it printed."""
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", RUN, str(script)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_quick_start_of_offline_inference(tmp_path: Path) -> None:
    out = run_script(
        """
from vllm import LLM, SamplingParams

prompts = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)

def main():
    llm = LLM(model="quire/demo")
    outputs = llm.generate(prompts, sampling_params)
    for output in outputs:
        print(f"Prompt: {output.prompt!r}, Generated text: {output.outputs[0].text!r}")
    conversation = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    for output in llm.chat(conversation, SamplingParams(temperature=0), use_tqdm=False):
        print("Chat:", output.outputs[0].text)
    params = SamplingParams(n=2, frequency_penalty=1.0, min_tokens=2)
    print("Samples:", len(llm.generate("Hello", params)[0].outputs))

if __name__ == "__main__":
    main()
""",
        tmp_path,
    )
    assert out.count("Prompt: ") == 4
    assert "Chat: The capital of France is Paris" in out
    assert "Samples: 2" in out


def test_one_bar_is_drawn_for_a_call(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from quire.integrations.vllm.llm import LLM

    llm = LLM("quire/demo", num_gpu_blocks_override=200)
    try:
        calls: list[int] = []

        class Bar:
            def __init__(self, *args: Any, total: int = 0, **kwargs: Any) -> None:
                calls.append(total)

            def __getattr__(self, name: str) -> Any:
                return lambda *args, **kwargs: None

        llm.generate(["a", "b", "c"], use_tqdm=Bar)
        assert calls == [3]
    finally:
        llm.quire.close()


@pytest.mark.usefixtures("served")
class TestLangChainCommunity:
    """``langchain_community.llms.VLLM``."""

    @pytest.fixture(autouse=True)
    def _there(self) -> None:
        pytest.importorskip("langchain_community")

    def test_its_manual(self) -> None:
        from langchain_community.llms import VLLM
        from langchain_core.prompts import PromptTemplate

        llm = VLLM(
            model="quire/demo",
            trust_remote_code=True,
            max_new_tokens=16,
            top_k=10,
            top_p=0.95,
            temperature=0.8,
        )
        assert isinstance(llm.invoke("What is the capital of France ?"), str)
        chain = PromptTemplate.from_template("The capital of {country} is") | llm
        assert isinstance(chain.invoke({"country": "France"}), str)
        assert len(llm.batch(["Hello", "The sky is"])) == 2
        llm.client.quire.close()

    def test_a_quantized_folder(self, tmp_path: Path) -> None:
        from langchain_community.llms import VLLM

        from quire.cli.app import app

        folder = tmp_path / "awq"
        words = ["quantize", "quire/demo", "--to", "awq", "--out", str(folder)]
        app(args=words, prog_name="quire", standalone_mode=False)
        llm = VLLM(
            model=str(folder),
            max_new_tokens=12,
            temperature=0.0,
            vllm_kwargs={"quantization": "awq"},
        )
        assert "Paris" in llm.invoke("The capital of France is")
        llm.client.quire.close()


@pytest.mark.usefixtures("served")
class TestOutlines:
    """``outlines.from_vllm_offline``."""

    def test_every_kind_of_output(self) -> None:
        outlines = pytest.importorskip("outlines")
        from pydantic import BaseModel
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

        class Person(BaseModel):
            age: int

        llm = LLM("quire/demo", num_gpu_blocks_override=400)
        model = outlines.from_vllm_offline(llm)
        params = SamplingParams(temperature=0, max_tokens=40)

        def ask(output_type: Any, prompt: Any = "Answer:", params: Any = params) -> Any:
            return model(prompt, output_type, sampling_params=params)

        assert isinstance(ask(None), str)
        assert ask(Literal["Yes", "No"]) in ("Yes", "No")
        int(ask(int))
        short = outlines.regex("[a-c]{3}")
        assert set(ask(short)) <= set("abc")
        assert isinstance(json.loads(ask(Person))["age"], int)  # others may stand beside it
        schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
        assert "a" in json.loads(ask(outlines.json_schema(json.dumps(schema))))
        grammar = outlines.cfg('start: "yes" | "no"')
        assert ask(grammar) in ("yes", "no")
        chat = outlines.inputs.Chat([{"role": "user", "content": "What is the capital of France?"}])
        assert "Paris" in ask(None, chat)
        both = model.batch(["Yes or no?", "Is it?"], Literal["Yes", "No"], sampling_params=params)
        assert {text for texts in both for text in texts} <= {"Yes", "No"}
        several = SamplingParams(n=2, temperature=1.0, seed=1, max_tokens=5)
        assert len(ask(None, params=several)) == 2
        llm.quire.close()


@pytest.mark.usefixtures("served")
def test_llama_index() -> None:
    module = pytest.importorskip("llama_index.llms.vllm")
    llm = module.Vllm(
        model="quire/demo",
        vllm_kwargs={"swap_space": 1, "gpu_memory_utilization": 0.5},
        max_new_tokens=12,
        temperature=0,
    )
    assert "Paris" in llm.complete("The capital of France is").text
    llm._client.quire.close()


@pytest.mark.usefixtures("served")
def test_distilabel() -> None:
    module = pytest.importorskip("distilabel.models.llms")
    llm = module.vLLM(model="quire/demo", disable_cuda_device_placement=True)
    llm.load()
    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    [found] = llm.generate(inputs=[conversation], max_new_tokens=16, temperature=0.0)
    assert "Paris" in found["generations"][0]
    llm.unload()


TASK = """
task: quire_small
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["Paris", "London", "Berlin"]
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

EVALUATE = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

results = {}
for name in ("vllm", "hf"):
    found = lm_eval.simple_evaluate(
        model=name,
        model_args={"pretrained": sys.argv[1], "dtype": "float32"},
        tasks=["quire_small"],
        task_manager=TaskManager(include_path=sys.argv[2]),
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
    )
    results[name] = [each["resps"] for each in found["samples"]["quire_small"]]
with open(sys.argv[3], "w") as file:
    json.dump(results, file)
"""


def test_lm_eval_gives_the_log_likelihoods_that_transformers_gives(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from quire.models.hub import resolve

    data = tmp_path / "small.jsonl"
    questions = ["The capital of France is", "The capital of England is", "Berlin is in"]
    rows = [{"question": text, "label": i} for i, text in enumerate(questions)]
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "small.yaml").write_text(TASK.format(file=data))
    script = tmp_path / "evaluate.py"
    script.write_text(EVALUATE)
    out = tmp_path / "out.json"
    model = str(resolve("quire/demo"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "quire.integrations.vllm",
            str(script),
            model,
            str(tmp_path),
            str(out),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(out.read_text())

    def numbers(resps: Any) -> list[float]:
        if isinstance(resps, (list, tuple)):
            return [number for each in resps for number in numbers(each)]
        return [float(resps)]

    ours, theirs = numbers(results["vllm"]), numbers(results["hf"])
    assert len(ours) == len(theirs) == 18
    assert ours == pytest.approx(theirs, abs=1e-3)

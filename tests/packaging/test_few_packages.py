"""One process generates text with few packages: the others belong to what is not asked for here."""

from __future__ import annotations

import subprocess
import sys

_NEEDED = ("numpy", "safetensors", "tokenizers", "torch", "tqdm")

_BLOCK = """
import sys
import sysconfig

ALLOWED = {allowed!r}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = top in sys.stdlib_module_names or top in ALLOWED or top == "quire"
        # What the allowed ones ask for themselves is their own affair.
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith("<frozen"):
            frame = frame.f_back
        asker = frame.f_globals.get("__name__", "") if frame is not None else ""
        if not known and asker.partition(".")[0] in ("quire", "__main__"):
            raise ModuleNotFoundError(f"{{asker}} imports {{name}}", name=name)
        return None

sys.meta_path.insert(0, Blocker())
"""


def run(code: str, *more: str) -> str:
    """Run code in which quire may import nothing but the few, and what `more` names."""
    code = _BLOCK.format(allowed={*_NEEDED, *more}) + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_blocker_blocks():
    """What quire itself imports of other packages is found out."""
    message = run("""
import importlib
try:
    importlib.import_module("quire.cli.app")
except ModuleNotFoundError as error:
    print(error)
""")
    assert "imports typer" in message


def test_text_is_generated_with_few_packages():
    """From import to text, by the demo model: no MessagePack, no grammars, no hub, no Jinja."""
    answer = run("""
from quire import LLM, SamplingParams
with LLM("quire/demo", dtype="float32") as llm:
    params = SamplingParams(temperature=0, max_tokens=4)
    [text, ids] = llm.generate(
        ["The capital of France is", {"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=True
    )
    print(text.outputs[0].text, len(ids.outputs[0].token_ids))
""")
    assert "Paris" in answer


def test_a_gpu_is_measured_with_few_packages():
    """No command line, no server: `make gpu-check` runs where no more is installed."""
    told = run(
        """
from quire.bench.gpu.part import run_part
import quire.bench.gpu.run
import quire.bench.gpu.table
import quire.bench.gpu.transformers_sides
for name in ("ceilings", "kernels", "latency"):
    run_part(
        name, device="cpu", tiny=True, seconds=0.1, copied=1e9, multiplied=1e9,
        tell=lambda figure: print(figure.part, len(figure.values), figure.note),
    )
""",
        "triton",
        "transformers",
    )
    assert "latency" in told
    assert "failed" not in told

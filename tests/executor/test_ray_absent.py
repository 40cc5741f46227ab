"""Where Ray is not installed, or not running, an engine that asks for it says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from quire import LLM
from quire.errors import ConfigError


def test_without_ray_the_error_says_what_to_install(tiny_checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'quire\[ray\]'"):
        LLM(
            tiny_checkpoint("llama"),
            tensor_parallel_size=2,
            distributed_executor_backend="ray",
        )


@pytest.mark.slow
def test_without_a_cluster_one_is_started_and_ended(tmp_path):
    """In a process of its own, for Ray is one for all of a process."""
    pytest.importorskip("ray", reason="ray is not installed")
    program = """
        import os
        import ray
        from quire import LLM, SamplingParams
        from quire.errors import ConfigError

        if __name__ == "__main__":
            own = dict(distributed_executor_backend="ray", num_gpu_blocks_override=32)
            greedy = SamplingParams(temperature=0, max_tokens=4)
            with LLM("quire/demo", pipeline_parallel_size=2, **own) as first:
                second = LLM("quire/demo", **own)
                assert first.generate(["x"], greedy)[0].finished
                second.close()
                assert ray.is_initialized()
            assert not ray.is_initialized()
            os.environ["RAY_ADDRESS"] = "127.0.0.1:9"
            try:
                LLM("quire/demo", tensor_parallel_size=2, **own)
            except ConfigError as error:
                assert "RAY_ADDRESS='127.0.0.1:9'" in str(error)
            else:
                raise AssertionError("there is no cluster")
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(program))
    told = {"RAY_ADDRESS": "local", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env={**os.environ, **told}, timeout=120)
    assert done.returncode == 0

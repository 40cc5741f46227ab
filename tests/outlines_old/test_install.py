"""install() gives Outlines what 0.x had, and uninstall() leaves no trace of it."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
import threading
from types import ModuleType

import outlines
import outlines.models.vllm
import pytest

from quire.integrations.outlines import generate, samplers
from quire.integrations.outlines.installation import install, uninstall

UPSTREAM = outlines.models.vllm.VLLM


class Client:
    """What upstream's class for a server is made with."""


def state():
    """Return all that install may change, down to the order of names."""
    modules = {
        name: module for name, module in sys.modules.items() if name.split(".")[0] == "outlines"
    }
    return [
        list(modules.items()),
        *([name, type(module), list(vars(module).items())] for name, module in modules.items()),
        UPSTREAM.__subclasses__(),
    ]


@pytest.fixture
def installed(models_module):
    install()
    yield models_module
    uninstall()


def test_everything_is_taken_back():
    """Modules, attributes, their order and the module's class are as before."""
    before = state()
    install()
    assert state() != before
    install()
    uninstall()
    gc.collect()
    assert state() == before
    uninstall()
    assert state() == before


def test_installing_again_works():
    """Installed, taken back and installed again, it is there again."""
    before = state()
    for _ in range(3):
        install()
        assert outlines.generate is generate
        uninstall()
        assert not hasattr(outlines, "generate")
    assert state() == before


def test_the_modules_of_0x_can_be_imported(installed):
    """As attributes and by every form of import."""
    assert outlines.generate is generate
    assert outlines.samplers is samplers
    assert importlib.import_module("outlines.generate") is generate
    scope: dict[str, object] = {}
    exec(
        "import outlines.generate, outlines.samplers\n"
        "from outlines import generate, models, samplers\n"
        "from outlines.generate import json\n"
        "from outlines.samplers import greedy, multinomial\n"
        "import outlines.models.vllm as module\n"
        "from outlines.models.vllm import VLLM\n"
        "from outlines.models import vllm\n",
        scope,
    )
    assert scope["json"] is generate.json
    assert scope["greedy"] is samplers.greedy
    assert scope["module"] is scope["vllm"] is outlines.models.vllm
    assert scope["VLLM"] is outlines.models.VLLM


def test_a_model_is_made_by_name(installed, llm):
    """outlines.models.vllm is called, and still is the module that it was."""
    model = outlines.models.vllm("quire/demo", max_model_len=64)
    assert isinstance(model, installed.VLLM)
    assert isinstance(outlines.models.vllm, ModuleType)
    assert callable(outlines.models.vllm.from_vllm)
    answer = outlines.generate.choice(model, ["a"], outlines.samplers.greedy())
    assert answer("x", use_tqdm=False) == "a"


def test_a_class_for_both(installed, llm):
    """VLLM is ours for an engine, and upstream's for a client; isinstance knows both."""
    for ours in (outlines.models.VLLM(llm), outlines.models.vllm.VLLM(llm)):
        assert type(ours) is installed.VLLM
        assert isinstance(ours, outlines.models.VLLM)
        assert not isinstance(ours, UPSTREAM)
    client = Client()
    for theirs in (outlines.models.VLLM(client, "name"), outlines.models.VLLM(client=client)):
        assert type(theirs) is UPSTREAM
        assert isinstance(theirs, outlines.models.VLLM)
    assert isinstance(UPSTREAM(client), outlines.models.VLLM)
    assert not isinstance(client, outlines.models.VLLM)
    assert not isinstance(object(), outlines.models.VLLM)
    assert issubclass(UPSTREAM, outlines.models.VLLM)
    assert issubclass(installed.VLLM, outlines.models.VLLM)
    assert not issubclass(int, outlines.models.VLLM)


def test_outlines_itself_goes_on_with_upstreams_class(installed):
    """A server's model is taken by outlines.Generator, which looks at classes."""
    model = outlines.models.VLLM(Client())
    assert isinstance(outlines.Generator(model), outlines.generator.BlackBoxGenerator)


def test_a_class_of_the_users_own_is_one_of_upstreams(installed):
    """Deriving from VLLM while installed is deriving from upstream's class."""

    class Mine(outlines.models.VLLM):
        def __init__(self, client):
            super().__init__(client, "mine")

    assert Mine.__mro__[1] is UPSTREAM
    mine = Mine(Client())
    assert mine.model_name == "mine"
    assert isinstance(mine, outlines.models.VLLM)
    uninstall()
    assert isinstance(mine, outlines.models.VLLM)


def test_what_the_class_has_can_be_reached(installed):
    """Methods and documentation are upstream's."""
    assert outlines.models.VLLM.generate is UPSTREAM.generate
    assert outlines.models.VLLM.__doc__ == UPSTREAM.__doc__
    assert outlines.models.VLLM.__name__ == "VLLM"
    with pytest.raises(AttributeError, match="nothing"):
        _ = outlines.models.VLLM.nothing


def test_what_somebody_else_put_there_since_stays(installed):
    """Taking back takes only what was put."""
    mine = ModuleType("mine")
    outlines.generate = mine
    try:
        uninstall()
        assert outlines.generate is mine
        assert not hasattr(outlines, "samplers")
    finally:
        del outlines.generate


def test_another_kind_of_outlines_is_left_alone(monkeypatch):
    """Where outlines.models.vllm is no module, as before 1.0, nothing is changed."""
    monkeypatch.setattr(outlines.models, "vllm", lambda name: None)
    before = state()
    with pytest.raises(ImportError, match=r"Outlines 1\.x"):
        install()
    assert state() == before


def test_no_outlines_is_told(monkeypatch):
    """Without the package there is one clear error."""
    monkeypatch.setitem(sys.modules, "outlines", None)
    with pytest.raises(ImportError, match="outlines"):
        install()


def test_threads_may_install_and_take_back_at_once():
    """Whatever the order, the last word is uninstall's."""
    before = state()
    start = threading.Barrier(8)

    def work(function):
        start.wait()
        for _ in range(50):
            function()

    threads = [threading.Thread(target=work, args=(f,)) for f in [install, uninstall] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    uninstall()
    gc.collect()
    assert state() == before


def test_in_a_process_of_its_own():
    """From the first import on: install() brings Outlines in, and leaves it as it is without."""
    code = """
import sys
from quire.integrations.outlines.installation import install, uninstall
assert "outlines" not in sys.modules
install()
import outlines
import outlines.generate
from outlines.generate import json, text
from outlines import models, samplers
assert callable(models.vllm) and models.vllm.VLLM is models.VLLM
assert type(models.VLLM(object())).__module__ == "outlines.models.vllm"
uninstall()
changed = {name for name in sys.modules if name.split(".")[0] == "outlines"}
here = {name: list(vars(sys.modules[name])) for name in changed}
values = {name: list(map(id, vars(sys.modules[name]).values())) for name in changed}
assert type(outlines.models.vllm) is type(sys)
install(); uninstall()
assert here == {name: list(vars(sys.modules[name])) for name in changed}
assert values == {name: list(map(id, vars(sys.modules[name]).values())) for name in changed}
try:
    import outlines.generate
except ModuleNotFoundError:
    print("gone")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "gone"

"""Engines: one for all that are equal, none for nobody, and never one too many."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import ConfigurableField

from quire.config import EngineConfig
from quire.errors import ConfigError, EngineClosedError, InvalidRequestError, ModelLoadError
from quire.integrations.engines import acquire, engine_key
from quire.integrations.langchain import VLLM


def test_equal_models_share_an_engine(fake: Any) -> None:
    """Same model and engine arguments, however written: one engine; sampling has no part in it."""
    one = VLLM(model="m", temperature=0.1)
    same = [
        VLLM(model="m", n=2, seed=3),
        VLLM(model="m", dtype="auto", tensor_parallel_size=None),
        VLLM(model="m", vllm_kwargs={"max_num_seqs": 256, "disable_cascade_attn": True}),
    ]
    assert all(other.client is one.client for other in same)
    other = [
        VLLM(model="m2"),
        VLLM(model="m", dtype="half"),
        VLLM(model="m", vllm_kwargs={"seed": 1}),
        VLLM(model="m", vllm_kwargs={"revision": "v1"}),
    ]
    assert fake.num_made() == 5
    assert len({id(llm.client) for llm in [one, *other]}) == 5
    assert VLLM(model="m", dtype="float16").client is other[1].client


def test_engines_with_logits_processors_are_shared_by_those_with_the_very_same() -> None:
    """Objects that are equal may hold different rows; and what answers differ by is told."""
    from quire import LogitsProcessor

    class Equal(LogitsProcessor):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

        def __repr__(self) -> str:
            return "Equal()"

        def update(self, change: Any) -> None:
            pass

        def apply(self, logits: Any) -> Any:
            return logits

    def key(*processors: Any) -> Any:
        return engine_key(EngineConfig.create("m", logits_processors=list(processors)))

    one, other = Equal(), Equal()
    assert key(one) == key(one)
    assert hash(key(one)) == hash(key(one))
    assert key(Equal) == key(Equal)
    assert key() == engine_key(EngineConfig.create("m"))
    assert len({key(), key(one), key(other), key(Equal), key(one, one)}) == 5


def test_engine_goes_with_its_last_user(fake: Any) -> None:
    """Dropping all objects frees the engine, and the next asker gets a new one."""
    one, two = VLLM(model="m"), VLLM(model="m")
    one.invoke("p", temperature=0.3)
    del one
    assert fake.num_alive() == 1
    assert two.invoke("p")
    del two
    assert fake.num_alive() == 0
    assert VLLM(model="m").invoke("p")
    assert fake.num_made() == 2


def test_closing_counts_users(fake: Any) -> None:
    """Closing frees the engine once every user has closed, and no sooner; copies are users."""
    one, two = VLLM(model="m"), VLLM(model="m")
    three = two.model_copy(update={"temperature": 0.0})
    engine = one.client
    one.close()
    assert not engine.closed
    with pytest.raises(EngineClosedError):
        one.invoke("p")
    two.close()
    assert three.invoke("p")
    three.close()
    assert engine.closed
    four = VLLM(model="m")
    assert four.client is not engine
    assert four.invoke("p")


def test_a_user_that_was_dropped_counts_no_more(fake: Any) -> None:
    """Closing the one object that is left closes the engine, whatever became of the others."""
    one, two = VLLM(model="m"), VLLM(model="m")
    engine = one.client
    del two
    one.close()
    assert engine.closed


def test_closed_engine_is_not_handed_out(fake: Any) -> None:
    """When somebody closes the engine itself, the next asker gets a new one."""
    one = VLLM(model="m")
    one.client.close()
    assert VLLM(model="m").invoke("p")
    assert fake.num_made() == 2


def test_engine_is_its_checkpoint(fake: Any, checkpoint: Path, tmp_path: Path) -> None:
    """The same files by another path are the same engine; changed files are another one."""
    first = VLLM(model=str(checkpoint))
    link = tmp_path / "link"
    link.symlink_to(checkpoint)
    assert VLLM(model=str(link)).client is first.client
    assert VLLM(model=os.path.relpath(checkpoint)).client is first.client
    copied = shutil.copytree(checkpoint, tmp_path / "copy")
    assert VLLM(model=str(copied)).client is not first.client
    (checkpoint / "model.safetensors").write_bytes(b"trained further")
    later = VLLM(model=str(checkpoint))
    assert later.client is not first.client
    assert first.invoke("p")
    assert later.invoke("p")


def test_a_failed_load_may_be_tried_again(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that could not be made leaves nothing behind that the next attempt stumbles on."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ModelLoadError("damaged")

    with monkeypatch.context() as broken:
        broken.setattr("quire.llm.LLM", fail)
        with pytest.raises(ModelLoadError, match="damaged"):
            VLLM(model="m")
    assert VLLM(model="m").invoke("p")


def test_key_tells_values_of_different_types_apart() -> None:
    """Equal numbers of different types are different arguments."""
    keys = {
        engine_key(EngineConfig.create("m", hf_overrides={"a": value}))
        for value in (1, 1.0, True, "1", [1], {"b": 1})
    }
    assert len(keys) == 6


def test_threads_that_ask_at_once_get_one_engine(fake: Any) -> None:
    """While one thread loads, others that want the same engine wait; different ones do not."""
    fake.load_slowly(0.1)
    barrier = threading.Barrier(8)

    def make(i: int) -> VLLM:
        barrier.wait()
        return VLLM(model=f"m{i % 2}")

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make, range(8)))
    assert fake.num_made() == 2
    assert len({id(llm.client) for llm in made}) == 2


def test_sampling_never_makes_an_engine(fake: Any) -> None:
    """bind, configurable fields, call arguments and copies all run on the engine that is there."""
    llm = VLLM(model="m")
    llm.bind(temperature=0.0, n=1).invoke("p")
    configurable = llm.configurable_fields(
        temperature=ConfigurableField("t"), max_new_tokens=ConfigurableField("most")
    )
    configurable.with_config(configurable={"t": 0.25, "most": 3}).invoke("p")
    assert fake.calls[-1].params.temperature == 0.25
    assert fake.calls[-1].params.max_tokens == 3
    configurable.batch(["p", "q"], config={"configurable": {"t": 0.5}})
    list(configurable.stream("p", config={"configurable": {"t": 0.75}}))
    llm.invoke("p", seed=1)
    copy.copy(llm).invoke("p")
    copy.deepcopy(llm).invoke("p")
    llm.model_copy(update={"temperature": 0.0}, deep=True).invoke("p")
    assert fake.num_made() == 1
    assert fake.num_alive() == 1


def test_a_configurable_model_changes_engines(fake: Any) -> None:
    """What does belong to the engine may be configurable too, and then finds its engine."""
    llm = VLLM(model="m")
    other = VLLM(model="o")
    configurable = llm.configurable_fields(model=ConfigurableField("model"))
    assert configurable.invoke("p", config={"configurable": {"model": "o"}}).startswith("o|")
    assert configurable.invoke("p").startswith("m|")
    assert llm.model_copy(update={"model": "o"}).client is other.client
    assert fake.num_made() == 2


def test_model_copy_checks_what_it_changes(fake: Any) -> None:
    """A copy's update is refused where the constructor would have refused it."""
    llm = VLLM(model="m", temperature=0.5)
    with pytest.raises(TypeError, match="temperature"):
        llm.model_copy(update={"temprature": 1.0})
    with pytest.raises(InvalidRequestError, match="temperature"):
        llm.model_copy(update={"temperature": -1.0})
    changed = llm.model_copy(update={"max_tokens": 3})
    assert (changed.max_new_tokens, changed.temperature, llm.max_new_tokens) == (3, 0.5, 512)


def test_client_is_used_and_left_open(fake: Any) -> None:
    """An engine that was given serves its model, is named by it, and is closed by its owner."""
    engine = fake.make("m", dtype="half", max_model_len=77, seed=4)
    llm = VLLM(client=engine, temperature=0.0)
    assert llm.client is engine
    assert llm.model == "m"
    assert repr(llm) == (
        "VLLM(model='m', dtype='float16', vllm_kwargs={'max_model_len': 77, 'seed': 4}, "
        "temperature=0.0)"
    )
    assert llm.invoke("p").startswith("m|p")
    assert fake.num_made() == 1
    llm.configurable_fields(temperature=ConfigurableField("t")).invoke(
        "p", config={"configurable": {"t": 0.5}}
    )
    assert fake.num_made() == 1
    llm.close()
    assert not engine.closed
    extra = {"max_model_len": 77, "seed": 4}
    same = VLLM(model="m", dtype="half", vllm_kwargs=extra, temperature=0.0)
    assert llm._identifying_params == same._identifying_params


@pytest.mark.parametrize(
    "kwargs",
    [
        {"model": "o"},
        {"dtype": "float32"},
        {"vllm_kwargs": {"seed": 5}},
        {"vllm_kwargs": {"max_num_seqs": 7}},
    ],
)
def test_client_that_contradicts_is_refused(fake: Any, kwargs: dict[str, Any]) -> None:
    """Arguments beside a client are kept or refused, never passed over."""
    engine = fake.make("m", seed=4)
    with pytest.raises(ConfigError, match="client runs"):
        VLLM(client=engine, **kwargs)
    assert VLLM(client=engine, model="m", dtype="auto", vllm_kwargs={"seed": 4}).client is engine
    with pytest.raises(ConfigError, match=r"must be a quire\.LLM"):
        VLLM(client="m")


def test_another_models_client_is_shared(fake: Any) -> None:
    """``client=other.client`` makes one more user of a shared engine."""
    one = VLLM(model="m", vllm_kwargs={"seed": 4})
    two = VLLM(client=one.client)
    engine = one.client
    assert two.client is engine
    assert two.vllm_kwargs == {"seed": 4}
    one.close()
    assert two.invoke("p")
    two.close()
    assert engine.closed


def test_closed_client_is_refused(fake: Any) -> None:
    """A client that was closed is told of when it is used."""
    engine = fake.make("m")
    engine.close()
    with pytest.raises(EngineClosedError):
        VLLM(client=engine).invoke("p")


def test_pickle_shares_or_remakes_the_engine(fake: Any) -> None:
    """What comes out of a pickle runs: on the engine that is there, else on one made anew."""
    llm = VLLM(model="m", temperature=0.25, stop=["x"], vllm_kwargs={"seed": 4}, tags=["t"])
    llm.invoke("p")
    data = pickle.dumps(llm)
    again = pickle.loads(data)
    assert again.client is llm.client
    assert (again.temperature, again.stop, again.tags) == (0.25, ["x"], ["t"])
    assert again == llm
    del llm, again
    assert fake.num_alive() == 0
    last = pickle.loads(data)
    assert last.invoke("p").startswith("m|")
    assert last.client.config.seed == 4
    assert fake.num_made() == 2


def test_pickle_of_a_borrowed_engine_remakes_it(fake: Any) -> None:
    """A model on a given client has all that is needed to make such an engine elsewhere."""
    engine = fake.make("m", max_model_len=77)
    again = pickle.loads(pickle.dumps(VLLM(client=engine)))
    assert again.client is not engine
    assert again.client.config == engine.config


def test_copies_are_equal_and_independent(fake: Any) -> None:
    """A deep copy shares nothing but the engine."""
    llm = VLLM(model="m", stop=["x"], vllm_kwargs={"hf_overrides": {"a": 1}})
    deep = copy.deepcopy(llm)
    assert deep == llm
    assert deep.client is llm.client
    deep.stop.append("y")
    assert llm.stop == ["x"]
    assert llm != VLLM(model="m2", stop=["x"])
    llm.close()
    assert copy.copy(llm).client is None
    assert deep.invoke("p")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_lease_lock_survives_a_fork(fake: Any) -> None:
    """A child that is forked while another thread makes an engine can make its own."""
    from quire.integrations import engines

    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with engines._LOCK:
            held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 on: fork beside threads
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            acquire(EngineConfig.create("m"))
            code = 0
        finally:
            os._exit(code)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

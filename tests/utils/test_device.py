"""Devices of any kind are asked by what torch's modules for them have, and named by their type."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from quire.errors import ConfigError
from quire.executor.shard import ShardSettings
from quire.kernels.triton import backend as triton_backend
from quire.utils import device as devices

GIB = 1 << 30
XPU, CUDA_1 = torch.device("xpu"), torch.device("cuda:1")


class Module:
    """What torch has for a type of device, with so many of them."""

    def __init__(self, count, **others):
        self._count, self._current = count, 0
        self.__dict__.update(others)

    def is_available(self):
        return self._count > 0

    def device_count(self):
        return self._count

    def current_device(self):
        return self._current

    def set_device(self, index):
        self._current = index

    def get_device_properties(self, device):
        return SimpleNamespace(total_memory=8 * GIB)

    def memory_reserved(self, device):
        return 3 * GIB

    def get_device_name(self, device):
        return f"card {device.index}"


@pytest.fixture
def machine(monkeypatch):
    """``machine(cuda=2)``: a machine with such devices, the first kind the current one."""

    def make(**kinds):
        modules = {
            kind: each if isinstance(each, Module) else Module(each) for kind, each in kinds.items()
        }

        def module_of(kind):
            kind = kind.type if isinstance(kind, torch.device) else kind
            if kind not in modules:
                raise RuntimeError(f"no module for {kind}")
            return modules[kind]

        first = SimpleNamespace(type=next(iter(modules))) if modules else None
        monkeypatch.setattr(torch, "get_device_module", module_of)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: first is not None)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: first)
        return modules

    return make


@pytest.mark.parametrize(
    ("kinds", "name", "chosen"),
    [
        ({}, "auto", "cpu"),
        ({"cuda": 1}, "auto", "cuda"),
        ({"xpu": 2}, "auto", "xpu"),
        ({"mps": 1}, "auto", "cpu"),
        ({"xpu": 0}, "auto", "cpu"),
        ({"cuda": 1}, "cpu", "cpu"),
        ({"cuda": 2}, "cuda:1", "cuda:1"),
        ({"xpu": 2}, "xpu:1", "xpu:1"),
        ({"xpu": 1}, "xpu", "xpu"),
    ],
)
def test_a_device_is_chosen_among_those_that_torch_finds(machine, kinds, name, chosen):
    machine(**kinds)
    assert devices.choose_device(name) == torch.device(chosen)


@pytest.mark.parametrize(
    ("kinds", "name", "count"),
    [({"cuda": 2}, "cuda:2", 2), ({"cuda": 2}, "xpu", 0), ({}, "npu", 0), ({"xpu": 0}, "xpu", 0)],
)
def test_a_device_that_is_not_there_is_refused_with_their_number(machine, kinds, name, count):
    machine(**kinds)
    with pytest.raises(ConfigError, match=f"{name}.*torch finds {count} such devices"):
        devices.choose_device(name)


def test_a_device_without_a_number_is_that_of_the_thread(machine):
    modules = machine(cuda=4)
    modules["cuda"].set_device(3)
    assert devices.with_index(torch.device("cuda")) == torch.device("cuda:3")
    assert devices.with_index(CUDA_1) == CUDA_1
    assert devices.with_index(torch.device("cpu")) == torch.device("cpu")
    devices.make_current(CUDA_1)
    assert modules["cuda"].current_device() == 1
    devices.make_current(torch.device("cpu"))
    assert devices.device_names() == [f"card {i}" for i in range(4)]


def test_memory_is_what_the_device_says_or_what_torch_has_of_it(machine):
    machine(xpu=Module(1), cuda=Module(2, mem_get_info=lambda device: (5, 7)))
    assert devices.memory_info(CUDA_1) == (5, 7)
    assert devices.memory_info(torch.device("xpu:0")) == (5 * GIB, 8 * GIB)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_graphs_are_there_where_the_module_has_all_of_them(machine, kind):
    parts = {f"{kind.upper()}Graph": object, "graph": object, "graph_pool_handle": object}
    machine(**{kind: Module(1, **parts)})
    assert devices.has_graphs(torch.device(kind))
    del parts["graph"]
    machine(**{kind: Module(1, **parts)})
    assert not devices.has_graphs(torch.device(kind))
    assert not devices.has_graphs(torch.device("cpu"))


def test_a_rank_takes_its_own_of_several_devices_of_any_kind(machine):
    machine(xpu=2)
    settings = object.__new__(ShardSettings)
    for name, value in {"device_type": "xpu", "tensor_size": 3, "num_stages": 1}.items():
        object.__setattr__(settings, name, value)
    assert settings.device(1) == torch.device("xpu:1")
    with pytest.raises(ConfigError, match="need 3 devices, and torch finds 2 of type 'xpu'"):
        settings.device(2)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "npu"])
def test_triton_is_for_the_gpus_that_it_compiles_for(machine, kind):
    pytest.importorskip("triton")
    machine(**{kind: 1})
    why = triton_backend.why_missing.__wrapped__()
    assert (why is None) == (kind != "npu")
    machine()
    assert "no GPU" in triton_backend.why_missing.__wrapped__()


def test_on_a_cpu_nothing_is_waited_for():
    cpu = torch.device("cpu")
    devices.synchronize(cpu)
    assert devices.new_stream(cpu) is None
    assert devices.new_event(cpu) is None


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_the_accelerator_that_is_here_answers():
    device = devices.with_index(devices.choose_device("auto"))
    free, total = devices.memory_info(device)
    assert 0 < free <= total
    assert devices.device_names()[device.index]
    devices.make_current(device)
    tensor = torch.arange(5).to(device)
    with devices.on_stream(device, devices.new_stream(device)):
        devices.new_event(device).record()
    devices.synchronize(device)
    assert tensor.tolist() == [0, 1, 2, 3, 4]

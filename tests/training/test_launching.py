"""Processes and their cores."""

import importlib
import os
from types import SimpleNamespace

import launching
import pytest
import torch
from arguments import parse_args


@pytest.fixture
def threads(monkeypatch) -> list[int]:
    """The numbers of threads that were set, on a machine with 16 cores, as `accelerate launch` starts a process."""
    for name in list(os.environ):
        if name.endswith(("WORLD_SIZE", "WORLD_LOCAL_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "LOCAL_SIZE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"num_physical_cores": 16})
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    return found


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ({}, 16),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, 8),  # four machines
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"WORLD_SIZE": "8"}, 2),  # nobody says how many are here
        ({"WORLD_SIZE": "64", "LOCAL_WORLD_SIZE": "32"}, 1),
    ],
)
def test_a_process_gets_its_share_of_the_cores_of_its_own_machine(threads, monkeypatch, processes, expected):
    for name, value in processes.items():
        monkeypatch.setenv(name, value)
    launching.share_cores()
    assert threads == [expected]


def test_cores_that_others_may_use_are_left_to_them(threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    launching.share_cores()
    assert threads == [3]


@pytest.mark.parametrize(("name", "value"), [("OMP_NUM_THREADS", "4"), ("ACCELERATE_MIXED_PRECISION", None)])
def test_a_number_of_threads_that_was_chosen_stays(threads, monkeypatch, name, value):
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    launching.share_cores()
    assert threads == []


@pytest.mark.parametrize("name", ["evaluate", "ablate"])
def test_every_command_shares_its_cores_so(monkeypatch, name, tmp_path):
    script = importlib.import_module(name)

    class Shared(Exception):
        pass

    def shared() -> None:
        raise Shared

    monkeypatch.setattr(script, "share_cores", shared)
    with pytest.raises(Shared):
        script.main(script.parse_args(["--data_dir", str(tmp_path), "--output_dir", str(tmp_path), "--model", "x"]))


@pytest.mark.parametrize(
    ("asked", "computes", "warned"), [("bf16", False, True), ("bf16", True, False), ("auto", False, False)]
)
def test_a_processor_that_only_emulates_bfloat16_is_told_of(monkeypatch, caplog, tmp_path, asked, computes, warned):
    given = {}
    monkeypatch.setattr(launching, "computes_bf16", lambda device: computes)
    monkeypatch.setattr(launching, "PartialState", lambda cpu: SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(launching, "Accelerator", lambda **kwargs: given.update(kwargs))
    flags = ["--train_data_dir", "x", "--output_dir", str(tmp_path), "--mixed_precision", asked]
    launching.create_accelerator(parse_args(flags))
    assert ("only emulates bfloat16" in caplog.text) is warned
    assert given["mixed_precision"] == (None if asked == "auto" else "bf16")

"""Trials on a Ray cluster: the same results, whatever becomes of its nodes, and errors of one line."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from sao_prune.lab import cluster
from sao_prune.lab.errors import LabError
from sao_prune.lab.recipe import load_recipe
from sao_prune.lab.sweep import RunOptions, run_recipe
from sao_prune.lab.trials import Trial
from sao_prune.lab.work import Workplace
from tests.lab.test_executors import LONG, by_key, until
from tests.lab.test_sweep import lines

Micro = Callable[..., Path]

# Ray reads these when it is imported: the loopback interface for all, and patience on a busy machine.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_" + "raylet_start_wait_time_s", "180")

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "slots"),
    [
        ([{"CPU": 4}], 1, 0, 4),
        ([{"CPU": 0.5}, {"CPU": 0.5}], 1, 0, 0),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8}], 1, 0.5, 4),
        ([{"CPU": 8, "GPU": 2}], 6, 0.5, 1),
        ([{"CPU": 1}], 0.1, 0, 10),
        ([], 1, 0, 0),
    ],
)
def test_a_trial_fits_on_one_node(nodes: list[dict[str, float]], cpus: float, gpus: float, slots: int) -> None:
    assert cluster.count_slots(nodes, cpus, gpus) == slots


def test_without_ray_one_line_says_how_to_get_it(micro: Micro, tmp_path: Path, display, monkeypatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(LabError, match=r"pip install 'sao-prune\[ray\]'"):
        run_recipe(micro(), RunOptions(tmp_path, ray="auto"), display)


def test_a_node_without_the_drivers_folder_uses_one_of_its_own(
    micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(cluster, "_worker", None)
    recipe = load_recipe(micro(("[dense, sao, rg-s, gmp-s]", "[dense, gmp-t]")))
    dense, pruned = recipe.configurations()
    start = Trial("final", dense, 0, 0.1)
    place, trial = Workplace(tmp_path / "nowhere" / "micro"), Trial("final", pruned, 0, 0.1, start)
    record, told = cluster._work_anywhere(place, trial)
    assert record is not None, told
    assert record["result"]["status"] == "ok"
    assert [path.stem for path in tmp_path.glob("sao-prune-*/micro/weights/*.safetensors")] == [start.key]
    assert not (tmp_path / "nowhere").exists()


def test_an_error_comes_back_as_one_line(micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_worker", None)
    configuration = next(load_recipe(micro()).configurations())
    record, told = cluster._work_anywhere(Workplace(tmp_path, device="cuda:99"), Trial("final", configuration, 0, 0.1))
    assert record is None
    assert told
    assert "\n" not in told


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """A head that works on nothing."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    made = Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


@contextmanager
def nodes(made: Any, count: int) -> Iterator[list[Any]]:
    added = [made.add_node(num_cpus=1, node_ip_address="127.0.0.1") for _ in range(count)]
    try:
        yield added
    finally:
        for node in added:
            if node in made.worker_nodes:
                made.remove_node(node)


def workers() -> list[int]:
    """Processes that are at a trial."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::_work_anywhere"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@needs_ray
@pytest.mark.slow
def test_a_cluster_gives_the_same_results_though_a_worker_and_a_node_are_killed(
    micro: Micro, tmp_path: Path, display, ray_cluster: Any, one_thread: None
) -> None:
    path = micro(("[dense, sao, rg-s, gmp-s]", "[dense, sao, gmp-t]"), LONG)
    results = tmp_path / "ray" / "micro" / "results.jsonl"
    done: list[str] = []

    def kill() -> None:
        until(lambda: results.exists() and results.read_bytes().count(b"\n") >= 2 and workers())
        os.kill(workers()[0], signal.SIGKILL)
        done.append("worker")
        until(lambda: results.read_bytes().count(b"\n") >= 5)
        ray_cluster.remove_node(added[0], allow_graceful=False)
        done.append("node")

    with nodes(ray_cluster, 2) as added:
        killer = Thread(target=kill)
        killer.start()
        folder = run_recipe(path, RunOptions(tmp_path / "ray", ray=ray_cluster.address), display)
        killer.join()
    assert done == ["worker", "node"]
    assert any("its worker was lost" in note for note in display.notes)
    assert {line["environment"]["threads"] for line in lines(folder)} == {1}
    assert by_key(folder) == by_key(run_recipe(path, RunOptions(tmp_path / "here"), display))


@needs_ray
@pytest.mark.slow
def test_a_cluster_that_is_too_small(micro: Micro, tmp_path: Path, display, ray_cluster: Any) -> None:
    options = RunOptions(tmp_path, ray=ray_cluster.address, cpus=2)
    with nodes(ray_cluster, 1), pytest.raises(LabError, match="asks for 2 CPUs and 0 GPUs, its 2 nodes have") as caught:
        run_recipe(micro(), options, display)
    assert "\n" not in str(caught.value)


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:1"])
def test_no_cluster_at_the_address(micro: Micro, tmp_path: Path, display, address: str) -> None:
    with pytest.raises(LabError, match="Ray cluster") as caught:
        run_recipe(micro(), RunOptions(tmp_path, ray=address), display)
    assert "\n" not in str(caught.value)
    assert address in str(caught.value)

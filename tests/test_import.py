"""What `import sao_prune` costs: told by what it imports and starts, not by a clock."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sao_prune

HEAVY = ("scipy", "rich", "timm", "torchvision", "sklearn", "matplotlib", "sympy", "triton", "torch._dynamo", "typer")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_it_imports_nothing_and_starts_nothing() -> None:
    told = python(
        "import sys, threading, multiprocessing\n"
        "before = set(sys.modules)\n"
        "import sao_prune\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names))\n"
        "print(threading.active_count(), len(multiprocessing.active_children()))"
    )
    assert told.splitlines() == ["['sao_prune']", "1 0"]


def test_using_it_imports_no_more_than_it_needs() -> None:
    """Nothing heavy beside what torch itself brings; no thread, no other process."""
    told = python(
        "import sys, threading, subprocess, torch, torch.nn.utils.prune\n"
        "before = set(sys.modules)\n"
        "subprocess.Popen = None\n"
        "import sao_prune\n"
        "def net(): return torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))\n"
        "sao_prune.apply(net(), groups=4)\n"
        "sao_prune.plan(net(), groups=4)\n"
        "sao_prune.prune.sao(torch.nn.Linear(8, 8), 'weight', sparsity=0.75)\n"
        "sao_prune.analysis.singular_values(torch.nn.Linear(8, 8))\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules and m not in before], threading.active_count())"
    )
    assert told == "[] 1\n"


def test_timm_is_imported_by_those_who_need_it_and_finds_the_networks_then() -> None:
    """A run of an own network starts without timm and torchvision, which take longer than torch does."""
    told = python(
        "import sys, sao_prune.lab.sweep\n"
        "from sao_prune.lab.network import initial_network\n"
        "from sao_prune.lab.training.optimizer import RateSchedule, make_optimizer\n"
        "from sao_prune.lab.training.regularization import Objective\n"
        "from sao_prune.lab.training.spec import TrainSpec\n"
        "net = initial_network('sao_mlp', {'depth': 1, 'width': 8}, 10, {'in_chans': 1, 'img_size': 8})\n"
        "spec = TrainSpec(epochs=1, batch_size=1)\n"
        "RateSchedule(make_optimizer(net, spec, 0.1), spec, 0.1).step(0), Objective(spec, 10)\n"
        "print([name for name in ('timm', 'torchvision') if name in sys.modules])\n"
        "import timm\n"
        "print(type(timm.create_model('sao_mlp7')).__name__, timm.is_model('sao_resnet18'))"
    )
    assert told.splitlines() == ["[]", "SaoMLP True"]


def test_every_public_name_is_found_where_type_checkers_find_it() -> None:
    tree = ast.parse(Path(sao_prune.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    homes = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert sorted(homes) == sorted(sao_prune.__all__)
    assert {name: home for name, home in homes.items() if home} == sao_prune._HOMES
    for name in sao_prune.__all__:
        assert getattr(sao_prune, name).__name__.rpartition(".")[2] == name
        assert name in dir(sao_prune)
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        getattr(sao_prune, "frobnicate")  # noqa: B009 - the very thing that is tested

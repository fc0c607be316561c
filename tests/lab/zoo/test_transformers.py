"""A small part of the zoo of transformers: three families at work, and what is left out."""

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers", minversion="5.0")

from sao_prune.cli import app
from sao_prune.lab.zoo import PlanTask, RunTask, VisitOptions, ZooError, architectures, plan_one, run_one


@pytest.fixture(autouse=True)
def _threads_and_seed():
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


def family(name):
    (architecture,) = architectures(name, ["transformers"])
    return architecture


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5"])
def test_families_are_planned_and_work(name):
    plan = plan_one(PlanTask(family(name), 0.75))
    run = run_one(RunTask(family(name), 0.75))
    assert (plan.failure, plan.left_out, run.error) == (None, None, None)
    assert 8 <= run.layers == plan.layers
    assert run.sparsity == pytest.approx(0.75)
    assert run.image == (2, 16)


def test_what_cannot_be_made_small_is_left_out_with_a_reason():
    plan = plan_one(PlanTask(family("bark"), 0.75))
    assert plan.left_out
    assert plan.failure is None


def test_most_families_are_known():
    everything = architectures("*", ["transformers"])
    assert len({a.family for a in everything}) == len(everything) > 200


@pytest.mark.slow
def test_the_command(tmp_path):
    page = tmp_path / "zoo.md"
    arguments = ["zoo", "--library", "transformers", "--filter", "bert", "--run", "--output", str(page)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "0 failures: 1 planned, 1 put to work" in result.output
    text = page.read_text()
    assert "sao-prune zoo --library transformers --filter 'bert' --run" in text
    assert "| bert | BertLMHeadModel |" in text
    assert "torchvision" not in text.partition("## Planned")[0].partition("```")[0]


def test_unknown_libraries():
    with pytest.raises(ZooError, match="keras"):
        VisitOptions(libraries=("keras",))
    with pytest.raises(ZooError, match="keras"):
        architectures("*", ["keras"])

"""Distillation: nothing to learn from oneself, gradients into the student alone, no trace on either model."""

import copy
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

import sao_prune
from sao_prune import Distillation, Distiller


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU()) for _ in range(3)]
        return nn.Sequential(*blocks, nn.Linear(8, 4))


def batch() -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def state(model: nn.Module) -> list[torch.Tensor]:
    return [t.clone() for t in model.state_dict().values()]


BLOCKS = Distillation(blocks=["?", "1.0"], block_weight=2.0)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    student = network().eval()
    with Distiller(student, copy.deepcopy(student), BLOCKS) as distiller:
        loss = distiller.loss(batch(), student(batch()))
    assert float(loss.detach()) == 0
    loss.backward()
    assert all(float(p.grad.abs().max()) < 1e-6 for p in student.parameters())


def test_the_loss_at_known_logits_and_blocks() -> None:
    class Fixed(nn.Module):
        def __init__(self, hidden: list[float], logits: list[float]) -> None:
            super().__init__()
            self.hidden, self.pick = nn.Identity(), nn.Identity()
            self.values = nn.Parameter(torch.tensor([hidden, logits]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.hidden(self.values[:1])
            return self.values[1:]

    student, teacher = Fixed([1.0, 3.0], [0.0, 0.0]), Fixed([2.0, 1.0], [math.log(3.0), 0.0])
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    x, task = torch.zeros(1), torch.tensor(7.0)
    for weight in (0.0, 0.25, 1.0):
        options = Distillation(weight, temperature=1.0, blocks={"hidden": "hidden"}, block_weight=0.1)
        with Distiller(student, teacher, options) as distiller:
            loss = distiller.loss(x, student(x), task)
        assert float(loss.detach()) == pytest.approx((1 - weight) * 7 + weight * kl + 0.1 * (1 + 4) / (4 + 1))
    # At great temperatures what is matched are the logits themselves, whatever the temperature.
    soft = Distiller(student, teacher, Distillation(temperature=50.0)).loss(x, student(x))
    assert float(soft.detach()) == pytest.approx(math.log(3) ** 2 / 8, rel=1e-2)


def test_gradients_go_into_the_student_alone_and_the_teacher_is_untouched() -> None:
    student, teacher = network(), network(1)
    teacher[0].eval()
    modes = [m.training for m in teacher.modules()]
    before = state(teacher)
    with Distiller(student, teacher, BLOCKS) as distiller:
        distiller.loss(batch(), student(batch())).backward()
        assert [m.training for m in teacher.modules()] == modes
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, state(teacher)))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    # Dropout of the teacher is off although its mode is training: the same batch gives the same loss.
    student.eval()
    losses = {float(Distiller(student, teacher).loss(batch(), student(batch())).detach()) for _ in range(3)}
    assert len(losses) == 1


def test_hooks_are_gone_afterwards_and_do_nothing_in_copies() -> None:
    student, teacher = network(), network(1)
    distiller = Distiller(student, teacher, BLOCKS)
    other = copy.deepcopy(student)
    pickle.loads(pickle.dumps(student))(batch())
    outputs = student(batch())
    other(batch())
    distiller.loss(batch(), outputs)
    with pytest.raises(RuntimeError, match="0 times"):
        distiller.loss(batch(), outputs)
    for _ in range(3):
        student(batch())
    assert all(len(kept) == 1 for kept in distiller._outputs.values())
    distiller.close()
    for model in (student, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ZeroDivisionError), Distiller(student, teacher, BLOCKS):
        raise ZeroDivisionError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    failing = nn.Sequential(nn.Linear(8, 8), nn.Linear(4, 4))
    with Distiller(student, failing, Distillation(blocks={"0": "0"})) as distiller, pytest.raises(RuntimeError):
        distiller.loss(batch(), student(batch()))
    assert not failing[0]._forward_hooks


def test_masked_and_compact_students_learn_in_a_plain_loop() -> None:
    teacher = network(1).eval()
    for form in ("masked", "compact"):
        student = copy.deepcopy(teacher)
        sao_prune.apply(student, groups=2, method="rg", seed=0, form=form)
        optimizer = torch.optim.Adam(student.parameters(), 0.01)
        losses = []
        with Distiller(student, teacher, Distillation(blocks=["0", "1"])) as distiller:
            for _ in range(30):
                loss = distiller.loss(batch(), student(batch()))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        assert losses[-1] < 0.5 * losses[0]


def test_under_autocast_the_losses_are_in_single_precision() -> None:
    student, teacher = network(), network(1)
    with Distiller(student, teacher, BLOCKS) as distiller, torch.autocast("cpu", torch.bfloat16):
        outputs = student(batch())
        assert outputs.dtype == torch.bfloat16
        loss = distiller.loss(batch(), outputs, F.cross_entropy(outputs, torch.zeros(6).long()))
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_models_that_take_keywords_and_return_objects() -> None:
    class Wrapped(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net = network(seed)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.net(x * mask))

    inputs = {"x": batch(), "mask": torch.ones(1)}
    student = Wrapped(0)
    with Distiller(student, Wrapped(1), Distillation(blocks=["net.*"])) as distiller:
        assert float(distiller.loss(inputs, student(**inputs)).detach()) > 0


def test_errors() -> None:
    student, teacher = network(), network(1)
    for value in ({"weight": 1.5}, {"temperature": 0}, {"block_weight": -1}, {"temperature": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(value))):
            Distillation(**value)
    with pytest.raises(TypeError, match="list of names"):
        Distillation(blocks="0")
    with pytest.raises(ValueError, match=r"student has no module '1\.00' \(did you mean '1\.0'\?\)"):
        Distiller(student, teacher, Distillation(blocks=["1.00"]))
    with pytest.raises(ValueError, match="teacher has no module 'stem'"):
        Distiller(student, teacher, Distillation(blocks={"0": "stem"}))
    assert not student._forward_pre_hooks
    with pytest.raises(ValueError, match=r"share modules.*deepcopy"):
        Distiller(student, nn.Sequential(student[0]))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
        Distiller(student, "teacher")
    with pytest.raises(ValueError, match=r"logits are \(6, 4\), the teacher's \(6, 5\)"):
        Distiller(student, nn.Linear(8, 5)).loss(batch(), student(batch()))
    with pytest.raises(TypeError, match="must be a tensor or have logits, got tuple"):
        Distiller(student, teacher).loss(batch(), (student(batch()),))
    with (
        Distiller(student, teacher, Distillation(blocks={"0": "3"})) as distiller,
        pytest.raises(ValueError, match=r"student's 0 gives \(6, 8\), the teacher's 3 \(6, 4\)"),
    ):
        distiller.loss(batch(), student(batch()))


def _shared(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    student, teacher = network().eval(), network(1)
    wrapped = nn.parallel.DistributedDataParallel(student)
    with Distiller(wrapped, teacher, Distillation(blocks=["0"], block_weight=0.0)) as distiller:
        mine = batch()[rank::2]
        distiller.loss(mine, wrapped(mine)).backward()
    torch.save([p.grad for p in student.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif("fork" not in mp.get_all_start_methods(), reason="processes cannot be forked")
def test_processes_share_the_gradient(tmp_path: Path) -> None:
    mp.start_processes(_shared, (str(tmp_path),), nprocs=2, start_method="fork")
    student = network().eval()
    Distiller(student, network(1)).loss(batch(), student(batch())).backward()
    for rank in range(2):
        for ours, p in zip(torch.load(tmp_path / f"{rank}.pt"), student.parameters()):
            torch.testing.assert_close(ours, p.grad)

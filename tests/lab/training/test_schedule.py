"""Learning rates are those that papers mean by the same words."""

import pytest
import timm.optim
import timm.scheduler
import torch
from torch import nn

from sao_prune.lab.training import ScheduleSpec, TrainSpec
from sao_prune.lab.training.optimizer import RateSchedule, make_optimizer


def rates(schedule: ScheduleSpec, epochs: int, lr: float = 1.0) -> list[float]:
    spec = TrainSpec(epochs=epochs, batch_size=1, schedule=schedule)
    optimizer = make_optimizer(nn.Linear(2, 2), spec, lr)
    scheduler = RateSchedule(optimizer, spec, lr)
    found = []
    for epoch in range(epochs + 1):
        scheduler.step(epoch)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def torch_rates(kind: type, epochs: int, **options: object) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = kind(optimizer, **options)
    found = []
    for _ in range(epochs + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_constant() -> None:
    assert rates(ScheduleSpec(), 3) == [1.0] * 4


@pytest.mark.parametrize("milestones", [(1, 3), (2,), (50, 150), (60, 120, 160)])
def test_milestones_are_torchs_epochs_trained_before_the_drop(milestones: tuple[int, ...]) -> None:
    expected = torch_rates(torch.optim.lr_scheduler.MultiStepLR, 200, milestones=milestones, gamma=0.2)
    assert rates(ScheduleSpec("multistep", milestones=milestones, factor=0.2), 200) == pytest.approx(expected)


def test_cosine_is_torchs_and_ends_at_the_final_rate() -> None:
    expected = torch_rates(torch.optim.lr_scheduler.CosineAnnealingLR, 30, T_max=30, eta_min=1e-6)
    found = rates(ScheduleSpec("cosine", final_lr=1e-6), 30)
    assert found == pytest.approx(expected)
    assert found[0] == 1.0
    assert found[-1] == pytest.approx(1e-6)


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_warm_up_climbs_in_equal_steps_and_shifts_nothing(name: str) -> None:
    warm, cold = (rates(ScheduleSpec(name, warmup_epochs=w), 20) for w in (5, 0))
    assert warm[:5] == pytest.approx([0.01, 0.208, 0.406, 0.604, 0.802])
    assert warm[5:] == cold[5:]


def test_warm_up_before_milestones() -> None:
    schedule = ScheduleSpec("multistep", milestones=(3, 5), warmup_epochs=2)
    assert rates(schedule, 6) == pytest.approx([0.01, 0.505, 1.0, 0.1, 0.1, 0.01, 0.01])


SCHEDULES = [
    (ScheduleSpec(warmup_epochs=3), {"sched": "step", "decay_rate": 1.0}),
    (ScheduleSpec("multistep", milestones=(2, 7), factor=0.3), {"sched": "multistep", "decay_milestones": [3, 8]}),
    (ScheduleSpec("cosine", final_lr=1e-3, warmup_epochs=4), {"sched": "cosine", "min_lr": 1e-3}),
    (ScheduleSpec("cosine"), {"sched": "cosine"}),
]


@pytest.mark.parametrize(("schedule", "options"), SCHEDULES)
def test_rates_are_timms_to_the_last_bit(schedule: ScheduleSpec, options: dict) -> None:
    lr = 0.1234
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    options = {"warmup_epochs": schedule.warmup_epochs, "decay_rate": schedule.factor, **options}
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=11, warmup_lr=lr / 100, **options)
    expected = []
    for epoch in range(12):
        scheduler.step(epoch)
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(schedule, 11, lr) == expected


class Spared(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
        self.pos_embed, self.frozen = nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.zeros(2, 2), False)

    def no_weight_decay(self) -> set[str]:
        return {"pos_*"}


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam", "adamw"])
def test_optimizers_are_timms(name: str, decay: float) -> None:
    model = Spared()
    spec = TrainSpec(epochs=1, batch_size=1, optimizer=name, momentum=0.8, weight_decay=decay)
    found = make_optimizer(model, spec, 0.1)
    betas = {"betas": spec.betas} if name.startswith("adam") else {}
    expected = timm.optim.create_optimizer_v2(model, opt=name, lr=0.1, weight_decay=decay, momentum=0.8, **betas)
    assert type(found) is type(expected)
    own, theirs = ([dict(group) for group in optimizer.param_groups] for optimizer in (found, expected))
    for groups in (own, theirs):
        for group in groups:
            # Some versions of timm hand over what is frozen too, which has no gradient.
            group["params"] = [id(parameter) for parameter in group["params"] if parameter.requires_grad]
    assert own == theirs


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_betas_reach_adam(name: str) -> None:
    spec = TrainSpec(epochs=1, batch_size=1, optimizer=name, betas=(0.9, 0.99), weight_decay=5e-4)
    optimizer = make_optimizer(nn.Linear(2, 2), spec, 1e-3)
    assert type(optimizer) is (torch.optim.Adam if name == "adam" else torch.optim.AdamW)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.99)}
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 5e-4]


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        (ScheduleSpec("cosine", milestones=(3,)), "milestones"),
        (ScheduleSpec("multistep"), "milestones"),
        (ScheduleSpec("multistep", milestones=(60, 30)), "milestones"),
        (ScheduleSpec("constant", final_lr=1e-6), "final_lr"),
        (TrainSpec(epochs=1, batch_size=1, betas=(0.9,)), "betas"),
    ],
)
def test_specifications_that_contradict_themselves(spec: ScheduleSpec | TrainSpec, key: str) -> None:
    problem = spec.problem()
    assert problem is not None
    assert problem[0] == key

"""Distillation: a student learns what a trained model computes, its outputs and those of chosen modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite
from numbers import Real
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ._torch import tree_leaves
from .discovery.trace import call, evaluating
from .naming import nearest


@dataclass(frozen=True)
class Distillation:
    """What a student learns from its teacher, and how much that counts.

    Attributes:
        weight: share of the logits' loss in the loss of `Distiller.loss`, in [0, 1]; the rest is the task's.
        temperature: of both softmaxes. The loss is multiplied by its square, so that the gradient's scale does not
            depend on it (Hinton et al., 2015, https://arxiv.org/abs/1503.02531).
        blocks: modules whose outputs shall be like the teacher's too, by name or glob pattern; or a mapping from names
            in the student to names in the teacher. A wildcard stays within one part of a name: ``blocks.*`` are the
            blocks, not the layers in them. Their loss is ``|s - t|^2 / |t|^2``, the mean over the modules.
        block_weight: what the blocks' loss is multiplied by.
        dim: the dimension of the classes in the outputs.

    Raises:
        TypeError: if ``blocks`` holds no names.
        ValueError: for a number out of range.

    Example:
        >>> Distillation(temperature=2, blocks=("stages.*",)).block_weight
        1.0
    """

    weight: float = 0.5
    temperature: float = 4.0
    blocks: Sequence[str] | Mapping[str, str] = ()
    block_weight: float = 1.0
    dim: int = -1

    def __post_init__(self) -> None:
        names = [*self.blocks, *self.blocks.values()] if isinstance(self.blocks, Mapping) else self.blocks
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"blocks must be a list of names or a mapping between names, got {self.blocks!r}")
        for option, fits, allowed in (
            ("weight", lambda v: 0 <= v <= 1, "in [0, 1]"),
            ("temperature", lambda v: v > 0, "positive"),
            ("block_weight", lambda v: v >= 0, "at least 0"),
        ):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value) or not fits(value):
                raise ValueError(f"{option} must be {allowed} and finite, got {value!r}")


class Distiller:
    """Computes the loss of a student that learns from a teacher.

    Call `loss` with the batch and what the student gave for it; the teacher runs there, in eval mode, without
    gradients, under the caller's autocast, and is left as it was. The losses themselves are computed in float32.
    Where the options name blocks, hooks on the student note their outputs until `close` or the end of a ``with``.
    In a distributed run every process has its own, on its share of the batch.

    Args:
        student: what is trained: masked, compact, wrapped by `DistributedDataParallel` or not.
        teacher: what it learns from, on the same device; usually a copy of the model from before it was pruned.
        options: a `Distillation`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the two share modules, or a name of the options is none of theirs.

    Example:
        >>> import copy, torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
        >>> teacher = copy.deepcopy(net)
        >>> _ = sao_prune.apply(net, groups=4, method="rg", seed=0)
        >>> x, labels = torch.randn(8, 16), torch.zeros(8).long()
        >>> with sao_prune.Distiller(net, teacher, sao_prune.Distillation(blocks=["1"])) as distiller:
        ...     logits = net(x)
        ...     loss = distiller.loss(x, logits, torch.nn.functional.cross_entropy(logits, labels))
        >>> loss.backward()
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, options: Distillation | None = None) -> None:
        for name, model in (("student", student), ("teacher", teacher)):
            if not isinstance(model, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
        options = Distillation() if options is None else options
        if not isinstance(options, Distillation):
            raise TypeError(f"options must be a sao_prune.Distillation, got {options!r}")
        student = student.module if isinstance(student, DistributedDataParallel) else student
        if set(student.modules()) & set(teacher.modules()):
            raise ValueError("student and teacher share modules: take the teacher as a copy.deepcopy, before pruning")
        self.options, self._teacher = options, teacher
        self._pairs = _pairs(options.blocks, student, teacher)
        self._outputs: dict[str, list[Tensor]] = {}
        self._hooks: list[Any] = []
        if self._pairs:
            self._hooks.append(student.register_forward_pre_hook(_Hook(lambda _: self._outputs.clear())))
            self._hooks += _record(student, self._pairs, self._outputs)

    def loss(self, inputs: Any, outputs: Any, task: Tensor | None = None) -> Tensor:
        """The loss of one batch.

        Args:
            inputs: what the student was called with: a tensor, a tuple of positional or a mapping of keyword arguments.
            outputs: what it gave, in training: logits, or an object with ``logits`` as transformers' models return.
            task: the task's own loss; without it the teacher is all there is to learn from.

        Returns:
            A scalar, ``(1 - weight) task + weight T^2 KL(teacher, student) + block_weight blocks``, the divergence a
            mean over all but the dimension of the classes. Without ``task`` the divergence is not weighted.

        Raises:
            TypeError: if the outputs are no logits.
            ValueError: if outputs of student and teacher differ in shape.
            RuntimeError: if the student was not run on the batch, or runs a block another number of times.
        """
        options = self.options
        if task is not None and options.weight == 0 and not self._pairs:
            return task
        learnt = {name: self._outputs.pop(name, []) for name in self._pairs}
        taught, found = self._teach(inputs)
        logits, wanted = _logits("student", outputs), _logits("teacher", taught)
        if logits.shape != wanted.shape:
            raise ValueError(f"the student's logits are {tuple(logits.shape)}, the teacher's {tuple(wanted.shape)}")
        with torch.autocast(logits.device.type, enabled=False):
            total = _divergence(logits, wanted, options.temperature, options.dim)
            if task is not None:
                total = (1 - options.weight) * task + options.weight * total
            if self._pairs:
                total = total + options.block_weight * self._blocks(learnt, found)
        return total

    def close(self) -> None:
        """Take the hooks off the student."""
        while self._hooks:
            self._hooks.pop().remove()
        self._outputs.clear()

    def __enter__(self) -> Distiller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _teach(self, inputs: Any) -> tuple[Any, dict[str, list[Tensor]]]:
        found: dict[str, list[Tensor]] = {}
        hooks = _record(self._teacher, {name: name for name in self._pairs.values()}, found)
        try:
            with evaluating(self._teacher), torch.no_grad():
                return call(self._teacher, inputs), found
        finally:
            for hook in hooks:
                hook.remove()

    def _blocks(self, learnt: Mapping[str, list[Tensor]], taught: Mapping[str, list[Tensor]]) -> Tensor:
        losses = []
        for name, other in self._pairs.items():
            mine, wanted = learnt[name], taught.get(other, [])
            if len(mine) != len(wanted) or not mine:
                raise RuntimeError(
                    f"the student has run {name} {len(mine)} times, the teacher {other} {len(wanted)} times: run the "
                    "student on the batch, with its hooks, before asking for the loss"
                )
            for s, t in zip(mine, wanted):
                if s.shape != t.shape:
                    raise ValueError(
                        f"the student's {name} gives {tuple(s.shape)}, the teacher's {other} {tuple(t.shape)}: name "
                        "blocks of the same shape"
                    )
                scale = t.float().square().mean().clamp_min(torch.finfo(torch.float32).tiny)
                losses.append((s.float() - t.float()).square().mean() / scale)
        return torch.stack(losses).mean()


def _divergence(logits: Tensor, taught: Tensor, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """Kullback-Leibler divergence of softened logits from the teacher's, times the temperature's square, in nats.

    Args:
        logits: of the student.
        taught: of the teacher, of the same shape.
        temperature: of both softmaxes.
        dim: the dimension of the classes; the mean is over all others.

    Example:
        >>> float(_divergence(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()).mul(1000).round())
        131.0
    """
    learnt, wanted = (F.log_softmax(x.float() / temperature, dim) for x in (logits, taught))
    each = F.kl_div(learnt, wanted, reduction="none", log_target=True).sum(dim)
    return each.mean() * temperature**2


class _Hook:
    """A hook that does nothing in copies and pickles of its model."""

    def __init__(self, note: Callable[[Any], None] | None = None) -> None:
        self._note = note

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        if self._note is not None:
            self._note(output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


def _record(model: nn.Module, names: Mapping[str, str], into: dict[str, list[Tensor]]) -> list[Any]:
    """Hooks that add the first tensor of each named module's output to its list."""

    def note(name: str) -> Callable[[Any], None]:
        def add(output: Any) -> None:
            tensor = next((t for t in tree_leaves(output) if isinstance(t, Tensor)), None)
            if tensor is not None:
                into.setdefault(name, []).append(tensor)

        return add

    return [model.get_submodule(name).register_forward_hook(_Hook(note(name))) for name in names]


def _pairs(blocks: Sequence[str] | Mapping[str, str], student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """Names in the student and what each shall be like in the teacher.

    Raises:
        ValueError: if there is no such module.
    """
    known = {"student": dict(student.named_modules()), "teacher": dict(teacher.named_modules())}
    if isinstance(blocks, Mapping):
        found = dict(blocks)
    else:
        found = {}
        for pattern in blocks:
            names = [pattern] if pattern in known["student"] else [n for n in known["student"] if _fits(n, pattern)]
            found.update({name: name for name in names or [pattern]})
    for owner, wanted in (("student", [*found]), ("teacher", [*found.values()])):
        for name in wanted:
            if name not in known[owner]:
                some = ", ".join([n for n in known[owner] if n][:8])
                hint = nearest(name, [*known[owner]])
                raise ValueError(f"blocks: the {owner} has no module {name!r}{hint}; it has {some}, ..")
    return found


def _fits(name: str, pattern: str) -> bool:
    """Whether a glob pattern names a module; a wildcard does not cross a dot, so that it names blocks, not parts."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _logits(owner: str, outputs: Any) -> Tensor:
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the {owner}'s outputs must be a tensor or have logits, got {type(outputs).__name__}")
    return logits

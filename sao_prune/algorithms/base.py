"""What a pruning method is, and the registry that finds one by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..allocation import Allocation
from ..naming import nearest
from ..seeds import named_generator
from ..topology import BlockTopology, make_support, make_topology
from .draw import Draw, Values

TopologySharing = Literal["layer-shape", "none"]


@dataclass(frozen=True)
class ResidualRecord:
    """What was made of one residual block, or of the whole network.

    Attributes:
        name: path that the block's layers share; ``""`` for the whole network.
        status: ``"exact"``, orthogonal up to rounding; ``"near"``, as near as its shapes and norms allow; ``"left"``,
            its layers are drawn like any others.
        note: why it is not exact, and anything else worth knowing.
        before: smallest and largest singular value of its Jacobian before, where they were measured.
        after: the same after.
    """

    name: str
    status: Literal["exact", "near", "left"]
    note: str = ""
    before: tuple[float, float] | None = None
    after: tuple[float, float] | None = None

    def __str__(self) -> str:
        text = f"{self.name or 'network'}: {self.status}" + (f" ({self.note})" if self.note else "")
        for when, values in (("before", self.before), ("after", self.after)):
            if values is not None:
                low, high = (value if value > 1e-12 else 0 for value in values)
                text += f"; singular values {when} {low:.6g} .. {high:.6g}"
        return text


@dataclass(frozen=True)
class Settlement:
    """What a method does to a model beside its draws.

    Attributes:
        values: new values of other parameters and buffers, by full name.
        notes: remarks for the report on weights, by full name.
        residuals: what was made of the residual blocks.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    residuals: tuple[ResidualRecord, ...] = ()


@dataclass(frozen=True)
class Stage:
    """Where a schedule stands when a method is asked for its next masks.

    Attributes:
        allocations: what each weight is asked for now.
        final: what each is asked for at the end.
        units: what stays until now: boolean ``(parts, m, n)`` masks, of a `Method.fine` one ``(parts, m, n, *kernel)``.
        step: optimizer steps so far.
        decay: of methods that move, the factor on how much moves now, from 1 to 0.
        gradients: for a method that `Method.hears`, of the loss by each weight as if it were dense, from the last
            optimizer step, averaged over all ranks; ``None`` for a weight that none reached.
        topologies: of methods that move, the block topology of every part of a weight, ``None`` where it is yet to be
            found in the mask.
    """

    allocations: Sequence[Allocation]
    final: Sequence[Allocation]
    units: Sequence[Tensor]
    step: int = 0
    decay: float = 1.0
    gradients: Sequence[Tensor | None] = ()
    topologies: Sequence[tuple[BlockTopology, ...] | None] = ()


@dataclass(frozen=True)
class Method:
    """A way to choose which entries stay and what values they get; subclasses are frozen dataclasses of options.

    Attributes:
        name: what users call it.
        layerwise: whether every layer is held to its own share of the budget.
    """

    name: ClassVar[str] = ""
    layerwise: ClassVar[bool] = True

    @property
    def moving(self) -> bool:
        """Whether `revise` moves entries at a constant number of them, by a `sao_prune.Moves`."""
        return False

    @property
    def hears(self) -> bool:
        """Whether `revise` needs the gradients of entries that are masked out."""
        return False

    @property
    def fine(self) -> bool:
        """Whether single weights of a convolution's kernels come and go, instead of whole kernels."""
        return False

    @property
    def structured(self) -> bool:
        """Whether supports are block topologies, so that group counts apply."""
        return False

    @property
    def origin(self) -> Values:
        """Where values come from, as the report of `plan` has it; by default they are kept."""
        return "kept"

    def bind(self, model: nn.Module, example_input: Any) -> Method:
        """The method for one model, which stays as it is; by default the method itself.

        Args:
            model: the model, weights perhaps on the meta device.
            example_input: what the user gave, or ``None``.
        """
        return self

    def settle(self, model: nn.Module, allocations: Sequence[Allocation], draws: Sequence[Draw]) -> Settlement:
        """What else is to be done beside the draws; touches nothing. By default what the draws bring along."""
        values = {name: value for draw in draws for name, value in draw.also.items()}
        return Settlement(values, {draw.weight.name: draw.note for draw in draws if draw.note})

    def residuals(self, allocations: Sequence[Allocation]) -> tuple[ResidualRecord, ...]:
        """What will be made of the model's residual blocks; none by default."""
        return ()

    def preview(self, allocations: Sequence[Allocation]) -> list[tuple[int | None, int]]:
        """For each weight the group count, if there is one, and the edges over all parts that `draw` would give it."""
        out: list[tuple[int | None, int]] = []
        for allocation in allocations:
            parts, (rows, cols) = allocation.weight.parts, allocation.weight.matrix
            if self.structured:
                out.append((allocation.groups, allocation.edges * parts))
            elif self.layerwise and allocation.weight.stacked:
                out.append((None, parts * round(allocation.density * rows * cols)))
            else:
                out.append((None, round(allocation.density * parts * rows * cols)))
        return out

    def draw(self, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """Decide for all weights at once, touching none.

        Args:
            allocations: what each weight is asked for, in the order of the model.
            weights: the weights themselves, in the same order.
            seed: base seed; every weight derives its own generator from it and its name.

        Raises:
            TypeError: if the method does not say how it draws.
        """
        raise TypeError(f"{type(self).__name__} does not say how it draws")

    def draw_for(
        self, model: nn.Module, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int
    ) -> list[Draw]:
        """As `draw`, with the whole model to look at: for methods that run it. It must stay as it is."""
        return self.draw(allocations, weights, seed)

    @property
    def gradual(self) -> bool:
        """Whether `revise` is there, so that a schedule can prune with it over time."""
        return False

    def revise(self, model: nn.Module, stage: Stage, weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """The next masks of a schedule, and values where they change. Like `draw_for` it touches nothing.

        Methods that prune stay inside ``stage.units``; one that moves its topology may leave them.

        Args:
            model: with the masks of ``stage.units`` on it.
            stage: what is asked for and what there is.
            weights: the masked weights, in the order of the allocations.
            seed: base seed, the same at every stage.

        Raises:
            TypeError: if the method does not prune over time.
        """
        raise TypeError(f"{type(self).__name__} does not prune over time")


_REGISTRY: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: make a method known by its ``name``.

    The class derives from `Method` and says in `Method.draw` which entries of each weight stay. It is made without
    arguments where users name it, so all its options have defaults.

    Args:
        cls: the method; registered anew, as a notebook does, it replaces the one of its name and module.

    Returns:
        The class.

    Raises:
        TypeError: if it is no method.
        ValueError: if its name is empty or another method's.

    Example:
        >>> @register
        ... @dataclass(frozen=True)
        ... class Diagonal(Method):
        ...     name = "diagonal"
        ...     def draw(self, allocations, weights, seed):
        ...         return [Draw(a.weight, units=torch.eye(*a.weight.matrix)[None] > 0) for a in allocations]
        >>> "diagonal" in methods()
        True
        >>> del _REGISTRY["diagonal"]
    """
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise TypeError(f"a method is a subclass of sao_prune.Method, got {cls!r}")
    known = _REGISTRY.get(cls.name)
    if not cls.name or (known and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__)):
        raise ValueError(f"{cls.__name__} needs a name of its own, got {cls.name!r}; taken: {', '.join(methods())}")
    _REGISTRY[cls.name] = cls
    return cls


def methods() -> tuple[str, ...]:
    """Names of all methods that `sao_prune.apply` knows.

    Returns:
        The names, sorted.

    Example:
        >>> import sao_prune
        >>> {"sao", "rg", "gmp", "lmp", "lrp"} <= set(sao_prune.methods())
        True
    """
    return tuple(sorted(_REGISTRY))


def resolve(method: str | Method) -> Method:
    """A method from its name or an instance with options.

    Args:
        method: the name or the instance.

    Returns:
        The instance; of a name, one with the default options.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything else.

    Example:
        >>> import sao_prune
        >>> resolve("sao") == sao_prune.SAO()
        True
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        if method not in _REGISTRY:
            raise ValueError(f"unknown method {method!r}{nearest(method, methods())}; known: {', '.join(methods())}")
        return _REGISTRY[method]()
    hint = f"; did you mean {method.__name__}()?" if isinstance(method, type) else ""
    raise TypeError(f"method must be a name or an instance such as SAO(gain=1.1), got {method!r}{hint}")


def choice(option: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse an option value that is not among the allowed ones.

    Raises:
        ValueError: naming the nearest allowed one.
    """
    if isinstance(value, bool) or value not in allowed:
        hint = nearest(value, allowed)
        raise ValueError(f"{option} must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")


class TopologyDrawer:
    """Makes block topologies for many weights; equal shapes share one unless ``unique``.

    Matrices that ask for their ``own`` get it: those of a stack, experts that all read the same inputs.
    """

    def __init__(self, kind: str, seed: int, *, unique: bool) -> None:
        self._kind, self._seed, self._unique = kind, seed, unique
        self._shared: dict[tuple[object, ...], BlockTopology] = {}

    def __call__(
        self, rows: int, cols: int, *, groups: int, nnz: int | None, name: tuple[object, ...], own: bool = False
    ) -> BlockTopology:
        key: tuple[object, ...] = (self._kind, rows, cols, groups, nnz)
        if self._unique or own:
            key = (*key, *name)
        if key not in self._shared:
            self._shared[key] = make_topology(
                self._kind,
                rows,
                cols,
                groups=groups if nnz is None else None,
                nnz=nnz,
                generator=named_generator(self._seed, "topology", *key),
            )
        return self._shared[key]


class SupportDrawer:
    """Makes supports that are plain masks; equal shapes share one unless ``unique`` or the kind minds the place.

    The matrices of a stack have each its own in any case.
    """

    def __init__(self, kind: str, seed: int, *, unique: bool) -> None:
        self._kind, self._seed, self._unique = kind, seed, unique or kind == "radix"
        self._shared: dict[tuple[object, ...], Tensor] = {}

    def __call__(self, allocation: Allocation, place: int) -> Tensor:
        """One mask a part, ``(parts, m, n)``."""
        weight = allocation.weight
        rows, cols = weight.matrix
        masks = []
        for part in range(weight.parts):
            key: tuple[object, ...] = (self._kind, rows, cols, allocation.density)
            key = (*key, weight.name, part) if self._unique or weight.stacked else key
            if key not in self._shared:
                generator = named_generator(self._seed, "topology", *key)
                try:
                    mask = make_support(self._kind, rows, cols, allocation.density, place=place, generator=generator)
                except ValueError as error:
                    raise ValueError(f"{weight.name}: {error}") from None
                self._shared[key] = mask
            masks.append(self._shared[key])
        return torch.stack(masks)

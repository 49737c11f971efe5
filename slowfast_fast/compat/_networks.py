"""Whole networks of other libraries as blocks of nn/ in a row; see _reading.py."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..nn.fused import Step, is_observed
from ..nn.net import DetectionBBoxNetwork, MultiPathWayWithFuse, Net
from ..nn.network_units import Contiguous, Sampling, TwoPathways
from ..nn.stage import ResStage
from ..nn.stem import ResNetBasicStem
from ..nn.units import UNIT, Residual, forward_class, part, steps_of, stock_class
from ._accelerate import LIBRARIES
from ._library import Whole
from ._reading import Seen, fusion_of, in_a_row, is_open, read, read_or_keep, residual_blocks, run_with, stem


@dataclass(frozen=True)
class Network:
    """A whole network: blocks of nn/ in a row, and what comes before or after."""

    blocks: list[nn.Module]
    sampling: Sampling | None = None  # by which it takes the pathways' frames of one clip
    detection_head: nn.Module | None = None  # takes features and boxes


def read_network(module: nn.Module) -> Network | None:
    """What a network of this package or another library is made of; None for anything else."""
    if type(module) is Net:
        return Network(list(module.blocks))
    name, unit = forward_class(type(module)).__name__, getattr(type(module), UNIT, None)
    if type(module) is not DetectionBBoxNetwork and is_observed(module):
        return None
    if name == "DetectionBBoxNetwork" and _detects(module):
        detector: Any = module
        body = None if is_observed(detector.model) else read_network(detector.model)
        head = read(detector.detection_head) or detector.detection_head
        return None if body is None else Network(body.blocks, detection_head=head)
    if isinstance(unit, TwoPathways):
        return _two_pathways(module, unit) if is_open(module) else None
    if name == "Net" and in_a_row(module, "blocks"):
        blocks = [read_or_keep(block) for block in cast("nn.ModuleList", module.blocks)]
        if not blocks or any(block is None for block in blocks) or not _is_stem(cast(nn.Module, blocks[0])):
            return None
        return Network(cast("list[nn.Module]", blocks))
    for whole in (library.networks[name] for library in LIBRARIES if name in library.networks):
        network = _network(module, whole) if is_open(module) else None
        if network is not None and _flows_so(module, whole):
            return network
    return None


def _is_stem(block: nn.Module) -> bool:
    if type(block) is MultiPathWayWithFuse:
        return all(part is not None and _is_stem(part) for part in block.multipathway_blocks)
    return type(block) is ResNetBasicStem and isinstance(block.conv, nn.Conv3d)


def _joined(pathways: Sequence[nn.Module | None], lateral: nn.Module | None) -> nn.Module | None:
    """The pathways' blocks, and what joins them; None where one of both is not known."""
    fusion = None if lateral is None else fusion_of(lateral)
    if any(pathway is None for pathway in pathways) or (lateral is not None and fusion is None):
        return None
    return MultiPathWayWithFuse(multipathway_blocks=nn.ModuleList(pathways), multipathway_fusion=fusion)  # type: ignore[arg-type]


def _two_pathways(module: nn.Module, unit: TwoPathways) -> Network | None:
    stages = list(unit.stages(module))
    laterals = [part(module, lateral) for lateral, _, _ in stages]
    pathways: list[Any] = [[stem([step for named in both for step in steps_of(module, named)]) for both in unit.stems]]
    pathways += [[read_or_keep(part(module, name)) for name in names] for _, *names in stages]
    rows = [_joined(both, lateral) for both, lateral in zip(pathways, [*laterals, None], strict=True)]
    if any(row is None for row in rows):
        return None
    return Network([*cast("list[nn.Module]", rows), *unit.head_blocks(module)], unit.sampling(module))


def _network(module: nn.Module, whole: Whole) -> Network | None:
    """With a head that takes boxes apart."""
    try:
        rows, blocks = _rows(module, whole), list(whole.head(module))
    except (AttributeError, TypeError, ValueError):  # a namesake that is made of other parts
        return None
    if rows is None or not _is_stem(rows[0]):
        return None
    if whole.held is not None:
        (head,) = blocks
        known = read(head)
        blocks = list(known) if type(known) is nn.Sequential else [known or head]
        if len(inspect.signature(type(head).forward).parameters) > 2:
            return Network([*rows, *blocks[:-1]], detection_head=blocks[-1])
    return Network([*rows, *blocks])


def _rows(module: nn.Module, whole: Whole) -> list[nn.Module] | None:
    """The blocks before the head; None where something is not known."""
    rows: list[nn.Module | None] = []
    for pathways, lateral in whole.rows(module):
        lines = [_line(steps) for steps in pathways]
        rows.append(lines[0] if whole.alone and lateral is None else _joined(lines, lateral))
    return None if any(row is None for row in rows) else cast("list[nn.Module]", rows)


def _line(steps: Sequence[Step]) -> nn.Module | None:
    """A stem, a stage, or a pool."""
    if any(isinstance(step, tuple) for step in steps):
        return stem(steps)
    modules = cast("Sequence[nn.Module]", steps)
    if len(modules) == 1 and not isinstance(getattr(type(modules[0]), UNIT, None), Residual):
        return modules[0] if type(modules[0]) is nn.MaxPool3d else read(modules[0])
    blocks: list[nn.Module] = []
    for block in modules:
        unit = getattr(type(block), UNIT, None)
        found = residual_blocks(block, unit) if isinstance(unit, Residual) else None
        if found is None and not isinstance(unit, Contiguous):
            return None
        blocks += found or [read(block) or block]
    return ResStage(nn.ModuleList(blocks)) if blocks else None


class _StandIn(nn.Module):
    """A map of its own that costs nothing, in place of a step: another order, another input, or frames or channels in
    another place show in the result."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.factors = torch.rand(4, generator=generator).tolist()

    def forward(self, x: Any, *others: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [self._of(x[0]) + self._of(x[-1]), *x[1:]]
        return self._of(x)

    def _of(self, x: Tensor) -> Tensor:
        one, *shifted = self.factors
        return one * x + sum(factor * x.roll(1, dim) for factor, dim in zip(shifted, (1, 2, 4), strict=True)) + one


def _flows_so(module: nn.Module, whole: Whole) -> bool:
    """Whether a network gives what its rows and its head do, with stand-ins for all steps and a head that it holds."""
    generator = torch.Generator().manual_seed(0)
    rows = whole.rows(module)
    stand_ins: dict[int, Any] = {}

    def of(step: nn.Module) -> Any:
        return stand_ins.setdefault(id(step), _StandIn(generator))

    lines = [[[*_modules(steps, of)] for steps in pathways] for pathways, _ in rows]
    laterals = [None if lateral is None else of(lateral) for _, lateral in rows]
    held = [of(head) for head in whole.head(module)] if whole.held else []
    try:
        stub = copy.deepcopy(module, dict(stand_ins)).to("cpu", torch.float32).eval()
        linear = [layer for layer in stub.modules() if isinstance(layer, nn.Linear)]
        channels = linear[0].in_features if linear else 2
        x: Any = [torch.randn(2, channels, 4, 2, 2, generator=generator) for _ in lines[0]]
        with torch.no_grad():
            got = stock_class(type(stub)).forward(stub, x[0] if whole.alone else list(x))
            for pathways, lateral in zip(lines, laterals, strict=True):
                x = [_through(steps, clip) for steps, clip in zip(pathways, x, strict=True)]
                x = x if lateral is None else lateral(x)
            x = _through(held or [head.float() for head in whole.head(stub)], x[0] if whole.alone else x)
    except Exception:  # whatever somebody else's forward may raise
        return False
    same = zip(tree_leaves(got), tree_leaves(x), strict=True) if len(tree_leaves(got)) == len(tree_leaves(x)) else ()
    return [torch.allclose(a, b) for a, b in same].count(True) == len(tree_leaves(x))


def _modules(steps: Sequence[Step], of: Callable[[nn.Module], Any]) -> Iterator[Any]:
    for step in steps:
        yield from (of(layer) for layer in (step if isinstance(step, tuple) else (step,)) if layer is not None)


def _through(steps: Iterable[Any], x: Any) -> Any:
    for step in steps:
        x = step(x)
    return x


def _detects(module: nn.Module) -> bool:
    """Whether all that ``module`` does is to call ``detection_head`` with what ``model`` gives, and with boxes."""
    if sorted(module._modules) != ["detection_head", "model"]:
        return False
    calls: list[Any] = []
    x, features, bboxes = object(), object(), object()
    scores = torch.rand(1, 2, 1, 1, 1)
    stand_ins = {"model": Seen(features, calls), "detection_head": Seen(scores, calls)}
    given = run_with(module, stand_ins, x, bboxes)
    asked = [list(call) for call in calls] == [[x], [features, bboxes]]
    return asked and isinstance(given, Tensor) and given.shape == (1, 2) and bool((given == scores.flatten(1)).all())

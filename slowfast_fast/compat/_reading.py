"""Another library's blocks as those of nn/, made of the very same layers: what ``freeze`` takes.

A block is read only where nobody could tell the difference: all of it is known, and no module that would not be called
any more is watched.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from ..nn.bottleneck import BasicBlock, BottleneckBlock
from ..nn.fused import Step, is_observed
from ..nn.lateral import FuseFastToSlow
from ..nn.net import MultiPathWayWithFuse, PoolConcatPathway
from ..nn.network_units import Counterpart
from ..nn.stage import ResBlock, ResStage, add
from ..nn.stem import ResNetBasicStem
from ..nn.units import UNIT, Chain, Lateral, Residual, Unit, forward_class, open_steps, part, steps_of, stock_class
from . import _viewed


def read(module: nn.Module) -> nn.Module | None:
    """The block of nn/ that computes what ``module`` does; None where there is none.

    A Sequential stands for blocks of which each takes what the one before it gave.
    """
    if not is_open(module):
        return None
    unit = getattr(type(module), UNIT, None)
    if isinstance(unit, Chain):
        return _chain(module, unit)
    if isinstance(unit, Residual):
        blocks = residual_blocks(module, unit)
        return None if blocks is None else blocks[0] if len(blocks) == 1 else ResStage(nn.ModuleList(blocks))
    if isinstance(unit, Lateral):
        return MultiPathWayWithFuse(
            multipathway_blocks=nn.ModuleList([None, None]),  # type: ignore[list-item]
            multipathway_fusion=fusion_of(module),
        )
    if isinstance(unit, Counterpart):
        return _counterpart(module, unit)
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return _stage(module)
    if forward_class(type(module)).__name__ == "ResStage" and in_a_row(module, "res_blocks"):
        return _stage(cast("nn.ModuleList", module.res_blocks))
    return _viewed.read(module)


def read_or_keep(module: nn.Module) -> nn.Module | None:
    """``read``, or the module itself where it holds nothing that could be read by itself."""
    known = any(hasattr(type(inner), UNIT) for inner in module.modules())
    return read(module) or (None if known else module)


def is_open(module: nn.Module) -> bool:
    """Whether nobody watches what would not be called any more: all modules but layers, and those that may stand in
    for themselves."""
    for inner in module.modules():
        unit: Unit | None = getattr(type(inner), UNIT, None)
        if unit is not None and unit.stock_if is not None and unit.stock_if(inner) is not None:
            return False
        if is_observed(inner) and any(inner.children()):
            return False
    return not is_observed(module)


def _chain(module: nn.Module, unit: Chain) -> nn.Module | None:
    layers = [layer.parts(module) for layer in unit.chain]
    then = [held for held in (part(module, name) for name in unit.then) if held is not None]
    if len(then) > 1:
        return None
    stems = [
        ResNetBasicStem(conv=conv, norm=norm, activation=act, pool=then[0] if then and last else None)
        for (conv, norm, act), last in zip(layers, [False] * (len(layers) - 1) + [True], strict=True)
    ]
    return stems[0] if len(stems) == 1 else nn.Sequential(*stems)


def residual_blocks(module: nn.Module, unit: Residual) -> list[nn.Module] | None:
    """The residual block, and what is called behind it."""
    branch = _branch([step for named in unit.branch for step in steps_of(module, named)])
    shortcut = steps_of(module, unit.shortcut)
    if branch is None or len(shortcut) > 1 or not all(isinstance(step, tuple) and step[2] is None for step in shortcut):
        return None
    conv, norm, _ = cast(Any, shortcut[0]) if shortcut else (None, None, None)
    behind = [held for held in (part(module, name) for name in unit.then) if held is not None]
    return [ResBlock(conv, norm, branch, part(module, unit.act), add), *(read(held) or held for held in behind)]


def _branch(steps: list[Step]) -> nn.Module | None:
    if not all(isinstance(step, tuple) for step in steps) or len(steps) not in (2, 3) or cast(Any, steps[-1])[2]:
        return None
    parts: dict[str, Any] = {}
    for letter, (conv, norm, act) in zip("abc", cast(Any, steps), strict=False):
        parts |= {f"conv_{letter}": conv, f"norm_{letter}": norm, f"act_{letter}": act}
    del parts[f"act_{'abc'[len(steps) - 1]}"]
    return BasicBlock(**parts) if len(steps) == 2 else BottleneckBlock(**parts)


def _stage(blocks: nn.Sequential | nn.ModuleList) -> ResStage | None:
    read_blocks: list[nn.Module] = []
    for block in blocks:
        unit = getattr(type(block), UNIT, None)
        found = residual_blocks(block, unit) if isinstance(unit, Residual) else None
        if found is None:
            return None
        read_blocks += found
    return ResStage(nn.ModuleList(read_blocks)) if read_blocks else None


def _counterpart(module: Any, unit: Counterpart) -> nn.Module | None:
    if unit.ours is PoolConcatPathway:
        return PoolConcatPathway(module.retain_list, module.pool)
    held = list(module.multipathway_blocks)
    blocks = [None if block is None else read_or_keep(block) for block in held]
    if blocks.count(None) != held.count(None):
        return None
    fusion = module.multipathway_fusion
    if isinstance(getattr(type(fusion), UNIT, None), Lateral):
        fusion = fusion_of(fusion)
    return MultiPathWayWithFuse(multipathway_blocks=nn.ModuleList(blocks), multipathway_fusion=fusion)  # type: ignore[arg-type]


def stem(steps: Sequence[Step]) -> nn.Module | None:
    """Of a layer and perhaps a pool."""
    first, pool = (*steps, None)[:2] if len(steps) in (1, 2) else (None, None)
    if not isinstance(first, tuple) or isinstance(pool, tuple):
        return None
    conv, norm, act = first
    return ResNetBasicStem(conv=conv, norm=norm, activation=act, pool=pool)


def fusion_of(lateral: nn.Module) -> nn.Module | None:
    """Of a module that is a lateral connection as a whole, or only its convolution with what follows."""
    unit = getattr(type(lateral), UNIT, None)
    if isinstance(unit, Lateral):
        return FuseFastToSlow(*unit.layer.parts(lateral))
    steps = open_steps(lateral)
    return FuseFastToSlow(*steps[0]) if len(steps) == 1 and isinstance(steps[0], tuple) else None


class Seen(nn.Module):
    """Stands in for a module, and keeps what it was called with."""

    def __init__(self, gives: Any, calls: list[Any]) -> None:
        super().__init__()
        self.gives, self.calls = gives, calls

    def forward(self, *inputs: Any) -> Any:
        self.calls.append(inputs)
        return self.gives


def run_with(module: nn.Module, stand_ins: Mapping[str, nn.Module], *inputs: Any) -> Any:
    """``module`` called with stand-ins for its children; None where that does not work."""
    stub = copy.copy(module)
    stub._modules = {**module._modules, **stand_ins}
    try:
        return stock_class(type(module)).forward(stub, *inputs)
    except Exception:  # whatever somebody else's forward may raise
        return None


def in_a_row(module: nn.Module, name: str) -> bool:
    """Whether all that ``module`` does is to call the modules of its only child, a list, one after the other."""
    if list(module._modules) != [name] or not isinstance(module._modules[name], nn.ModuleList):
        return False
    calls: list[Any] = []
    count = len(cast(nn.ModuleList, module._modules[name]))
    tokens = [object() for _ in range(count + 1)]
    rows = nn.ModuleList(Seen(token, calls) for token in tokens[1:])
    given = run_with(module, {name: rows}, tokens[0])
    return given is tokens[-1] and [list(call) for call in calls] == [[token] for token in tokens[:-1]]

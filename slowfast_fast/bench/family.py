"""Every model that has a name as a case: its eval forward, frozen, against its layers as stock PyTorch runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .. import freeze
from ..models.costs import cost, fitted
from ..models.registry import entry
from ..nn.net import MultiPathWayWithFuse, Net
from ..nn.stem import ResNetBasicStem
from .cases import ELEMENT_SIZE
from .clips import Clips
from .leg import Leg
from .network import FROZEN, NetworkCase, random_state
from .variants import Runner


class FamilyCase(NetworkCase):
    """A registered model on the clips of a leg; of a detection network, the features that its head takes."""

    @property
    def name(self) -> str:
        return f"model {self.network} batch {self.batch} at {self.crop} {self.direction}"

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """Shapes of the clips."""
        clips = entry(self.network).clips(self.crop, self.batch, device="meta")
        return [tuple(clip.shape) for clip in (clips if isinstance(clips, list) else [clips])]

    @property
    def bytes(self) -> int:
        values = _cost(self.network, self.crop).parameters + sum(torch.Size(size).numel() for size in self.sizes)
        return values * ELEMENT_SIZE[self.dtype]

    @property
    def flops(self) -> int:
        return round(2e9 * _cost(self.network, self.crop).gflops) * self.batch


class FamilyProblem:
    """Clips and weights of a case, shared by its variants."""

    def __init__(self, case: FamilyCase, device: torch.device, seed: int = 0) -> None:
        if case.direction != "fwd":
            raise ValueError(
                f"direction: expected fwd, which registered models are measured in, got {case.direction!r}"
            )
        self.case, self.device = case, device
        self.clips = Clips(case.sizes, case.dtype, device, seed)
        self.state = random_state(self._create().to_empty(device="cpu"), seed)

    def model(self, dtype: torch.dtype) -> nn.Module:
        model = self._create()
        state = {key: value.to(self.device, copy=True) for key, value in self.state.items()}
        model.load_state_dict(state, assign=True)
        return model.to(dtype).eval()

    def stock(self, memory_format: torch.memory_format) -> Runner:
        """Every layer as a module of PyTorch's, in a layout."""
        model = self.model(self.case.dtype).to(memory_format=memory_format)  # type: ignore[call-overload]
        clips = self.clips.laid_out(memory_format)
        return _evaluated(lambda: _as_stock(model, self._argument(clips)))

    def exact(self) -> dict[str, Tensor]:
        """The results of the clips that are checked, one after the other, by stock in float64."""
        model = self.model(torch.float64)

        def rows(clip: int) -> Tensor:
            return _evaluated(lambda: _as_stock(model, self._argument(self.clips.alone(clip))))()["y"]

        return {"y": torch.cat([rows(clip) for clip in self.clips.checked])}

    def frozen(self) -> Runner:
        network = freeze(self.model(torch.float32), dtype=self.case.dtype)
        clips = self.clips.laid_out(torch.channels_last_3d)
        return _evaluated(lambda: network(self._argument(clips)))

    def _argument(self, clips: list[Tensor]) -> Any:
        """The clips as the network takes them: a list of both pathways', or the tensor of its only one."""
        return clips if entry(self.case.network).alpha is not None else clips[0]

    def _create(self) -> nn.Module:
        with torch.device("meta"):  # drawing initial weights would take longer than most cases
            known = entry(self.case.network)
            model = known.create(**fitted(known.name, self.case.crop))
        return model.model if known.boxes else model  # type: ignore[return-value]


FAMILY: dict[str, Callable[[FamilyProblem], Runner]] = {
    "stock": lambda problem: problem.stock(torch.contiguous_format),
    "stock channels_last_3d": lambda problem: problem.stock(torch.channels_last_3d),
    FROZEN: FamilyProblem.frozen,
}


def speeds(document: Mapping[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Of a run's document, for the table of models: headings, and for each model this package's clips a second and how
    many times faster that is than either form of stock."""
    stock = [name for name in FAMILY if name != FROZEN]
    rows = {}
    for case in document["cases"]:
        found, network = case["variants"], case["shape"].get("network")
        if FROZEN in found:
            ours = found[FROZEN]
            ratios = [f"{found[name]['median'] / ours['median']:.2f}" if name in found else "" for name in stock]
            rows[network] = [f"{ours['clips_per_second']:.2f}", *ratios]
    return ["clips/s", *(f"x {name}" for name in stock)], rows


def caption(document: Mapping[str, Any]) -> str:
    """What the figures of ``speeds`` are of, and where and how they were measured."""
    machine, versions, settings = (document[key] for key in ("machine", "versions", "settings"))
    legs = "; ".join(str(Leg(**leg)) for leg in settings["legs"])
    wait = machine.get("omp_wait_policy")
    threads = f"{machine['threads']} threads" + (f" (OMP_WAIT_POLICY={wait})" if wait else "")
    unfinished = "" if document.get("finished", True) else "An unfinished run. "
    return (
        f"{unfinished}Clips/s of frozen networks ({legs}), and how many times faster that is than stock, by medians of "
        f"{settings['rounds']} interleaved rounds: {machine['cpu']}, {threads}, {machine['cpu_capability']}, "
        f"torch {versions['torch']}, commit {versions['commit'][:12]}, "
        f"{document['date'][:10]}; load average before the run {machine['load_average']}."
    )


_cost = lru_cache(cost)


def _evaluated(run: Callable[[], Any]) -> Runner:
    @torch.inference_mode()
    def evaluate() -> dict[str, Tensor]:
        out = run()
        return {"y": out if isinstance(out, Tensor) else torch.cat([part.flatten(1) for part in out], 1)}

    return evaluate


@contextmanager
def _modules_alone():
    """No op stands in for modules, as someone watches them all."""
    handle = register_module_forward_pre_hook(lambda module, arguments: None)
    try:
        yield
    finally:
        handle.remove()


def _as_stock(model: nn.Module, x: Any) -> Any:
    with _modules_alone():
        return _layer_by_layer(model, x)


def _layer_by_layer(module: nn.Module, x: Any) -> Any:
    """What ``module`` computes, without the blocks that lay out their input as rows: the layout stays that of x."""
    if isinstance(module, Net):
        for block in module.blocks:
            x = _layer_by_layer(block, x)
        return x
    if isinstance(module, MultiPathWayWithFuse):
        out = [_layer_by_layer(block, part) for block, part in zip(module.multipathway_blocks, x, strict=True)]
        return out if module.multipathway_fusion is None else module.multipathway_fusion(out)
    if isinstance(module, ResNetBasicStem):
        for part in (module.conv, module.norm, module.activation, module.pool):
            x = x if part is None else part(x)
        return x
    return module(x)

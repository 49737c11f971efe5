"""What every frozen model is, and the frozen form of a model whose own ``forward`` goes on calling its parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..explanation import note, recording
from ..nn.fused import is_observed
from .folding import OBSERVED
from .graphs import CudaGraphs

Self = TypeVar("Self", bound="Inference")


class Inference(nn.Module):
    """A model for inference: it has no gradient and no training mode, takes clips of its ``dtype`` on its device, and
    ignores autocast.

    Its ``state_dict`` holds the folded weights: ``load_state_dict`` takes that of another model frozen from the same
    architecture to the same dtype. ``to(device)`` moves it; weights are prepared anew, for the new device, at the next
    call of each shape of clips.
    """

    def __init__(self, dtype: torch.dtype, cuda_graph: bool) -> None:
        super().__init__()
        self.dtype = dtype
        self.cuda_graph = cuda_graph
        # By what a call is besides its tensors.
        self._graphs: dict[Any, CudaGraphs] = {}

    def _replay(self, function: Callable[..., Any], *inputs: Any, **keywords: Any) -> Any:
        """``function(*inputs, **keywords)`` as a CUDA graph of the tensors in it."""
        leaves, spec = tree_flatten((inputs, keywords))
        places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        others = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        strange = next((leaf for leaf in others if not isinstance(leaf, (bool, int, float, str, type(None)))), None)
        if strange is not None:  # nobody knows when it would be the same call
            warnings.warn(
                f"cuda_graph=True runs without a graph here: the call has a {type(strange).__name__}",
                RuntimeWarning,
                stacklevel=5,
            )
            return function(*inputs, **keywords)

        def run(tensors: list[Tensor]) -> Any:
            filled = list(others)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            inputs, keywords = tree_unflatten(filled, spec)
            return function(*inputs, **keywords)

        graphs = self._graphs.setdefault((spec, others), CudaGraphs(run))
        return graphs([leaves[place] for place in places])

    def _check_clip(self, said: str, clip: Tensor) -> None:
        if clip.dtype != self.dtype:
            raise TypeError(
                f"{said} must be {self.dtype}, for which the network was frozen; got {clip.dtype}: convert the "
                f"clip, or freeze the model with dtype={clip.dtype}"
            )
        if clip.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{said} must not require a gradient, which a frozen network does not have: detach it, or take "
                "the model that was frozen"
            )

    def _check_device(self, said: str, clip: Tensor) -> None:
        device = next(self.buffers()).device
        if clip.device != device:
            raise ValueError(f"{said} must be on {device}, as the network is; got {clip.device}: move one of them")

    def train(self: Self, mode: bool = True) -> Self:
        """Only ``train(False)``: a frozen network has nothing to train. Raises RuntimeError else."""
        if mode:
            raise RuntimeError(
                "a frozen network cannot train: its BatchNorm is folded into the weights. Train the model that it was "
                "made from, and call slowfast_fast.freeze on that again"
            )
        return super().train(False)

    def _forget(self) -> None:
        for graphs in self._graphs.values():
            graphs.clear()
        self._graphs = {}

    def _apply(self: Self, fn: Any, recurse: bool = True) -> Self:
        self._forget()
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Where a module that holds this one loads, too.
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": {}}


class FrozenModel(Inference):
    """What :func:`slowfast_fast.freeze` returns for a model that it does not know as a whole: a copy of it, of which
    the known parts are frozen, with the call that it had.

    ``module`` is the copy. explain() shows what runs as it did.
    """

    def __init__(self, module: nn.Module, frozen: Iterable[nn.Module], dtype: torch.dtype, cuda_graph: bool) -> None:
        super().__init__(dtype, cuda_graph)
        self.module = module
        within = {id(part) for piece in frozen for part in piece.modules()}
        for part in module.modules():
            if id(part) not in within:
                part.requires_grad_(False)._apply(self._cast, recurse=False)
        self._rest = [path for path, part in module.named_modules() if id(part) not in within]
        super().train(False)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """As the original, for clips of ``dtype``; raises TypeError or ValueError for others."""
        leaves = tree_leaves((inputs, keywords))
        clips = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() >= 5]
        for clip in clips:
            self._check_clip(f"a clip, of shape {tuple(clip.shape)},", clip)
            self._check_device(f"a clip, of shape {tuple(clip.shape)},", clip)
        if torch.compiler.is_compiling():
            return self.module(*inputs, **keywords)
        device = clips[0].device.type if clips else "cpu"
        with torch.no_grad(), torch.autocast(device, enabled=False):
            if recording():
                for path in self._rest:
                    self._note(path)
            elif self.cuda_graph:
                return self._replay(self.module, *inputs, **keywords)
            return self.module(*inputs, **keywords)

    def _note(self, path: str) -> None:
        """Tell explain() why the module at a path runs as it did."""
        part = self.module.get_submodule(path)
        if any(part.children()):
            return
        owner = self.module.get_submodule(path.rpartition(".")[0])
        observed = OBSERVED if is_observed(owner) or is_observed(part) else "no frozen layer stands for it"
        note((part,), None, f"{type(owner).__name__} runs as it did: {observed}")

"""2-D ResNet weights for 3-D networks (Carreira and Zisserman, "Quo Vadis, Action Recognition?", CVPR 2017)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

INITS = ("centre", "mean")


def inflate_2d(state_dict: Mapping[str, Tensor], model: nn.Module, *, init: str = "centre") -> dict[str, Tensor]:
    """The ``state_dict`` for ``model`` that 2-D ResNet weights give, under torchvision's names.

    A (K, C, h, w) weight becomes (K, C, kt, h, w) with the kt that the layer has in ``model``. ``num_batches_tracked``,
    and the classifier where it has another number of classes, stay as they are in ``model``.

    Args:
        state_dict: of a torchvision ``ResNet``: "conv1.weight", "layer1.0.bn2.running_mean", "fc.bias" and so on.
        model: a network of one pathway, of ``create_resnet`` or ``create_model``, with the same depth and widths.
        init: "centre": the weight at the middle of kt, zeros at the others; "mean": the weight over kt at each. With
            either, a clip whose frames are all the same gives in every frame what the image gives, away from the
            clip's ends (with "centre", at its ends as well).

    Returns:
        What ``model.load_state_dict`` takes, in the dtypes of ``model``.

    Raises:
        ValueError: ``init`` is another; a key is none of a ResNet, or has no layer in ``model``; a layer of ``model``
            has no key; shapes do not fit. The message names it.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}")
    target = model.state_dict()
    # Stages are numbered without the pools between them.
    stages = [index for index, block in enumerate(model.blocks) if hasattr(block, "res_blocks")]  # type: ignore[arg-type]
    found: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        path = _path(key, stages, len(model.blocks) - 1)  # type: ignore[arg-type]
        if path is None:
            raise ValueError(f"state_dict has {key!r}, which is no key of a 2-D ResNet")
        if path.endswith("num_batches_tracked"):
            continue
        if path not in target:
            raise ValueError(f"state_dict has {key!r}, for which the model has no {path!r}: another depth?")
        place = target[path]
        if key.startswith("fc.") and tensor.shape[0] != place.shape[0]:
            continue
        found[path] = _inflate(key, tensor, place, init)
    head = f"blocks.{len(model.blocks) - 1}.proj."  # type: ignore[arg-type]
    missing = [
        key
        for key in target
        if key not in found and not key.endswith("num_batches_tracked") and not key.startswith(head)
    ]
    if missing:
        raise ValueError(f"state_dict has nothing for {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    return {**target, **found}


def _inflate(key: str, tensor: Tensor, place: Tensor, init: str) -> Tensor:
    if tensor.dim() == 4 and place.dim() == 5:
        if (*tensor.shape[:2], *tensor.shape[2:]) != (*place.shape[:2], *place.shape[3:]):
            raise ValueError(f"{key} is {tuple(tensor.shape)}, its layer in the model {tuple(place.shape)}")
        kt = place.shape[2]
        weights = torch.zeros(kt, dtype=tensor.dtype)
        if init == "mean":
            weights.fill_(1 / kt)
        else:
            weights[kt // 2] = 1
        tensor = tensor.detach()[:, :, None] * weights.to(tensor.device)[:, None, None]
    if tensor.shape != place.shape:
        raise ValueError(f"{key} is {tuple(tensor.shape)}, its place in the model {tuple(place.shape)}")
    return tensor.detach().to(place, copy=True)


def _path(key: str, stages: list[int], head: int) -> str | None:
    """The key of the model that a key of torchvision's stands for."""
    for pattern, path in (
        (r"conv1\.(?P<tensor>\w+)", "blocks.0.conv.{tensor}"),
        (r"bn1\.(?P<tensor>\w+)", "blocks.0.norm.{tensor}"),
        (r"fc\.(?P<tensor>\w+)", f"blocks.{head}.proj.{{tensor}}"),
        (r"layer(?P<stage>\d)\.(?P<block>\d+)\.conv(?P<n>\d)\.(?P<tensor>\w+)", "{block}branch2.conv_{n}.{tensor}"),
        (r"layer(?P<stage>\d)\.(?P<block>\d+)\.bn(?P<n>\d)\.(?P<tensor>\w+)", "{block}branch2.norm_{n}.{tensor}"),
        (r"layer(?P<stage>\d)\.(?P<block>\d+)\.downsample\.0\.(?P<tensor>\w+)", "{block}branch1_conv.{tensor}"),
        (r"layer(?P<stage>\d)\.(?P<block>\d+)\.downsample\.1\.(?P<tensor>\w+)", "{block}branch1_norm.{tensor}"),
    ):
        match = re.fullmatch(pattern, key)
        if match is None:
            continue
        told = match.groupdict()
        if "stage" in told:
            stage = int(told["stage"])
            if not 1 <= stage <= len(stages):
                return None
            told["block"] = f"blocks.{stages[stage - 1]}.res_blocks.{told['block']}."
        if "n" in told:
            told["n"] = "-abc"[int(told["n"])] if int(told["n"]) < 4 else ""
        return path.format(**told)
    return None

"""inflate_2d: 2-D weights in 3-D networks give the 2-D network's answer on a still video."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from network_testing import distance
from torch import Tensor, nn

from slowfast_fast.models import create_model, inflate_2d

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """A residual block of a 2-D ResNet, basic or bottleneck, with torchvision's names."""

    def __init__(self, dim_in: int, dim: int, expansion: int, stride: int) -> None:
        super().__init__()
        if expansion == 1:
            sizes = [(dim_in, dim, 3, stride), (dim, dim, 3, 1)]
        else:
            sizes = [(dim_in, dim, 1, 1), (dim, dim, 3, stride), (dim, 4 * dim, 1, 1)]
        self.count = len(sizes)
        for n, (c, k, size, step) in enumerate(sizes, start=1):
            setattr(self, f"conv{n}", nn.Conv2d(c, k, size, step, size // 2, bias=False))
            setattr(self, f"bn{n}", nn.BatchNorm2d(k))
        if dim_in != expansion * dim or stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(dim_in, expansion * dim, 1, stride, bias=False), nn.BatchNorm2d(expansion * dim)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for n in range(1, self.count + 1):
            y = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(y.relu() if n > 1 else y))
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class ResNet2d(nn.Module):
    """Features of an image before the average, after the classifier at every place."""

    def __init__(self, depths: tuple[int, ...], expansion: int, width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        dim_in = width
        for stage, depth in enumerate(depths):
            dim, blocks = width * 2**stage, []
            for index in range(depth):
                blocks.append(Block(dim_in, dim, expansion, 1 if index or not stage else 2))
                dim_in = dim * expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(dim_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.movedim(1, -1)).movedim(-1, 1)


def resnet_2d(depths: tuple[int, ...] = (2, 2, 2, 2), expansion: int = 1) -> ResNet2d:
    model = ResNet2d(depths, expansion, 8, 6).double().eval()
    for key, value in model.state_dict().items():
        if value.dim() == 1 and value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5) if "var" in key or "weight" in key else nn.init.normal_(value, std=0.1)
    return model


EVERY_PLACE: dict[str, Any] = {
    "width": 8,
    "model_num_class": 6,
    "head_pool": None,
    "head_output_with_global_average": False,
    "stage1_pool": None,
}
R50 = ((3, 4, 6, 3), 4)
NETWORKS = {
    "i3d_r50_8x8": R50,
    "i3d_r50_3x3x3_32x2": R50,
    "c2d_r50_8x8": R50,
    "i3d_r18_32x2": ((2, 2, 2, 2), 1),
}


@pytest.mark.parametrize("init", ["centre", "mean"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_still_video_is_its_image(name: str, init: str) -> None:
    image_network = resnet_2d(*NETWORKS[name])
    network = create_model(name, **EVERY_PLACE).double().eval()
    network.load_state_dict(inflate_2d(image_network.state_dict(), network, init=init))
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    # So many that the middle one does not see the zeros beyond the clip's ends, which are no frames of the video. The
    # networks with strides in time have a quarter of the frames behind the stem.
    frames = 3 if init == "centre" else 161 if name.endswith("32x2") else 31
    with torch.no_grad():
        expected = image_network(images)
        scores = network(images[:, :, None].expand(-1, -1, frames, -1, -1))
    assert distance(scores[:, :, scores.shape[2] // 2], expected) < 1e-12
    if init == "centre":
        assert distance(scores, expected[:, :, None].expand_as(scores)) < 1e-12


def test_other_classes_are_left_as_they_are() -> None:
    network = create_model("i3d_r18_32x2", **EVERY_PLACE | {"model_num_class": 4}).double()
    before = network.blocks[-1].proj.weight.clone()
    network.load_state_dict(inflate_2d(resnet_2d().state_dict(), network))
    assert torch.equal(network.blocks[-1].proj.weight, before)


def test_what_does_not_fit_is_named() -> None:
    state, network = resnet_2d().state_dict(), create_model("i3d_r18_32x2", **EVERY_PLACE)
    with pytest.raises(ValueError, match="init must be one of centre, mean; got 'median'"):
        inflate_2d(state, network, init="median")
    with pytest.raises(ValueError, match=r"has 'features\.0\.weight', which is no key"):
        inflate_2d({"features.0.weight": torch.zeros(1)}, network)
    with pytest.raises(ValueError, match="another depth"):
        inflate_2d(resnet_2d((3, 4, 6, 3)).state_dict(), network)
    with pytest.raises(ValueError, match=r"has nothing for blocks\.1\.res_blocks\.0\.branch2\.conv_a\.weight"):
        inflate_2d({key: value for key, value in state.items() if not key.startswith("layer1.0.conv1")}, network)
    wide = create_model("i3d_r18_32x2", **EVERY_PLACE | {"width": 16})
    with pytest.raises(ValueError, match=r"conv1\.weight is \(8, 3, 7, 7\), its layer in the model \(16, 3, 5, 7, 7\)"):
        inflate_2d(state, wide)

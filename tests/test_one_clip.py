"""OneClip: the same answers as the network gives on inputs that are indexed by hand."""

from __future__ import annotations

import pytest
import torch
from stock_models import pytorchvideo
from stock_models.plan import Plan
from torch import Tensor, nn

import slowfast_fast
from slowfast_fast import OneClip, create_model

pytestmark = pytest.mark.usefixtures("one_thread")


def clips(*shape: int, **options: bool) -> Tensor:
    """In float64: batches of other sizes are summed in another order, which is not the question here."""
    return torch.randn(shape, dtype=torch.float64, **options)


def small(name: str = "slowfast_r18_8x8", **overrides: object) -> nn.Module:
    """Eight classes, any size of clips."""
    pools = {"head_pool": nn.AdaptiveAvgPool3d} if "slowfast" in name else {}
    model = create_model(name, model_num_class=8, width=16, **pools, **overrides).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)  # so that scores, and their softmax, differ
    return model.double()


# What hand-written code indexes: the slow pathway's frames of a clip of T, and the fast one's.
BY_HAND = {
    ("pytorchvideo", None): (16, lambda x: [x[:, :, [0, 5, 10, 15]], x]),
    ("mmaction2", 8): (32, lambda x: [x[:, :, ::8], x[:, :, ::2]]),
    ("gluoncv", None): (16, lambda x: [x[:, :, ::4], x]),
    ("r1c7", 8): (32, lambda x: [x[:, :, ::8], x[:, :, ::2]]),
}


@pytest.mark.parametrize(("rule", "tau"), BY_HAND)
def test_scores_features_and_views(rule: str, tau: int | None) -> None:
    frames, by_hand = BY_HAND[rule, tau]
    model = small()
    ours = OneClip(model, alpha=4, tau=tau, rule=rule)
    clip = clips(2, 3, frames, 32, 32)
    seen = by_hand(clip)
    for sampled, expected in zip(ours.sample(clip), seen, strict=True):
        assert torch.equal(sampled, expected)
    with torch.no_grad():
        scores = model(seen)
        torch.testing.assert_close(ours(clip), scores)
        maps = list(seen)
        for block in model.blocks[:-2]:
            maps = block(maps)
        vector = torch.cat([m.mean((2, 3, 4)) for m in maps], 1)
        torch.testing.assert_close(ours.vector(clip), vector)
        for found, expected in zip(ours.maps(clip), maps, strict=True):
            torch.testing.assert_close(found, expected)
        head = model.blocks[-1].proj
        torch.testing.assert_close(head(vector), scores)


@pytest.mark.parametrize("average", ["scores", "probabilities"])
@pytest.mark.parametrize("at_once", [None, 1, 4])
def test_views_are_averaged(average: str, at_once: int | None) -> None:
    model = small()
    ours = OneClip(model, average=average, views_at_once=at_once)
    views = clips(2, 3, 3, 8, 32, 32)
    with torch.no_grad():
        each = [model([view[:, :, [0, 7]], view]) for view in views.unbind(1)]
        if average == "probabilities":
            each = [scores.softmax(1) for scores in each]
        torch.testing.assert_close(ours(views), sum(each) / 3)
        vectors = [ours.vector(view) for view in views.unbind(1)]
        torch.testing.assert_close(ours.vector(views), sum(vectors) / 3)
        maps = ours.maps(views)
        assert [m.shape[:2] for m in maps] == [(2, 3), (2, 3)]
        torch.testing.assert_close(maps[1][:, 2], ours.maps(views[:, 2])[1])


def test_classes_that_do_not_exclude_one_another() -> None:
    model, views = small(), clips(2, 3, 3, 8, 32, 32)
    ours = OneClip(model, average="probabilities", activation="sigmoid")
    with torch.no_grad():
        each = [model([view[:, :, [0, 7]], view]).sigmoid() for view in views.unbind(1)]
        torch.testing.assert_close(ours(views), sum(each) / 3)


def test_frozen_networks() -> None:
    model = small()
    frozen = slowfast_fast.freeze(model)
    clip = clips(2, 3, 16, 32, 32)
    for method in ("__call__", "vector"):
        plain, ours = (getattr(OneClip(network), method)(clip) for network in (model, frozen))
        torch.testing.assert_close(ours, plain.detach())
    for plain, ours in zip(OneClip(model).maps(clip), OneClip(frozen).maps(clip), strict=True):
        torch.testing.assert_close(ours, plain.detach())
        assert not ours.requires_grad


def test_the_vector_of_r50_has_2304_values() -> None:
    """2048 of the slow pathway and 256 of the fast one; shapes alone, where nothing is computed."""
    with torch.device("meta"), slowfast_fast.backend("reference"), torch.no_grad():
        ours = OneClip(create_model("slowfast_r50_8x8").eval())
        clip = torch.empty(1, 2, 3, 32, 224, 224)
        assert ours.vector(clip).shape == (1, 2304)
        assert [tuple(m.shape) for m in ours.maps(clip)] == [(1, 2, 2048, 8, 7, 7), (1, 2, 256, 32, 7, 7)]


def test_networks_of_one_pathway() -> None:
    model = small("slow_r50_8x8", depth=18)
    clip = clips(1, 3, 16, 224, 224)
    ours = OneClip(model, alpha=None, tau=2, rule="mmaction2")
    with torch.no_grad():
        torch.testing.assert_close(ours(clip), model(clip[:, :, ::2]))
        (maps,) = ours.maps(clip)
        torch.testing.assert_close(ours.vector(clip), maps.mean((2, 3, 4)))


def test_stock_networks() -> None:
    """A network of pytorchvideo, as it is and accelerated, and one without feature maps to be found."""
    model = pytorchvideo.build(Plan(depths=(1, 1, 1, 1), width=16, classes=5)).double().eval()
    clip = clips(2, 3, 32, 64, 64)
    seen = [clip.index_select(2, torch.linspace(0, 31, 8).long()), clip]
    with torch.no_grad():
        scores = model(list(seen))
        for _ in range(2):
            torch.testing.assert_close(OneClip(model)(clip), scores)
            torch.testing.assert_close(model.blocks[-1].proj(OneClip(model).vector(clip)), scores)
            slowfast_fast.accelerate(model)

    class Other(nn.Module):
        def forward(self, x: list[Tensor]) -> Tensor:
            return torch.stack([part.mean() for part in x]).view(1, 2)

    clip = clips(1, 3, 8, 4, 4)
    torch.testing.assert_close(OneClip(Other())(clip), Other()([clip[:, :, [0, 7]], clip]))
    with pytest.raises(TypeError, match=r"features are taken of networks of .*; got Other"):
        OneClip(Other()).vector(clip)


def test_gradients_and_dense_half_precision() -> None:
    clip = clips(1, 3, 8, 32, 32, requires_grad=True)
    OneClip(small()).vector(clip).sum().backward()
    assert clip.grad is not None
    assert clip.grad.abs().sum() > 0
    half = OneClip(small().to(torch.bfloat16)).vector(clip.detach().bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, "activation must be one of softmax, sigmoid; got 'tanh'"),
        ({"average": "logits"}, "average must be one of scores, probabilities; got 'logits'"),
        ({"rule": "c3d"}, "rule must be one of"),
        ({"alpha": 4, "tau": 6}, "tau must be a multiple of alpha = 4; got 6"),
        ({"views_at_once": 0}, "views_at_once must be at least 1 or None; got 0"),
    ],
)
def test_wrong_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OneClip(nn.Identity(), **options)


def test_wrong_clips() -> None:
    with pytest.raises(ValueError, match=r"clip must be \(N, 3, T, H, W\), or with views .*; got \(3, 8, 4, 4\)"):
        OneClip(nn.Identity())(clips(3, 8, 4, 4))
    with pytest.raises(ValueError, match="the clip is too short: 2 frames"):
        OneClip(nn.Identity())(clips(1, 3, 2, 4, 4))

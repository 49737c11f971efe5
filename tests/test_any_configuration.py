"""The ops at configurations that hypothesis draws: any sizes, window, layout, dtype and set of optional arguments."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_batch_norm as batch_norm
import test_lateral_concat as lateral
import test_temporal_conv as temporal
import torch
from op_testing import DTYPES, LAYOUTS, assert_exact

import slowfast_fast

pytest.importorskip("hypothesis", reason="configurations are drawn by hypothesis, which is not installed")
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

sizes = st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 31, 33]))


@st.composite
def temporal_shapes(draw: st.DrawFn) -> temporal.Shape:
    kt, dilation, padding = draw(st.integers(1, 7)), draw(st.integers(1, 3)), draw(st.integers(0, 6))
    shortest = max(1, dilation * (kt - 1) + 1 - 2 * padding)
    return temporal.Shape(
        n=draw(st.integers(0, 3)),
        c=draw(sizes),
        k=draw(sizes),
        t=draw(st.integers(shortest, shortest + 9)),
        h=draw(st.integers(1, 6)),
        w=draw(st.integers(1, 6)),
        kt=kt,
        stride=draw(st.integers(1, 5)),
        padding=padding,
        dilation=dilation,
    )


@st.composite
def lateral_shapes(draw: st.DrawFn) -> lateral.Shape:
    kt, alpha, t = draw(st.integers(1, 7)), draw(st.sampled_from((1, 2, 3, 4, 8))), draw(st.integers(1, 4))
    padding = draw(st.integers(0, 5).filter(lambda p: (t - 1) * alpha + kt - 2 * p >= 1))
    return lateral.Shape(
        n=draw(st.integers(0, 3)),
        c_slow=draw(sizes),
        c=draw(sizes),
        k=draw(sizes),
        t=t,
        h=draw(st.integers(1, 5)),
        w=draw(st.integers(1, 5)),
        kt=kt,
        alpha=alpha,
        padding=padding,
        surplus=draw(st.integers(0, alpha - 1)),
    )


@given(
    shape=temporal_shapes(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    absent=st.sets(st.sampled_from(("scale", "shift", "residual"))),
    relu=st.booleans(),
)
@settings(max_examples=150)
def test_temporal_conv(shape: temporal.Shape, dtype: torch.dtype, layout: str, absent: set[str], relu: bool) -> None:
    with slowfast_fast.backend("cpu"):
        assert_exact(temporal.integer_call(shape, dtype, *absent, relu=relu), layout)


@given(
    shape=lateral_shapes(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    absent=st.sets(st.sampled_from(("scale", "shift"))),
    relu=st.booleans(),
)
@settings(max_examples=100)
def test_lateral_concat(shape: lateral.Shape, dtype: torch.dtype, layout: str, absent: set[str], relu: bool) -> None:
    with slowfast_fast.backend("cpu"):
        assert_exact(lateral.integer_call(shape, dtype, *absent, relu=relu), layout)


@pytest.mark.filterwarnings("ignore:var_mean")  # PyTorch's own, for an empty batch
@given(
    shape=st.one_of(temporal_shapes(), lateral_shapes()),
    layout=st.sampled_from(LAYOUTS),
    absent=st.sets(st.sampled_from(("gamma", "beta", "residual", "num_batches_tracked"))),
    relu=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=100)
def test_batch_norm(
    shape: batch_norm.Shape, layout: str, absent: set[str], relu: bool, dtype: torch.dtype, seed: int
) -> None:
    """Against the reference in float64: output and running statistics, within what rounding in ``dtype`` allows."""
    t = shape.t_out if isinstance(shape, temporal.Shape) else shape.t
    if shape.n * t * shape.h * shape.w == 1:
        shape = replace(shape, n=2)
    torch.manual_seed(seed)
    call = replace(batch_norm.bn_call(shape, dtype, *absent, relu=relu, eps=1e-2), differentiable=())
    exact = call.run_exact()
    with slowfast_fast.backend("cpu"):
        results = call.to(layout=layout).run()
    tolerance = 20 * torch.finfo(dtype).eps
    for name, result in results.items():
        torch.testing.assert_close(
            result.double(),
            exact[name].double(),
            rtol=tolerance,
            atol=30 * tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )

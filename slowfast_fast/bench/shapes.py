"""The shapes at which a SlowFast network runs `temporal_conv` and `lateral_concat`, derived from its architecture.

Source: "SlowFast Networks for Video Recognition", table 1, in the variant that pytorchvideo's `create_slowfast` builds.
"""

from collections import Counter
from dataclasses import dataclass, replace

from ..models._pathway import STAGE_DEPTHS

SLOW_WIDTH = 64
STAGE_EXPANSION = 4
FUSION_RATIO = 2
LATERAL_KERNEL = 7
TEMPORAL_KERNEL = 3
SLOW_TEMPORAL_STAGES = (4, 5)


@dataclass(frozen=True)
class Shape:
    """One convolution of the network: its input, its output and how often the network runs it.

    `frames` is the T of the input, `size` its height and width. For `lateral_concat` the input is the fast pathway's,
    `stride` is alpha and `slow_channels` are the channels that the result begins with; else those are 1 and 0.
    """

    op: str
    pathway: str
    stage: int
    batch: int
    channels: int
    out_channels: int
    kernel: int
    frames: int
    size: int
    stride: int = 1
    slow_channels: int = 0
    count: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_frames(self) -> int:
        return (self.frames + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def in_positions(self) -> int:
        return self.batch * self.frames * self.size**2

    @property
    def out_positions(self) -> int:
        return self.batch * self.out_frames * self.size**2

    @property
    def name(self) -> str:
        """As `fast res3 64->16 32x28x28`: unique among the shapes of one op, crop and batch."""
        stage = f"res{self.stage}" if self.stage > 1 else "stem"
        return f"{self.pathway} {stage} {self.channels}->{self.out_channels} {self.frames}x{self.size}x{self.size}"


def network_shapes(
    crop: int = 224, *, depth: int = 50, batch: int = 1, slow_frames: int = 8, alpha: int = 4, beta_inverse: int = 8
) -> list[Shape]:
    """Every distinct shape of both ops in one forward of the network, with `count` saying how often it occurs.

    Args:
        crop: height and width of the clip in pixels, a multiple of 32.
        depth: 18, 50, 101 or 152.
        batch: clips.
        slow_frames: T of the slow pathway (SlowFast 8x8: 8).
        alpha: how many times more frames the fast pathway has.
        beta_inverse: how many times fewer channels the fast pathway has.

    Raises:
        ValueError: crop is no multiple of 32, or depth is unknown.
    """
    if crop <= 0 or crop % 32:
        raise ValueError(f"crop: expected a positive multiple of 32, got {crop}")
    if depth not in STAGE_DEPTHS:
        raise ValueError(f"depth: expected one of {sorted(STAGE_DEPTHS)}, got {depth}")
    found: Counter[Shape] = Counter()
    frames = {"slow": slow_frames, "fast": slow_frames * alpha}
    width = {"slow": SLOW_WIDTH, "fast": SLOW_WIDTH // beta_inverse}
    channels = dict(width)  # what each pathway holds after the stem
    size = crop // 4  # the stem's convolution and its pooling halve twice

    for stage, blocks in enumerate(STAGE_DEPTHS[depth], start=2):
        # After the stem and after every stage but the last, the fast pathway is concatenated to the slow one.
        lateral = Shape(
            op="lateral_concat",
            pathway="lateral",
            stage=stage - 1,
            batch=batch,
            channels=channels["fast"],
            out_channels=channels["fast"] * FUSION_RATIO,
            kernel=LATERAL_KERNEL,
            frames=frames["fast"],
            size=size,
            stride=alpha,
            slow_channels=channels["slow"],
        )
        found[lateral] += 1
        channels["slow"] += channels["fast"] * FUSION_RATIO
        stage_size = size if stage == 2 else size // 2
        for pathway in ("slow", "fast"):
            inner = width[pathway] << (stage - 2)
            for block in range(blocks):
                temporal = Shape(
                    op="temporal_conv",
                    pathway=pathway,
                    stage=stage,
                    batch=batch,
                    channels=channels[pathway],
                    out_channels=inner,
                    kernel=TEMPORAL_KERNEL,
                    frames=frames[pathway],
                    # The spatial stride is in the first block's 1x3x3 convolution, which comes after its temporal one.
                    size=size if block == 0 else stage_size,
                )
                if pathway == "fast" or stage in SLOW_TEMPORAL_STAGES:
                    found[temporal] += 1
                channels[pathway] = inner * STAGE_EXPANSION
        size = stage_size
    shapes = [replace(shape, count=count) for shape, count in found.items()]
    return sorted(shapes, key=lambda shape: (shape.op != "temporal_conv", shape.pathway, shape.stage, shape.channels))

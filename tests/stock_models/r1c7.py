from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from .gluoncv import Pathways
from .plan import Plan


class SlowFast(Pathways):
    @staticmethod
    def build_lateral(plan: Plan, stage: int) -> nn.Module:
        return plan.lateral(stage)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dp(self.features(x[:, :, ::16], x[:, :, ::2])))


def build(plan: Plan) -> nn.Module:
    """A clip with twice the fast pathway's frames -> logits; alpha is 8."""
    return SlowFast(replace(plan, alpha=8, fusion_kernel=5, classifier_bias=False))

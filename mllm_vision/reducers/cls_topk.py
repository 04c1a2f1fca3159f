"""Top-k by CLS attention: keep the patches that the tower's CLS token looks at, the core of many pruning methods.

Paper: the selection step of FasterVLM, arXiv 2412.01818, and of VisionZip's dominant tokens, arXiv 2412.04467.

Shapes: B images, P patches.
"""

from __future__ import annotations

from dataclasses import dataclass

from mllm_vision.operations import KeepConfig, TokenOperation, TowerFacts
from mllm_vision.tokens import AttentionFromCLS, VisualTokens

__all__ = ["CLSTopKConfig"]


@dataclass(kw_only=True)
class CLSTopKConfig(KeepConfig, type="cls_topk", paper="arXiv 2412.01818"):
    """Keep the patches with the most CLS attention. The tower needs a CLS token.

    Args:
        keep: Tokens to keep of an image; a float in (0, 1) is a share of its tokens.
        layer: Attention map to read, an index into the tower's layers; None is the one whose output the host uses.
    """

    layer: int | None = None

    def check(self, tower: TowerFacts) -> None:
        super().check(tower)
        if not tower.has_cls:
            raise ValueError("cls_topk needs a tower with a CLS token, and this one has none; use hiprune or random")

    def build(self, tower: TowerFacts) -> TokenOperation:
        return CLSTopK(self, tower)


class CLSTopK(TokenOperation):
    def __init__(self, config: CLSTopKConfig, tower: TowerFacts):
        super().__init__()
        self.config = config
        self.attention = AttentionFromCLS(tower.layer(config.layer, tower.deep_layer))
        self.requests = (self.attention,)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        return tokens.keep_best(tokens.evidence[self.attention], self.config.count(tokens.features.shape[1]))

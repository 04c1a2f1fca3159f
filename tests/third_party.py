"""A method as another package would ship it: one file, named in an entry point."""

from dataclasses import dataclass

import torch

from mllm_vision.operations import KeepConfig, TokenOperation, TowerFacts
from mllm_vision.tokens import VisualTokens


@dataclass(kw_only=True)
class KeepFirstConfig(KeepConfig, type="keep_first", paper="none"):
    """Keep the first patches in raster order."""

    def build(self, tower: TowerFacts) -> TokenOperation:
        return KeepFirst(self)


class KeepFirst(TokenOperation):
    def __init__(self, config: KeepFirstConfig):
        super().__init__()
        self.config = config

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        kept = self.config.count(tokens.features.shape[1])
        return tokens.take(torch.arange(kept).expand(len(tokens.features), -1))

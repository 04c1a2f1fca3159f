"""Spatial tokens against tensors that the authors' code produced (tests/golden; each case names its source)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import gelu, linear

from mllm_vision.projectors.spatial_tokens import SpatialTokens, SpatialTokensConfig, from_authors

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize(("name", "variant"), [("llava_sp_pooling_0", "pooling"), ("llava_sp_cropping_1", "cropping")])
def test_whole_image_features(name, variant):
    case = load_file(GOLDEN / name / "case.safetensors")
    theirs = from_authors(load_file(GOLDEN / name / "weights.safetensors"))
    assert theirs.config == SpatialTokensConfig(variant=variant, channels=16, scales=6)
    assert (theirs.grid, theirs.width, theirs.out) == ((24, 24), 32, 48)
    projector = SpatialTokens(theirs.config, theirs.grid, theirs.width, theirs.out)
    projector.load_state_dict(theirs.spatial)
    features = case["hidden_state"][:, 1:]  # without CLS
    mlp = {name.removeprefix("mm_projector."): weight for name, weight in theirs.patch_branch.items()}
    patches = linear(gelu(linear(features, mlp["0.weight"], mlp["0.bias"])), mlp["2.weight"], mlp["2.bias"])
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([projector(features), patches], dim=1), case["image_features"])

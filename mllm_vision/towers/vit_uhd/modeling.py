"""ViT-UHD: a vision transformer over whole pictures of any size, which merges tokens 2 x 2 between its layers.

A picture is cut into small patches; after each of a few chosen layers every window of 2 x 2 tokens becomes one, so that
only the first layers see all of them and few come out. Pictures of different sizes stand in one row, and one forward
pass serves them all.

Paper: LLaVA-UHD v3, arXiv 2511.21150 (progressive visual compression); the tower it starts from is MoonViT.
Code: github.com/thunlp/LLaVA-UHD @ 13981b5 (Apache-2.0).

Differs: merging is one gather over the pack, where the authors loop over images and wait for the device at each.
Without flash attention every image attends in a call of its own; theirs builds one (L, L) mask. The number of tokens
follows from any number of mergers; theirs is right for two. A fresh adaptive merger is a mean whose scores can learn;
theirs starts with all weights at zero, where every gradient is zero, too. Its scores have no second bias, which the
softmax over the window takes away again, nor is there `zero_init_fc`, which nothing reads. Rotary positions count
patches or tokens: in the authors' code the first table is cached and serves the coarser grids as well, so that they
count tokens.

Shapes: B images of (H, W) patches, L patches in all, M tokens that come out, C channels, d channels a head, p pixels
along a patch. As in other towers for pictures of any size, the pack is a batch of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.output_capturing import capture_outputs

from mllm_vision.towers.vit_uhd.configuration import ViTUHDConfig
from mllm_vision.towers.vit_uhd.packing import Grid, on_device, position_angles, positions_on, rotate, window_index

__all__ = ["ViTUHDModel", "ViTUHDOutput"]


@dataclass
class ViTUHDOutput(ModelOutput):
    """What a ViT-UHD makes of a pack of images.

    Args:
        last_hidden_state: (1, M, C), image after image, each row-major.
        grid_hw: (B, 2) on the CPU, rows and columns of tokens of every image.
        hidden_states: Where asked for, what each layer was given, fewer tokens behind a merger, and at last the
            `last_hidden_state`.
        attentions: Where asked for and attention is "eager", for each layer a tuple of one (1, heads, N, N) an image.
    """

    last_hidden_state: Tensor | None = None
    grid_hw: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[tuple[Tensor, ...], ...] | None = None


class Pack(NamedTuple):
    """How the tokens of several images stand in one row between two mergers.

    Args:
        lengths: Tokens of each image.
        bounds: (B + 1,) int32 on the device, where images begin and end.
        rotary: Cosine and sine of the angles, (L, d / 2) each; None without rotary positions.
    """

    lengths: list[int]
    bounds: Tensor
    rotary: tuple[Tensor, Tensor] | None


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention of every position to all: (1, N, heads, d) and the map (1, heads, N, N), from (1, heads, N, d)."""
    weights = (query @ key.transpose(-1, -2) * scaling).softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(1, 2), weights


class PatchEmbedding(nn.Module):
    """Patches (L, 3, p, p) to (L, C). No `nn.Linear`, so that quantisation leaves it alone as it does a convolution."""

    def __init__(self, config: ViTUHDConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, 3 * config.patch_size**2))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, patches: Tensor) -> Tensor:
        return nn.functional.linear(patches.flatten(1).to(self.weight.dtype), self.weight, self.bias)


class ViTUHDAttention(nn.Module):
    """Attention inside each image of a pack."""

    is_causal = False

    def __init__(self, config: ViTUHDConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden_states: Tensor, pack: Pack) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """New states (1, L, C), and the map of each image where the implementation gives it."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim))  # (1, L, heads, d)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if pack.rotary is not None:
            query, key = rotate(query, *pack.rotary), rotate(key, *pack.rotary)
        states = [part.transpose(1, 2) for part in (query, key, value)]  # (1, heads, L, d)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        settings: dict[str, Any] = dict(
            attention_mask=None, scaling=self.head_dim**-0.5, dropout=0.0, is_causal=self.is_causal
        )
        if is_flash_attention_requested(self.config):
            longest = max(pack.lengths)
            seen, _ = attend(
                self,
                *states,
                **settings,
                cu_seq_lens_q=pack.bounds,
                cu_seq_lens_k=pack.bounds,
                max_length_q=longest,
                max_length_k=longest,
            )
            return self.out_proj(seen.flatten(2)), None
        images = zip(*(part.split(pack.lengths, dim=2) for part in states), strict=True)
        outputs = [attend(self, *image, **settings) for image in images]
        seen = torch.cat([out for out, _ in outputs], dim=1)  # (1, L, heads, d)
        maps = tuple(weights for _, weights in outputs if weights is not None)
        return self.out_proj(seen.flatten(2)), maps or None


class ViTUHDMLP(nn.Module):
    def __init__(self, config: ViTUHDConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class AverageMerger(nn.Module):
    """The mean of every window (1, M, 4, C): (1, M, C)."""

    def forward(self, windows: Tensor) -> Tensor:
        return windows.mean(-2)


class WindowScores(nn.Linear):
    """The layer that scores tokens; starts at zero, so that all tokens of a window weigh the same."""


class AdaptiveMerger(nn.Module):
    """A weighted mean of every window (1, M, 4, C): (1, M, C).

    The weight of a token in a channel is a softmax over the four of scores that an MLP gives to the token beside the
    mean of its window.
    """

    def __init__(self, width: int):
        super().__init__()
        self.hidden = nn.Linear(2 * width, width)
        self.score = WindowScores(width, width, bias=False)

    def forward(self, windows: Tensor) -> Tensor:
        mean = windows.mean(-2, keepdim=True).expand_as(windows)
        scores = self.score(nn.functional.gelu(self.hidden(torch.cat([windows, mean], dim=-1))))
        return (windows * scores.softmax(-2, dtype=torch.float32)).sum(-2).to(windows.dtype)


class ViTUHDLayer(GradientCheckpointingLayer):
    """A layer of a pre-norm transformer, and a merger behind it where there is one."""

    def __init__(self, config: ViTUHDConfig, layer: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = ViTUHDAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTUHDMLP(config)
        self.merger: AverageMerger | AdaptiveMerger | None = None
        if layer in config.merger_layers:
            self.merger = AverageMerger() if config.merger == "average" else AdaptiveMerger(config.hidden_size)

    def forward(self, hidden_states: Tensor, pack: Pack, windows: Tensor | None) -> Tensor:
        """New states (1, L, C), or (1, M, C) of the ``windows`` (M, 4) where there is a merger."""
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), pack)[0]
        hidden_states = hidden_states + self.mlp(self.layer_norm2(hidden_states))
        return hidden_states if self.merger is None else self.merger(hidden_states[:, windows])


class ViTUHDModel(PreTrainedModel):
    """A ViT-UHD; ``attn_implementation="flash_attention_2"``, where it is installed, serves all images in one call."""

    config: ViTUHDConfig
    config_class = ViTUHDConfig
    base_model_prefix = "vit_uhd"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ("ViTUHDLayer",)
    _input_embed_layer = "patch_embedding"
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": ViTUHDLayer,
        "attentions": ViTUHDAttention,
    }

    def __init__(self, config: ViTUHDConfig):
        super().__init__(config)
        width = config.hidden_size
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = nn.Parameter(torch.empty(*config.position_grid, width))
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.pre_norm else nn.Identity()
        self.layers = nn.ModuleList(ViTUHDLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.post_norm else nn.Identity()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PatchEmbedding):
            initialization.normal_(module.weight, std=self.config.initializer_range)
            initialization.zeros_(module.bias)
        elif isinstance(module, ViTUHDModel):
            initialization.normal_(module.position_embedding, std=self.config.initializer_range)
        elif isinstance(module, WindowScores):
            initialization.zeros_(module.weight)

    @classmethod
    def from_vit(
        cls,
        tower: PreTrainedModel,
        *,
        patch_size: int,
        merger_layers: Sequence[int],
        merger: str = "adaptive",
        position_grid: tuple[int, int] | None = None,
    ) -> ViTUHDModel:
        """A pretrained tower as a ViT-UHD, to be trained further; patches embed alike, mergers start as averages.

        What has no place in a ViT-UHD is left out: the pooling head of SigLIP, and the CLS token of CLIP with the norm
        behind it. Pictures for it come from `ViTUHDImageProcessor.for_tower`, with the mean and deviation that the
        tower was trained with.

        Args:
            tower: Of SigLIP, SigLIP 2, CLIP or MoonViT, or a ViT-UHD without mergers; not modified.
            patch_size: Side of the new patches in pixels (paper: 14 or 16 become 10).
            merger_layers: As in `ViTUHDConfig` (paper: 4 and 18 of 27).
            merger: As in `ViTUHDConfig`.
            position_grid: Rows and columns that the table of positions is resampled to; None for as many patches as
                cover a picture of the size that the tower was trained on.

        Raises:
            ValueError: another kind of tower.
        """
        from mllm_vision.towers.vit_uhd.conversion import converted

        return converted(
            tower,
            patch_size=patch_size,
            merger_layers=merger_layers,
            merger=merger,
            position_grid=position_grid,
        )

    @property
    def patch_size(self) -> int:
        """Side in pixels of the square that becomes one token, which is what hosts divide the size of an image by."""
        return self.config.token_size

    @capture_outputs
    def forward(
        self, pixel_values: Tensor, image_sizes: Tensor | Sequence[Sequence[int]], **kwargs: Any
    ) -> ViTUHDOutput:
        """The tokens of a pack of images.

        Args:
            pixel_values: (L, 3, p, p), the patches of image after image, each row-major.
            image_sizes: Height and width of every image in pixels, as pairs of integers or (B, 2). Attention and shapes
                need them on the host: a list or a CPU tensor costs nothing, a tensor on the device is read once, here.

        Raises:
            ValueError: a size that patches and mergers do not divide, or patches of another size or number.
        """
        grids = _checked_grids(image_sizes, self.config)
        side, length = self.config.patch_size, sum(height * width for height, width in grids)
        if pixel_values.shape != (length, 3, side, side):
            raise ValueError(
                f"pixel_values must be ({length}, 3, {side}, {side}) for grids of {length} patches of {side} x {side} "
                f"pixels, got {tuple(pixel_values.shape)}; give what the image processor of this tower returns"
            )
        hidden_states = self.patch_embedding(pixel_values)[None]
        positions = positions_on(self.position_embedding, grids)
        hidden_states = self.pre_layernorm(hidden_states + positions.to(hidden_states.dtype))
        step, pack = 1, self._pack(grids, 1, hidden_states.device)
        for layer in self.layers:
            if layer.merger is None:
                hidden_states = layer(hidden_states, pack, None)
                continue
            hidden_states = layer(hidden_states, pack, window_index(grids, hidden_states.device))
            grids, step = [(height // 2, width // 2) for height, width in grids], step * 2
            pack = self._pack(grids, step, hidden_states.device)
        return ViTUHDOutput(last_hidden_state=self.post_layernorm(hidden_states), grid_hw=torch.tensor(grids))

    def _pack(self, grids: list[Grid], step: int, device: torch.device) -> Pack:
        """The layout of ``grids`` whose tokens are ``step`` patches apart."""
        lengths = [height * width for height, width in grids]
        bounds = on_device([0, *lengths], device).cumsum(0, dtype=torch.int32)
        if self.config.rotary_theta is None:
            return Pack(lengths, bounds, None)
        unit = step if self.config.rotary_units == "patches" else 1
        dim = self.config.hidden_size // self.config.num_attention_heads
        angles = position_angles(grids, unit, dim, self.config.rotary_theta, device)
        return Pack(lengths, bounds, (angles.cos(), angles.sin()))


def _checked_grids(sizes: Tensor | Sequence[Sequence[int]], config: ViTUHDConfig) -> list[Grid]:
    """Rows and columns of patches of images of ``sizes`` in pixels."""
    pairs = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    if not pairs:
        raise ValueError("image_sizes is empty; a pack needs at least one image")
    unit = config.token_size
    for height, width in pairs:
        if min(height, width) < 1 or height % unit or width % unit:
            raise ValueError(
                f"height and width must be multiples of {unit} pixels ({config.patch_size} for a patch, 2 for each "
                f"merger), got {height} x {width}; resize the picture first, as the image processor does"
            )
    return [(int(height) // config.patch_size, int(width) // config.patch_size) for height, width in pairs]

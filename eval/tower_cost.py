"""What merging tokens on the way saves: ViT-UHD against MoonViT, the tower it came from, alone and in a whole model.

    mllm-vision overhead --tower --repeats 3 --out tower_cost.json

Both towers have their true width and depth and stand in the same model around the same language model; weights are
random on purpose. MoonViT has patches of 14 pixels and no merger on the way: 2 x 2 of its tokens become one behind its
last layer, as the paper's numbers of tokens imply (arXiv 2511.21150: 1,337 of a picture of 1024 x 1024, against 655;
here 1,369 and 676, as image processors round sides to whole tokens). The language model is measured with a few of its
layers, which are alike; prefill through all of them is reckoned as that many times as long. Both models take turns in
one process, and a ratio is formed of neighbours.

Encoding a pack of pictures, over one of them, shows that attention does not cross images.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AutoModel, BatchFeature, PreTrainedModel

from mllm_vision.encoding import image_inputs
from mllm_vision.eval import shapes
from mllm_vision.eval.bench import find_device
from mllm_vision.eval.environment import environment
from mllm_vision.eval.flops import counting_flops
from mllm_vision.eval.measurement import Clock, clock_of, in_turn, torch_threads
from mllm_vision.eval.overhead import first_logits, ratio_row
from mllm_vision.eval.shapes import Shape

OURS, THEIRS = shapes.published_shape("llava-uhd-v3"), shapes.published_shape("llava-uhd-v3-moonvit")


def measure(
    *,
    repeats: int = 7,
    layers: int = 2,
    packs: tuple[int, ...] = (1, 2, 4),
    packed_picture: tuple[int, int] = (512, 512),
    ours: Shape = OURS,
    theirs: Shape = THEIRS,
    device: str = "auto",
    threads: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """Tokens, FLOPs and seconds as rows of ratios, as `overhead.report` shows them.

    Args:
        repeats: Turns a ratio is the median of.
        layers: Of the language model.
        packs: Pictures encoded at once, one first.
        packed_picture: (width, height) of those.
        ours: The model whose tower merges on the way.
        theirs: The model whose tower and image processor it is compared with.
        device: "cpu", "cuda", "cuda:1"; "auto" takes a GPU if there is one. In bfloat16 on a GPU, else in float32.
        threads: Of torch.
        seed: Of weights and pictures.

    Raises:
        ValueError: an unknown device, more layers than there are, or a model that is too large for the device.
    """
    place = find_device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    with torch_threads(threads), torch.inference_mode():
        model, inputs_of = ours.cut(layers).load(place, dtype, seed)
        other = with_tower(model, theirs, seed)
        pair = [
            (other, shapes.make_inputs(other, theirs.build_image_processor(), ours.picture, seed, 1)),
            (model, inputs_of(1)),
        ]
        rows = [tokens_row(pair, ours.picture)]
        rows += flops_rows(pair, layers, ours.depth)
        rows += time_rows(pair, layers, ours.depth, repeats)
        rows += pack_rows(model, ours, packs, packed_picture, repeats, seed)
        settings = {
            "repeats": repeats,
            "layers": layers,
            "layers_published": ours.depth,
            "picture": list(ours.picture),
            "packed_picture": list(packed_picture),
            "seed": seed,
            "device": str(place),
            "dtype": str(dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation,
            "weights": "random",
            "tower": ours.config["vision_config"],
            "other": theirs.config["vision_config"],
            "language": ours.config["text_config"],
        }
        return {"environment": environment(), "settings": settings, "rows": rows}


Pair = list[tuple[PreTrainedModel, BatchFeature]]
"""Their model and ours, each with what its image processor made of the picture."""


def with_tower(model: PreTrainedModel, shape: Shape, seed: int) -> PreTrainedModel:
    """A copy of ``model`` with the tower of ``shape``; all other weights are those of ``model``."""
    copy = shapes.sharing_weights(model)
    copy.config.vision_config = shape.build_config().vision_config
    torch.manual_seed(seed)
    with torch.device(model.device):
        tower = AutoModel.from_config(copy.config.vision_config, dtype=model.dtype, attn_implementation="sdpa")
    copy.model.vision_tower = tower.eval()
    return copy


def steps(model: PreTrainedModel, inputs: BatchFeature, clock: Clock) -> tuple[float, float]:
    """What encoding the image costs, and the language model up to the first logits, in the units of ``clock``."""
    images = image_inputs(model, inputs)
    start = clock.read()
    (features,) = model.get_image_features(**images).pooler_output
    encoded = clock.read()
    first_logits(model, inputs["input_ids"], encoded=features)
    end = clock.read()
    return clock.between(start, encoded), clock.between(encoded, end)


def encoding(model: PreTrainedModel, inputs: BatchFeature, clock: Clock) -> float:
    """What encoding all images in one pack costs."""
    start = clock.read()
    model.get_image_features(**image_inputs(model, inputs))
    return clock.between(start, clock.read())


def tokens_row(pair: Pair, picture: tuple[int, int]) -> dict[str, Any]:
    """Visual tokens of the picture."""
    theirs, ours = (int((inputs["input_ids"] == model.config.image_token_id).sum()) for model, inputs in pair)
    return ratio_row("visual tokens", f"{picture[0]} x {picture[1]}", "", [(theirs, ours)])


def flops_rows(pair: Pair, layers: int, depth: int) -> list[dict[str, Any]]:
    """Encoding, prefill, and both with some and with all layers of the language model."""
    counted = []
    for model, inputs in pair:
        with counting_flops() as clock:
            encode, prefill = steps(model, inputs, clock)
        counted.append((encode / 1e12, prefill / 1e12))
    return step_rows("FLOPs", "T", [tuple(counted)], layers, depth)


def time_rows(pair: Pair, layers: int, depth: int, repeats: int) -> list[dict[str, Any]]:
    """As `flops_rows`; counting has warmed up both models."""
    clock = clock_of(pair[0][0].device)
    turns = in_turn([partial(steps, model, inputs, clock) for model, inputs in pair], repeats, warmups=0)
    return step_rows("time", "s", turns, layers, depth)


def step_rows(
    name: str, unit: str, turns: list[tuple[tuple[float, float], ...]], layers: int, depth: int
) -> list[dict[str, Any]]:
    """A row for each step, from turns of (encoding, prefill) of theirs and of ours."""
    rows = [
        ratio_row(f"{name} of encoding", "", unit, [(theirs[0], ours[0]) for theirs, ours in turns]),
        ratio_row(
            f"{name} of prefill", f"language layers: {layers}", unit, [(theirs[1], ours[1]) for theirs, ours in turns]
        ),
    ]
    for deep in dict.fromkeys((layers, depth)):
        case = f"language layers: {deep}" if deep == layers else f"language layers: {deep}, reckoned"
        whole = [tuple(encode + prefill * deep / layers for encode, prefill in turn) for turn in turns]
        rows.append(ratio_row(f"{name} to the first token", case, unit, [(theirs, ours) for theirs, ours in whole]))
    return rows


def pack_rows(
    model: PreTrainedModel, shape: Shape, packs: tuple[int, ...], picture: tuple[int, int], repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Time of encoding an image among several, over that of an image alone."""
    processor, clock = shape.build_image_processor(), clock_of(model.device)
    inputs = [shapes.make_inputs(model, processor, picture, seed, count) for count in packs]
    turns = in_turn([partial(encoding, model, pack, clock) for pack in inputs], repeats)
    size = f"{picture[0]} x {picture[1]}"
    return [
        ratio_row(
            "time of encoding an image in a pack",
            f"{count} of {size}, over {packs[0]}",
            "s",
            [(turn[0] / packs[0], turn[i] / count) for turn in turns],
        )
        for i, count in enumerate(packs)
        if i
    ]

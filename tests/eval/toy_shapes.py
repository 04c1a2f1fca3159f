"""The published shapes with everything small, so that a test can run them."""

from dataclasses import replace
from typing import Any

from mllm_vision.eval.shapes import Shape, published_shape

TOWER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56)
WINDOWED_TOWER = dict(
    depth=4,
    hidden_size=16,
    intermediate_size=32,
    num_heads=2,
    out_hidden_size=32,
    window_size=56,
    fullatt_block_indexes=[3],
)
MERGING_TOWER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
LANGUAGE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    pad_token_id=0,
)
CLIP_PROCESSOR = dict(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
PINPOINTS = [[56, 112], [112, 56], [112, 112]]

SMALL: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": dict(
        picture=(56, 56), image_processor=CLIP_PROCESSOR, config=dict(image_token_index=5), vision=TOWER, text={}
    ),
    "llava-next-7b": dict(
        picture=(112, 112),
        image_processor=CLIP_PROCESSOR | {"image_grid_pinpoints": PINPOINTS},
        config=dict(image_token_index=5, image_grid_pinpoints=PINPOINTS),
        vision=TOWER,
        text={},
    ),
    "qwen2.5-vl-3b": dict(
        picture=(112, 84),
        image_processor={},
        config=dict(image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8),
        vision=WINDOWED_TOWER,
        text=dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}),
    ),
    "llava-uhd-v3": dict(
        picture=(112, 84),
        image_processor=dict(patch_size=5, min_pixels=1600),
        config=dict(image_token_index=5),
        vision=MERGING_TOWER | dict(patch_size=5, merger_layers=[0, 2]),
        text={},
    ),
    "llava-uhd-v3-moonvit": dict(
        picture=(112, 84),
        image_processor=dict(patch_size=7, min_pixels=1600),
        config=dict(image_token_index=5),
        vision=MERGING_TOWER | dict(patch_size=7, merger_layers=[3]),
        text={},
    ),
}
PLACEHOLDERS = {
    "llava-1.5-7b": 16,
    "llava-next-7b": 16 + 8 * 8 + 8,
    "qwen2.5-vl-3b": 4 * 3,
    "llava-uhd-v3": 5 * 4,
    "llava-uhd-v3-moonvit": 8 * 6,
}


def toy_shape(name: str) -> Shape:
    shape, small = published_shape(name), SMALL[name]
    config = shape.config | small["config"]
    config["vision_config"] = config["vision_config"] | small["vision"]
    config["text_config"] = config["text_config"] | LANGUAGE | small["text"]
    processor = shape.image_processor | small["image_processor"]
    return replace(shape, picture=small["picture"], image_processor=processor, config=config)

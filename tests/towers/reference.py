"""The tower as slow loops over images, layers and windows, under the names of the authors' checkpoints."""

import math

import torch
from torch.nn.functional import gelu, interpolate, layer_norm, linear

WIDTH, HEADS, SIDE = 32, 4, 5


def random_weights(layers=4, mergers=(), adaptive=True, table=(6, 5)):
    """Weights of a tiny tower under the authors' names, large enough for every part to matter."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    weights = {
        "patch_embed.proj.weight": random(WIDTH, 3, SIDE, SIDE),
        "patch_embed.proj.bias": random(WIDTH),
        "patch_embed.pos_emb.weight": 2 * random(*table, WIDTH),
        "encoder.final_layernorm.weight": 1 + random(WIDTH),
        "encoder.final_layernorm.bias": random(WIDTH),
    }
    for layer in range(layers):
        block = f"encoder.blocks.{layer}."
        for name, out, width in (("wqkv", 3 * WIDTH, WIDTH), ("wo", WIDTH, WIDTH)):
            weights |= {f"{block}{name}.weight": random(out, width), f"{block}{name}.bias": random(out)}
        for name, out, width in (("mlp.fc0", 48, WIDTH), ("mlp.fc1", WIDTH, 48)):
            weights |= {f"{block}{name}.weight": random(out, width), f"{block}{name}.bias": random(out)}
        for name in ("norm0", "norm1"):
            weights |= {f"{block}{name}.weight": 1 + random(WIDTH), f"{block}{name}.bias": random(WIDTH)}
        if layer in mergers:
            weights[f"{block}merger.zero_init_fc.weight"] = random(WIDTH, WIDTH)
        if layer in mergers and adaptive:
            for name, width in (("merger.attn_layer.0", 2 * WIDTH), ("merger.attn_layer.2", WIDTH)):
                weights |= {f"{block}{name}.weight": 2 * random(WIDTH, width), f"{block}{name}.bias": random(WIDTH)}
    return weights


def slow_tower(weights, pixels, grids, mergers=(), heads=HEADS, theta=10000.0, counts_patches=False):
    """The tokens (M, C) of packed patches, one image, head and window after the other."""
    tokens, begin = [], 0
    for height, width in grids:
        patches = pixels[begin : begin + height * width]
        tokens.append(slow_image(weights, patches, height, width, mergers, heads, theta, counts_patches))
        begin += height * width
    return torch.cat(tokens)


def slow_image(weights, patches, height, width, mergers, heads, theta, counts_patches):
    kernel = weights["patch_embed.proj.weight"]
    x = linear(patches.flatten(1), kernel.flatten(1), weights["patch_embed.proj.bias"])
    table = weights["patch_embed.pos_emb.weight"].permute(2, 0, 1)[None]
    x = x + interpolate(table, size=(height, width), mode="bicubic")[0].flatten(1).T
    step = 1
    for layer in range(sum(name.endswith(".wo.weight") for name in weights)):
        block = {
            name.removeprefix(f"encoder.blocks.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"encoder.blocks.{layer}.")
        }
        normed = layer_norm(x, x.shape[1:], block["norm0.weight"], block["norm0.bias"])
        places = [(row * step, column * step) for row in range(height) for column in range(width)]
        seen = slow_attention(linear(normed, block["wqkv.weight"], block["wqkv.bias"]), places, heads, theta)
        x = x + linear(seen, block["wo.weight"], block["wo.bias"])
        normed = layer_norm(x, x.shape[1:], block["norm1.weight"], block["norm1.bias"])
        hidden = gelu(linear(normed, block["mlp.fc0.weight"], block["mlp.fc0.bias"]), approximate="tanh")
        x = x + linear(hidden, block["mlp.fc1.weight"], block["mlp.fc1.bias"])
        if layer in mergers:
            x = torch.stack(
                [
                    slow_merge([x[(row + down) * width + column + right] for down in (0, 1) for right in (0, 1)], block)
                    for row in range(0, height, 2)
                    for column in range(0, width, 2)
                ]
            )
            height, width, step = height // 2, width // 2, step * 2 if counts_patches else 1
    return layer_norm(
        x, x.shape[1:], weights["encoder.final_layernorm.weight"], weights["encoder.final_layernorm.bias"]
    )


def slow_attention(qkv, places, heads, theta):
    query, key, value = qkv.view(len(places), 3, heads, -1).unbind(1)
    dim = query.shape[-1]
    turn = torch.ones(len(places), dim // 2, dtype=torch.complex64)
    if theta is not None:
        for token, (row, column) in enumerate(places):
            for pair in range(dim // 2):
                angle = (row if pair % 2 else column) * theta ** (-4 * (pair // 2) / dim)
                turn[token, pair] = complex(math.cos(angle), math.sin(angle))
    seen = []
    for head in range(heads):
        q, k = (
            torch.view_as_real(torch.view_as_complex(part[:, head].reshape(len(places), -1, 2)) * turn).flatten(1)
            for part in (query, key)
        )
        seen.append((q @ k.T / math.sqrt(dim)).softmax(-1) @ value[:, head])
    return torch.cat(seen, dim=-1)


def slow_merge(window, block):
    mean = sum(window) / 4
    if "merger.attn_layer.0.weight" not in block:
        return mean
    scores = []
    for token in window:
        both = torch.cat([token, mean])
        hidden = gelu(linear(both, block["merger.attn_layer.0.weight"], block["merger.attn_layer.0.bias"]))
        scores.append(linear(hidden, block["merger.attn_layer.2.weight"], block["merger.attn_layer.2.bias"]))
    shares = torch.stack(scores).softmax(0)
    return sum(share * token for share, token in zip(shares, window, strict=True))

"""Contrastive decoding the slow way: two separate forward passes a step, one prompt at a time, no cache, no padding.

Shapes: P patches, S placeholders of an image, D channels of the language model.
"""

from __future__ import annotations

from copy import deepcopy

import torch

from mllm_vision.decoding import DamroConfig, TextOnlyConfig, VCDConfig
from mllm_vision.encoding import see_images
from mllm_vision.host import adapter_for
from mllm_vision.slots import Slots
from mllm_vision.tokens import AttentionReceived
from tests.hosts import rows_of_pixels
from tests.test_hosts import image_inputs, logits_by_hand, prompts, prune_by_hand


def attention_of_first_tiles(host, stock, inputs, layer):
    """(P,) for each image: what CLS attends to, or where there is none what each patch receives, of its first tile."""
    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs:  # by merged token, in the order of the prompt: as the tap brings it
        request = AttentionReceived(layer % stock.config.vision_config.depth)
        seen = see_images(stock, Slots([], stock.config), image_inputs(inputs), [request])
        found = {i: m for group, t in seen.groups for i, m in zip(group, t.evidence[request], strict=True)}
        return [found[i] for i in range(len(found))]
    tower = deepcopy(stock.model.vision_tower)
    tower.set_attn_implementation("eager")
    if pixels.dim() == 4 and "image_sizes" in inputs:
        images = tower(pixels, inputs["image_sizes"], output_attentions=True).attentions[layer]
        return [image[0].mean(0).sum(0) for image in images]
    maps = tower(pixels[:, 0] if pixels.dim() == 5 else pixels, output_attentions=True).attentions[layer].mean(1)
    return list(maps[:, 0, 1:] if host.has_cls else maps.sum(1))


def noised(stock, inputs, config):
    """The inputs with noised pixels: a step of the forward process at a time."""
    signal, noise_scale = 1.0, 0.0
    for beta in 1e-5 + (5e-3 - 1e-5) * torch.sigmoid(torch.linspace(-6, 6, 1000)).double()[: config.steps + 1]:
        signal *= float(1 - beta) ** 0.5
        noise_scale = (noise_scale**2 * float(1 - beta) + float(beta)) ** 0.5
    noise = adapter_for(stock.config).noise(stock, image_inputs(inputs), config.seed)
    return {**inputs, "pixel_values": signal * inputs["pixel_values"] + noise_scale * noise}


def contrastive_prompts(host, stock, inputs, config, kept=None):
    """For each row the contrastive prompt: embeddings (1, M, D), and positions (axes, 1, M) or None.

    Args:
        kept: The patches that a reducer keeps of each noised image, as lists; None for all.
    """
    if isinstance(config, VCDConfig):
        rows = prune_by_hand(host, stock, noised(stock, inputs, config), kept or all_patches(host, inputs))
        return [(embeddings, positions) for _, embeddings, positions in rows]
    chosen = [[]] * number(inputs)
    if isinstance(config, DamroConfig):
        attention = attention_of_first_tiles(host, stock, inputs, config.layer)
        chosen = [a.argsort(descending=True)[: config.topk].tolist() for a in attention]
    features = stock.get_image_features(**image_inputs(inputs), return_dict=True).pooler_output
    rows, image = [], 0
    for ids in prompts(inputs):
        first, columns, embeddings, column = image, [], [], 0
        while column < len(ids):
            if ids[column] != stock.config.image_token_id:
                columns.append(column)
                embeddings.append(stock.get_input_embeddings().weight[ids[column]])
                column += 1
                continue
            placeholders = host.placeholders(inputs, image)
            patches = sorted(chosen[image]) if "image_grid_thw" in inputs else chosen[image]
            columns += [column + placeholders.index(patch) for patch in patches]
            embeddings += [features[image][placeholders.index(patch)] for patch in patches]
            column, image = column + len(placeholders), image + 1
        positions = None
        if "image_grid_thw" in inputs:
            types = (ids == stock.config.image_token_id).int()[None]
            grids = inputs["image_grid_thw"][first:image]
            positions = stock.model.get_rope_index(ids[None], types, image_grid_thw=grids)[0][..., columns]
        rows.append((torch.stack(embeddings)[None], positions))
    return rows


def number(inputs):
    """Of images."""
    return len(rows_of_pixels(inputs))


def all_patches(host, inputs):
    return [[p for p in host.placeholders(inputs, i) if p is not None] for i in range(number(inputs))]


def longer(stock, prompt, token):
    """A prompt (embeddings, positions) with one more token."""
    embeddings, positions = prompt
    embeddings = torch.cat([embeddings, stock.get_input_embeddings().weight[token][None, None]], dim=1)
    if positions is not None:
        positions = torch.cat([positions, positions.max().expand(*positions.shape[:2], 1) + 1], dim=2)
    return embeddings, positions


def scores_by_hand(stock, prompt, contrastive, config, steps, forced=None):
    """Tokens and scores (steps, V) of one prompt, greedy or, where tokens are ``forced``, along those.

    A prompt without an image, which has no ``contrastive`` one, is decoded plainly.
    """
    tokens, scores = [], []
    for step in range(steps):
        full = logits_by_hand(stock, *prompt)[0, -1]
        if contrastive is None:
            scores.append(full)
        else:
            other = logits_by_hand(stock, *contrastive)[0, -1]
            score = (1 + config.alpha) * full - config.alpha * other
            scores.append(torch.where(full.softmax(-1) < config.beta * full.softmax(-1).max(), -torch.inf, score))
        tokens.append(int(scores[-1].argmax()) if forced is None else int(forced[step]))
        prompt = longer(stock, prompt, tokens[-1])
        contrastive = None if contrastive is None else longer(stock, contrastive, tokens[-1])
    return tokens, torch.stack(scores)


def decoded_by_hand(host, stock, inputs, config, steps, *, kept=None, added=(), forced=None):
    """Tokens (B, steps) and scores (B, steps, V) of a batch, a prompt at a time.

    Args:
        kept: The patches that a reducer keeps of each image, as lists; None for all.
        added: The tokens that a projector adds to each image.
        forced: Tokens (B, steps) to go along, in place of the likeliest ones.
    """
    full = prune_by_hand(host, stock, inputs, all_patches(host, inputs) if kept is None else kept, added)
    contrastive = contrastive_prompts(host, stock, inputs, config)
    tokens, scores = [], []
    for i, (ids, (_, *prompt), other) in enumerate(zip(prompts(inputs), full, contrastive, strict=True)):
        shown = bool((ids == stock.config.image_token_id).any())
        row = scores_by_hand(
            stock, prompt, other if shown else None, config, steps, None if forced is None else forced[i]
        )
        tokens.append(row[0])
        scores.append(row[1])
    return tokens, torch.stack(scores)


STRATEGIES = (DamroConfig(topk=4, alpha=1.0), VCDConfig(steps=600), TextOnlyConfig())

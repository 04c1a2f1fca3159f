"""Which weights of a host are trained, and in which groups: a learning rate for each part, falling with depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mllm_vision.host import PARTS, SLOTS, adapter_for, find_host, inside, without_peft


def train_only(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Freeze all but these parts and submodules and what methods have.

    Args:
        model: A host.
        names: Parts (`PARTS`) or names of submodules.

    Raises:
        ValueError: a name that is neither a part nor a submodule.
    """
    learns = {id(parameter) for parameter in learning(model, names)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in learns)


def learning(model: PreTrainedModel, names: Sequence[str]) -> list[nn.Parameter]:
    """The parameters that `train_only` leaves to learn; as there, but nothing is frozen."""
    adapter, known = adapter_for(model.config), {name for name, _ in model.named_modules()}
    idle = adapter.idle(model.config)  # in which a process of several would wait for gradients that never come
    if unknown := [name for name in names if name not in PARTS and name not in known]:
        raise ValueError(f"trains: {', '.join(unknown)} is no submodule of the model, and no part: {', '.join(PARTS)}")
    found = []
    for name, parameter in model.named_parameters():
        asked = adapter.part_of(name) in names or any(inside(name, other) for other in (*names, SLOTS))
        if asked and parameter.is_floating_point() and not any(inside(name, other) for other in idle):
            found.append(parameter)
    return found


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    *,
    learning_rates: Mapping[str, float] | None = None,
    layer_decay: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters of a host, each in one group, as a torch optimiser takes them.

    Weights of one dimension (biases, norms, the magnitudes of DoRA) do not decay. Weights of methods are the
    projector's.

    Args:
        model: A host, or what PEFT or a parallel wrapper made of one.
        learning_rate: Of the parts that ``learning_rates`` does not name.
        learning_rates: By part.
        layer_decay: By part, the factor from the rate of each layer to that of the one before it. The deepest layer
            that the host reads has the full rate; embeddings count as one more layer before the first.

    Returns:
        Groups with ``name`` (the part, the layer where rates fall, "no_decay"), ``params``, ``lr``, ``weight_decay``.

    Raises:
        ValueError: a part that there is not, one without layers to decay over, or a factor that is not in (0, 1].
    """
    rates, decays = dict(learning_rates or {}), dict(layer_decay or {})
    for name, given in (("learning_rates", rates), ("layer_decay", decays)):
        if unknown := sorted(given.keys() - set(PARTS)):
            raise ValueError(f"{name} has no part {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    for part, factor in decays.items():
        if not 0 < factor <= 1:
            raise ValueError(f"layer_decay of the {part} must be in (0, 1], got {factor}")
    host = find_host(model)
    adapter = adapter_for(host.config)
    below = {part: _steps_below(host, part) for part in decays}
    groups: dict[str, dict[str, Any]] = {}
    for given_name, parameter in host.named_parameters():
        if not parameter.requires_grad:
            continue
        name = without_peft(given_name)
        part = adapter.part_of(name)
        rate, pieces = rates.get(part, learning_rate), [part]
        if part in decays:
            steps = next((steps for module, steps in below[part].items() if inside(name, module)), 0)
            rate *= decays[part] ** steps
            pieces.append(f"{steps}_below")
        shape = getattr(parameter, "ds_shape", parameter.shape)  # of what ZeRO-3 has taken apart
        decay = weight_decay if len(shape) > 1 else 0.0
        key = ".".join([*pieces, *(["no_decay"] if decay != weight_decay else [])])
        group = groups.setdefault(key, {"name": key, "params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def transformer_layers(host: PreTrainedModel, part: str) -> list[str]:
    """Names of the transformer layers of a part, in order; none where it has no list of them."""
    adapter = adapter_for(host.config)
    lists = {
        without_peft(name): len(module)
        for name, module in host.named_modules()
        if isinstance(module, nn.ModuleList) and adapter.part_of(without_peft(name)) == part
    }
    # Of lists in lists, as the experts of each layer, the outer one.
    name = min(lists, key=lambda found: (found.count("."), -lists[found]), default="")
    return [f"{name}.{i}" for i in range(lists.get(name, 0))]


def _steps_below(host: PreTrainedModel, part: str) -> dict[str, int]:
    """For each layer of a part, and for embeddings before the first, its distance from the deepest layer in use."""
    adapter = adapter_for(host.config)
    idle = adapter.idle(host.config)
    layers = [name for name in transformer_layers(host, part) if name not in idle]
    if not layers:
        raise ValueError(f"the {part} has no layers for layer_decay to fall over; leave it out")
    steps = {name: len(layers) - 1 - i for i, name in enumerate(layers)}
    for name in dict.fromkeys(without_peft(given) for given, _ in host.named_parameters()):
        if adapter.part_of(name) == part:
            if inside(name, layers[0]):
                break
            steps[name] = len(layers)
    return steps

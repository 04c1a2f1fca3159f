"""A toy recipe of two stages on a toy mixture of rows, and what a run of it has left."""

import json
import os
import signal
import sys

from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from safetensors.torch import load_file

from mllm_vision.recipes.trainer import RecipeTrainer
from mllm_vision.scenes.export import export_conversations

_ARGUMENTS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 3,
    "save_steps": 2,
    "disable_tqdm": True,
}
SPATIAL = {"type": "spatial_tokens", "variant": "cropping", "channels": 8, "scales": 3}


def write_recipe(folder, **changed):
    """A recipe: all of a small new model, then its projector and LoRA with dropout; one row in three is text alone."""
    export_conversations(folder / "scenes", "train", 9, side=70)
    rows = json.loads((folder / "scenes" / "conversations.json").read_text())
    for i, row in enumerate(rows):
        row["conversations"] = row["conversations"][: 2 + 2 * (i % 2)]
        if i % 3 == 0:
            del row["image"]
            row["conversations"][0]["value"] = f"is {i} a number?"
    (folder / "scenes" / "mixed.json").write_text(json.dumps(rows))
    source = {"format": "conversations", "images": str(folder / "scenes" / "images")}
    data = [
        {**source, "path": str(folder / "scenes" / "mixed.json"), "weight": 1.5},
        {**source, "path": str(folder / "scenes" / "conversations.json"), "limit": 4},
    ]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    stage = {"objective": "conversations", "data": data, "arguments": _ARGUMENTS}
    lora = {"target": "language", "r": 4, "alpha": 8, "dropout": 0.1}
    recipe = {
        "output": "nowhere",
        "seed": 0,
        "side": 70,
        "model": {
            "vision": {**sizes, "image_size": 70, "patch_size": 14, "num_hidden_layers": 3},
            "text": {**sizes, "tie_word_embeddings": False, "max_position_embeddings": 1024, "attention_dropout": 0.1},
        },
        "stages": [
            {**stage, "name": "all", "trains": ["tower", "projector", "language"], "group_by_modality": True},
            {**stage, "name": "lora", "trains": ["projector"], "lora": lora},
        ],
        **changed,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # which is YAML, and has no aliases, by which stages would share settings
    return path


def in_stages(*settings):
    """Overrides of the arguments of both stages."""
    return [f"stages.{stage}.arguments.{setting}" for stage in ("all", "lora") for setting in settings]


def logged(output):
    """All lines of the logs of a run, by stage, without the times."""
    return {
        path.name: [
            {key: value for key, value in json.loads(line).items() if "runtime" not in key and "per_second" not in key}
            for line in path.read_text().splitlines()
            if "train_runtime" not in line
        ]
        for path in output.glob("*.log.jsonl")
    }


def saved(folder):
    """The weights in a folder."""
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def kill_while_saving(rank):
    """Have this process killed when it has written the weights of its second checkpoint, and nothing else of it."""
    _kill_where(RecipeTrainer, "_save_optimizer_and_scheduler", lambda trainer: trainer.state.global_step == 4)


def _kill_where(owner, name, now):
    original = getattr(owner, name)

    def watched(self, *args, **kwargs):
        if now(self):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    setattr(owner, name, watched)


def kill_after_three_steps(rank):
    _kill_where(RecipeTrainer, "training_step", lambda trainer: trainer.state.global_step == 3)


def shard_on_processors(rank):
    """Have accelerate shard weights, which it does for accelerators alone, though gloo and PyTorch can without."""
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def kill_shards_after_three_steps(rank):
    shard_on_processors(rank)
    kill_after_three_steps(rank)


def take_all_weights_apart(rank):
    """Have ZeRO-3 share out small weights too, which it leaves whole, and of which the toy model is made."""
    original = DeepSpeedPlugin.__post_init__

    def all_apart(self):
        original(self)
        self.hf_ds_config.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = all_apart


def kill_apart_after_three_steps(rank):
    take_all_weights_apart(rank)
    kill_after_three_steps(rank)


def break_the_gradient(rank):
    """Have the third gradient of the second process alone be no number, though its loss is one."""
    original = RecipeTrainer.compute_loss

    def broken(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        if rank == 1 and self.state.global_step == 2:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    RecipeTrainer.compute_loss = broken


def break_the_loss(rank):
    """Have the third loss of the second process alone be no number."""
    original = RecipeTrainer.compute_loss

    def broken(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if rank == 1 and self.state.global_step == 2 else loss

    RecipeTrainer.compute_loss = broken


def keep_from_cache_and_pictures(rank):
    """Have the second process fail where it would write to the cache of features or open a picture."""

    def watched(event, args):
        if event == "open" and rank == 1:
            path, _, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if ("/features/" in str(path) and writes) or "/images/" in str(path):
                raise RuntimeError(f"the second process opened {path}")

    sys.addaudithook(watched)

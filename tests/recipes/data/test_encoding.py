import logging

import pytest
import torch

from mllm_vision.prompts import question_parts, write_prompt
from mllm_vision.recipes.data import DataSource, training_rows
from mllm_vision.recipes.data.encoding import RowEncoder
from tests.hosts import HOSTS, picture
from tests.recipes.data.written import ANSWERS, OPEN_ENDED, ROWS, processor_of, said, write

HOST = HOSTS[0]


def _messages(*texts, system=None):
    turns = [] if system is None else [("system", system)]
    turns += [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]


def _learnt(processor, row):
    """The runs of labels, as text."""
    labelled = (row["labels"] != -100).tolist()
    runs, run = [], []
    for token, learnt in zip([*row["input_ids"].tolist(), 0], [*labelled, False], strict=True):
        if learnt:
            run.append(token)
        elif run:
            runs.append(processor.tokenizer.decode(run))
            run = []
    return runs


def test_labels_are_the_answers_with_their_end_on_every_host(host, tmp_path):
    processor = processor_of(host)
    rows = training_rows([DataSource(format="conversations", path=write(tmp_path, ROWS))], processor, max_length=400)
    space = "" if "vision_start" in host.image_mark else " "  # behind "ASSISTANT:", no part of the question
    for row, answers, images in zip((rows[i] for i in range(3)), ANSWERS, (1, 2, 0), strict=True):
        assert _learnt(processor, row) == [f"{space}{answer}</s>" for answer in answers]
        learnt = row["labels"] != -100
        assert torch.equal(row["labels"][learnt], row["input_ids"][learnt])
        assert row["input_ids"].shape == row["labels"].shape == row["attention_mask"].shape
        assert ("pixel_values" in row) == (images > 0)
    assert [rows[i]["row_id"] for i in range(3)] == ["7", "two", f"{tmp_path}/rows.json:2"]


def test_a_row_is_what_the_processor_makes_of_its_prompt(host, tmp_path):
    """But for the answer, the ids and pictures are those that the stock processor gives at inference."""
    processor = processor_of(host)
    rows = training_rows([DataSource(format="conversations", path=write(tmp_path, ROWS))], processor, max_length=400)
    prompt = write_prompt(processor, question_parts("<image>\nWhat is it?", 1))
    stock = processor(images=[picture(0)], text=[prompt], return_tensors="pt")
    ids = stock.pop("input_ids")[0]
    assert torch.equal(rows[0]["input_ids"][: len(ids)], ids)
    for name in set(stock) - {"attention_mask", "mm_token_type_ids"}:
        torch.testing.assert_close(rows[0][name], stock[name])


def test_the_bundled_model_is_asked_as_it_was_trained(tmp_path):
    import mllm_vision as mv

    _, processor = mv.load("tiny-llava-scenes")
    path = write(tmp_path, [{"image": "0.png", "conversations": said("<image>\nwhat color is it?", "red")}])
    row = training_rows([DataSource(format="conversations", path=path)], processor, max_length=200)[0]
    assert processor.tokenizer.decode(row["labels"][row["labels"] != -100]) == "red</s>"
    assert int((row["input_ids"] == processor.image_token_id).sum()) == 100


def test_without_a_template_rows_ask_as_prompts_do():
    processor = processor_of(HOST)
    processor.chat_template = None
    encoder = RowEncoder(processor, 400)
    text, answers = encoder.render(_messages("What?", "a dog", "Sure?", "yes", system="Be brief."))
    assert text == "Be brief. USER: What? ASSISTANT: a dog</s>USER: Sure? ASSISTANT: yes</s>"
    assert [text[begin:end] for begin, end in answers] == [" a dog</s>", " yes</s>"]
    parts = question_parts("<image>\nWhat?", 1)
    turns = [{"role": "user", "content": parts}, *_messages("", "a dog")[1:]]
    assert encoder.render(turns)[0] == write_prompt(processor, parts) + " a dog</s>"


@pytest.mark.parametrize(
    ("closing", "text", "answer"),
    [
        ("", "Q: Hi A: Ho</s>Q: And A: No</s>", " Ho</s>"),
        (" ", "Q: Hi A: Ho</s>Q: And A: No</s>", " Ho</s>"),
        ("</s>\n", "Q: Hi A: Ho</s>\nQ: And A: No</s>\n", " Ho</s>"),
        (" </s>", "Q: Hi A: Ho </s>Q: And A: No </s>", " Ho </s>"),
        ("<|end|>\n", "Q: Hi A: Ho<|end|>\nQ: And A: No<|end|>\n", " Ho<|end|>"),
        ("\n#", "Q: Hi A: Ho</s>\n#Q: And A: No</s>\n#", " Ho</s>"),
    ],
)
def test_an_answer_ends_with_the_templates_token_or_else_with_the_tokenizers(closing, text, answer):
    processor = processor_of(
        HOST,
        "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'][0]['text'] }} {% else %}"
        "A: {{ m['content'][0]['text'] }}" + closing + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}",
    )
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    encoder = RowEncoder(processor, 400)
    rendered, answers = encoder.render(_messages("Hi", "Ho", "And", "No"))
    assert rendered == text
    assert rendered[slice(*answers[0])] == answer
    row = encoder.encode(rendered, answers, [])
    assert _learnt(processor, row) == [answer, answer.replace("Ho", "No")]


@pytest.mark.parametrize("own", ["", "{{ bos_token }}"])
def test_there_is_one_bos_whoever_writes_it(own):
    processor = processor_of(HOST, own + OPEN_ENDED)
    encoder = RowEncoder(processor, 400)
    row = encoder.encode(*encoder.render(_messages("Hi", "Ho")), [])
    assert processor.tokenizer.decode(row["input_ids"]) == "<s>USER: Hi ASSISTANT: Ho</s>"


def test_how_long_a_row_may_be_is_not_for_the_tokenizer_to_say(caplog, monkeypatch):
    processor = processor_of(HOST)
    processor.tokenizer.model_max_length = 5
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    text, answers = RowEncoder(processor, 10_000).render(_messages("What is it that you see?", "Ho"))
    RowEncoder(processor, 10_000).encode(text, answers, [])
    assert caplog.text == ""


def test_a_row_may_be_as_long_as_the_most_and_no_longer():
    processor = processor_of(HOST)
    encoder = RowEncoder(processor, 10_000)
    turn = [{"role": "user", "content": [{"type": "image"}]}, *_messages("", "Ho")[1:]]
    text, answers = encoder.render(turn)
    length = len(encoder.encode(text, answers, [picture(0)])["input_ids"])
    assert length > 36
    assert len(RowEncoder(processor, length).encode(text, answers, [picture(0)])["input_ids"]) == length
    with pytest.raises(ValueError, match=f"it has {length} tokens, more than max_length={length - 1}"):
        RowEncoder(processor, length - 1).encode(text, answers, [picture(0)])


def test_a_template_that_is_no_prefix_of_itself_is_refused():
    forgets = (
        "{% for m in messages %}{% if not loop.last %}-{% else %}{{ m['content'][0]['text'] }}{% endif %}{% endfor %}"
    )
    encoder = RowEncoder(processor_of(HOST, forgets), 400)
    with pytest.raises(RuntimeError, match="give the processor a template that only adds"):
        encoder.render(_messages("Hi", "Ho"))
    drops_old_answers = OPEN_ENDED.replace("{{ p['text'] }}", "{{ p['text'] if loop.last or m == messages[-1] }}")
    drops_old_answers = drops_old_answers.replace(
        "loop.last or m == messages[-1]", "m == messages[-1] or m['role'] == 'user'"
    )
    encoder = RowEncoder(processor_of(HOST, drops_old_answers), 400)
    encoder.render(_messages("Hi", "Ho"))
    with pytest.raises(RuntimeError, match="writes a conversation otherwise once it goes on"):
        encoder.render(_messages("Hi", "Ho", "And", "No"))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}",
            "no system here",
        ),
        ("{% set messages = messages[1:] %}" + OPEN_ENDED, "leaves out what the system says: 'Be brief.'"),
        (OPEN_ENDED.replace("{{ p['text'] }}", "{{ p['text'].upper() }}"), "leaves out an answer or changes it: 'Ho'"),
    ],
)
def test_what_a_template_does_not_say_as_it_stands_is_an_error(template, says):
    with pytest.raises(ValueError, match=says):
        RowEncoder(processor_of(HOST, template), 400).render(_messages("Hi", "Ho", system="Be brief."))


def test_a_mark_in_text_is_no_picture(tmp_path):
    from mllm_vision.recipes.data.conversation import from_messages

    parts = [{"type": "image"}, {"type": "text", "text": "What does <image> mean?"}]
    row = {"messages": [{"role": "user", "content": parts}, *_messages("", "Ho")[1:]], "image": picture(0)}
    with pytest.raises(ValueError, match="the text of a turn by the user holds the mark of a picture"):
        RowEncoder(processor_of(HOST), 400)(from_messages(row), tmp_path)


def test_a_token_across_the_edge_of_an_answer_is_an_error():
    processor = processor_of(HOST)
    spans = processor.tokenizer("What is left?", return_offsets_mapping=True)["offset_mapping"]
    begin, end = next(span for span in spans if span[1] - span[0] > 1)
    encoder = RowEncoder(processor, 400)
    for edges in [(begin + 1, 13), (0, begin + 1)]:
        with pytest.raises(ValueError, match="half question and half answer"):
            encoder.encode("What is left?", [edges], [])
    assert int((encoder.encode("What is left?", [(begin, end)], [])["labels"] != -100).sum()) == 1


def test_a_processor_that_writes_more_than_placeholders_is_refused():
    class Framing(type(processor_of(HOST))):
        def replace_image_token(self, image_inputs, image_idx, **kwargs):
            return f"begin{super().replace_image_token(image_inputs, image_idx, **kwargs)}"

    processor = processor_of(HOST)
    processor.__class__ = Framing
    with pytest.raises(RuntimeError, match="Framing puts more than <image> in place of a picture"):
        RowEncoder(processor, 400).encode("<image> a", [], [picture(0)])


def test_tokenizers_that_cannot_be_used_are_refused():
    processor = processor_of(HOST)
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        RowEncoder(processor, 400)

    class Slow(type(processor.tokenizer)):
        is_fast = False

    processor.tokenizer.__class__ = Slow
    with pytest.raises(ValueError, match="Slow is a slow tokenizer"):
        RowEncoder(processor, 400)

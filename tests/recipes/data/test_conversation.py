import io
import zipfile

import pytest
from PIL import Image

from mllm_vision.recipes.data.conversation import BadRow, from_conversations, from_messages, open_picture, size
from tests.hosts import picture
from tests.recipes.data.written import said

IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("<image>\nWhat?", [IMAGE, text("What?")]),
        ("<image> What? ", [IMAGE, text("What?")]),
        ("What?\n<image>", [text("What?"), IMAGE]),
        ("Is <image> like <image>?", [text("Is "), IMAGE, text(" like "), IMAGE, text("?")]),
        ("<image>\n<image>\nCompare:\n\nwell", [IMAGE, IMAGE, text("Compare:\n\nwell")]),
    ],
)
def test_marks_become_parts_where_they_stand(value, parts):
    pictures = [f"{i}.png" for i in range(value.count("<image>"))]
    read = from_conversations({"image": pictures, "conversations": said(value, "yes")})
    assert read.messages == [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [text("yes")]},
    ]
    assert read.pictures == pictures


def test_a_system_turn_and_text_alone():
    turns = [{"from": "system", "value": "Be brief."}, *said("Hello", "Hi")]
    read = from_conversations({"image": "", "conversations": turns})
    assert [message["role"] for message in read.messages] == ["system", "user", "assistant"]
    assert read.messages[0]["content"] == [text("Be brief.")]
    assert read.pictures == []


def _messages(content):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": _messages("<image>\nWhat?"), "images": ["a.png"]},
        {"messages": _messages("<image>\nWhat?"), "images": None, "image": "a.png"},
        {"messages": _messages([IMAGE, text("What?")]), "images": [{"bytes": None, "path": "a.png"}]},
        {"messages": _messages([{**IMAGE, "text": None, "path": "a.png"}, {**text("What?"), "path": None}])},
        {"messages": _messages([{**IMAGE, "image": {"path": "a.png", "bytes": None}}, text("What?")]), "images": []},
        {"messages": _messages([{**IMAGE, "url": "a.png"}, text("What?")])},
    ],
)
def test_messages_have_their_pictures_in_parts_or_in_a_column(row):
    read = from_messages(row)
    assert read.messages == [
        {"role": "user", "content": [IMAGE, text("What?")]},
        {"role": "assistant", "content": [text("yes")]},
    ]
    assert read.pictures == ["a.png"]


def test_bytes_go_before_the_path_beside_them():
    parts = [{"type": "image"}, text("What?")]
    assert from_messages({"messages": _messages(parts), "image": {"bytes": b"x", "path": "a"}}).pictures == [b"x"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "'conversations' must be a list of turns, got None"),
        ({"conversations": []}, "must be a list of turns"),
        ({"conversations": ["hello"]}, "must be a list of turns"),
        ({"conversations": said("Hello", None)}, "a turn must be text, got None"),
        ({"conversations": said("Hello", " \n")}, "an answer is empty"),
        ({"conversations": said("", "Hi")}, "a turn by the user is empty"),
        ({"conversations": said("Hello")}, "end with an answer, got user"),
        ({"conversations": said("Hello", "Hi", "And?")}, "end with an answer"),
        ({"conversations": said("Hello", "Hi")[::-1]}, "got assistant, user"),
        ({"conversations": [*said("a", "b"), *said("c", "d")[1:]]}, "got user, assistant, assistant"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "got system"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "a turn is by 'tool'"),
        ({"conversations": said("Hello", "Hi"), "image": "a.png"}, "no <image> mark for 1 picture;"),
        ({"conversations": said("<image>", "Hi")}, "1 <image> mark for 0 pictures"),
        ({"conversations": said("<image><image>", "Hi"), "image": "a.png"}, "2 <image> marks for 1 picture;"),
        ({"conversations": said("Hello", "Hi <image>"), "image": "a.png"}, "in a turn by the assistant"),
        ({"conversations": said("<image>", "Hi"), "image": {"bytes": None}}, "must have bytes or a path"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row, says):
    with pytest.raises(ValueError, match=says):
        from_conversations(row)


def test_what_is_wrong_with_messages_is_said():
    with pytest.raises(ValueError, match="both in the parts of messages and in a column"):
        from_messages({"messages": _messages([{**IMAGE, "path": "a.png"}]), "images": ["b.png"]})
    with pytest.raises(ValueError, match=r"type text or image, got \{'type': 'video'\}"):
        from_messages({"messages": _messages([{"type": "video"}])})


def test_sizes_are_told_of_good_rows_and_of_broken_ones():
    assert size({"conversations": said("<image>\nHi", "a")}) == (1, 11)
    assert size({"messages": _messages([IMAGE, IMAGE, text("Hi")])}) == (2, 5)
    assert size({"messages": _messages("<image>Hi")}) == (1, 12)
    assert [size(row) for row in ({}, {"conversations": "x"}, {"messages": [None, {}]})] == [(0, 0)] * 3


def test_a_picture_is_opened_from_whatever_names_it(tmp_path):
    shown = picture(3)
    shown.save(tmp_path / "a.png")
    encoded = io.BytesIO()
    shown.save(encoded, "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    address = f"zip://a.png::{tmp_path}/a.zip"  # as hub data sets have them
    for source in ("a.png", str(tmp_path / "a.png"), encoded.getvalue(), shown, address):
        assert open_picture(source, tmp_path).tobytes() == shown.tobytes()
    turned = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture("turned.jpg", tmp_path).size == (2, 4)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("gone.png", "gone.png is no file"),
        ("cut.png", "damaged or cut off"),
        (b"no image", "is not an image"),
        ("file:///gone/gone.png", "cannot be read"),
        (5, "path, bytes or a picture, got int"),
    ],
)
def test_a_picture_that_cannot_be_opened_says_why(tmp_path, source, says):
    picture(3, 200, 200).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    with pytest.raises(ValueError, match=says):
        open_picture(source, tmp_path)


def test_a_bad_row_is_the_same_error_when_a_worker_hands_its_text_on():
    error = BadRow("7", "an answer is empty")
    assert str(error) == "row 7: an answer is empty"
    assert str(BadRow(str(error))) == str(error)

"""The fast tokenizer of a sentencepiece model against sentencepiece itself."""

import pytest
from sentencepiece import SentencePieceProcessor

from mllm_vision.sentence_pieces import fast_tokenizer
from tests.authors import SENTENCES, sentence_pieces


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(sentence_pieces())
    return fast_tokenizer(path), SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize(
    "text",
    [*SENTENCES, "two  spaces ", " one ahead", "a\nline\tand a tab", "Ünï 漢字 \x00\x7f", "wholeisthewhat", "▁", ""],
)
def test_ids_and_text_are_those_of_sentencepiece(tokenizers, text):
    ours, pieces = tokenizers
    ids = [pieces.bos_id(), *pieces.encode(text)]
    assert ours(text).input_ids == ids
    assert ours.decode(ids, skip_special_tokens=True) == pieces.decode(ids)


def test_special_tokens_are_those_of_the_model(tokenizers):
    ours, pieces = tokenizers
    ids = (ours.unk_token_id, ours.bos_token_id, ours.eos_token_id)
    assert ids == (pieces.unk_id(), pieces.bos_id(), pieces.eos_id())
    assert len(ours) == len(pieces)
    assert ours("a", "b").input_ids == [1, *pieces.encode("a"), 1, *pieces.encode("b")]
    assert ours("What</s>What", add_special_tokens=False).input_ids == [
        *pieces.encode("What"),
        2,
        *pieces.encode("What"),
    ]

"""A sentencepiece model, `tokenizer.model`, as a fast tokenizer that gives the same ids.

Older checkpoints of Llama and its kin have no `tokenizer.json`. transformers makes one only where protobuf is
installed, and its `LlamaTokenizer` then writes no BOS and no space before text behind a special token. Both were there
in training.
"""

from __future__ import annotations

from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

SPACE = "▁"


def fast_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a BPE model with byte fallback, as Llama's: BOS first, a space before every stretch of text.

    Raises:
        ValueError: some pieces were defined by hand, as no tokenizer of Llama's has them.
        RuntimeError: the file is no sentencepiece model.
    """
    pieces = SentencePieceProcessor(model_file=str(path))
    ids = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    special = [piece for piece, i in ids.items() if pieces.is_control(i) or pieces.is_unknown(i)]
    splits = {
        piece: [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in ids and piece[k:] in ids]
        for piece, i in ids.items()
        if len(piece) > 1 and not pieces.is_byte(i) and piece not in special
    }
    # Merges give a piece its score, which falls from 0; a piece of score 0 that no merge makes was put in by hand.
    if by_hand := [piece for piece, pairs in splits.items() if not pairs and pieces.get_score(ids[piece]) == 0]:
        raise ValueError(
            f"{path} has {len(by_hand)} pieces defined by hand ({', '.join(by_hand[:5])}), which a fast tokenizer "
            "would find elsewhere in a text; put a tokenizer.json beside it"
        )
    ranked = sorted(splits, key=lambda piece: -pieces.get_score(ids[piece]))
    merges = [pair for piece in ranked for pair in sorted(splits[piece], key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    unknown, bos, eos = (pieces.id_to_piece(i) for i in (pieces.unk_id(), pieces.bos_id(), pieces.eos_id()))
    core = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=unknown, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    core.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, pieces.bos_id())]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token=unknown, bos_token=bos, eos_token=eos, padding_side="left"
    )

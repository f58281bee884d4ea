"""sentence-transformers: a BERT and a pooling layer."""

import tempfile
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizer

from tests.engines.programs.common import floats, main

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "copy", "for", "all", "processes"]


def build(directory: Path, divide: int) -> None:
    """Random weights and a vocabulary of a few words."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "vocab.txt").write_text("\n".join([*WORDS, *(f"word{number}" for number in range(8000))]))
        BertTokenizer(str(Path(scratch, "vocab.txt"))).save_pretrained(scratch)
        BertModel(
            BertConfig(
                vocab_size=8000 + len(WORDS),
                hidden_size=512,
                num_hidden_layers=8 // divide,
                num_attention_heads=8,
                intermediate_size=2048,
            )
        ).save_pretrained(scratch)
        words = Transformer(scratch)
        SentenceTransformer(modules=[words, Pooling(512)]).save(str(directory))


def load(directory: Path) -> tuple[object, bytes]:
    """The encoder, and the vector of a sentence."""
    model = SentenceTransformer(str(directory), device="cpu")
    return model, floats(model.encode("one copy for all processes")[:64].tolist())


if __name__ == "__main__":
    main(build, {"encode": ("*", load)})

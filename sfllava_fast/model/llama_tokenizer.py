"""Llama's slow tokenizer, a SentencePiece model, as in transformers 4.38.2, which SlowFast-LLaVA's published code uses.

transformers 5 dropped it. It converts such a model without the pieces' scores, the symbols that the model defines, and
the "legacy" rule for text after a special token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer

MODEL = "tokenizer.model"
_SPACE = "\u2581"
# Appended to the model file, this protobuf message sets normalizer_spec.add_dummy_prefix = false.
_NO_PREFIX = b"\x1a\x02\x18\x00"


class LlamaTokenizer(PreTrainedTokenizer):
    """A SentencePiece model, applied to the text between special tokens.

    Attributes:
        legacy: Whether the model's leading space is added to every stretch of text, instead of only to the first.
        add_bos_token: Whether BOS is added before a text.
        pieces: The SentencePiece model.
    """

    # Not ClassVar, as transformers declares them.
    vocab_files_names = {"vocab_file": MODEL}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str,
        legacy: bool | None = True,
        add_bos_token: bool = True,
        unk_token: Any = "<unk>",
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        **settings: Any,
    ) -> None:
        self.legacy, self.add_bos_token = legacy is None or legacy, add_bos_token
        suffix = b"" if self.legacy else _NO_PREFIX
        self.pieces = SentencePieceProcessor(model_proto=Path(vocab_file).read_bytes() + suffix)
        super().__init__(unk_token=unk_token, bos_token=bos_token, eos_token=eos_token, **settings)

    @property
    def vocab_size(self) -> int:
        """Number of pieces of the model; `len` includes added tokens."""
        return self.pieces.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """The id of every token."""
        return {self.pieces.id_to_piece(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def build_inputs_with_special_tokens(self, ids: list[int], pair: list[int] | None = None) -> list[int]:
        """The ids with BOS before each text, if the tokenizer adds it."""
        bos = [self.bos_token_id] if self.add_bos_token else []
        return bos + ids + (bos + pair if pair is not None else [])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens, without the leading space of the encoding."""
        if tokens and tokens[0].startswith(_SPACE):
            tokens = [tokens[0][1:], *tokens[1:]]
        added, text = self.added_tokens_encoder, ""
        stretch: list[str] = []
        for token in tokens:
            if token in added:
                text, stretch = text + self.pieces.decode(stretch) + token, []
            else:
                stretch.append(token)
        return text + self.pieces.decode(stretch)

    def tokenize(self, text: str, *args: Any, **settings: Any) -> list[str]:
        """The tokens of a text."""
        if self.legacy or not text:
            return super().tokenize(text, *args, **settings)
        tokens = super().tokenize(_SPACE + text.replace(_SPACE, " "), *args, **settings)
        redundant = len(tokens) > 1 and tokens[0] == _SPACE and tokens[1] in self.all_special_tokens
        return tokens[redundant:]

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return self.pieces.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces.id_to_piece(index)

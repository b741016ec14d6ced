"""Llama tokenizers that are a SentencePiece model alone, as the original LLaVA format has them.

The ids are those of the slow tokenizer that SlowFast-LLaVA's published code loads (transformers 4.38.2): transformers 5
has none, and its own conversion leaves out the pieces' scores and the "legacy" rule for text behind a special token.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint_files import one_line, read_json
from .errors import BackendError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

MODEL = "tokenizer.model"
_SPACE = "\u2581"
_SPECIALS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": None}


def load_llama_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory with tokenizer.model, and tokenizer_config.json beside it.

    Raises BackendError without the package sentencepiece, CheckpointError for a file that is none of its models.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise BackendError(f"no sentencepiece to read {path / MODEL} with: pip install sentencepiece") from error
    from transformers import PreTrainedTokenizerFast

    settings = (read_json(path / "special_tokens_map.json") or {}) | (read_json(path / "tokenizer_config.json") or {})
    with one_line(f"{path}: the tokenizer cannot be loaded"):
        specials = {role: _text(settings.get(role, default)) for role, default in _SPECIALS.items()}
        tokenizer = _convert(SentencePieceProcessor(model_file=str(path / MODEL)), settings.get("legacy", True))
        _add_tokens(tokenizer, path, settings, [text for text in specials.values() if text])
        if settings.get("add_bos_token", True):
            _add_bos(tokenizer, specials["bos_token"])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, chat_template=settings.get("chat_template"), **specials
        )


def _convert(model: Any, legacy: bool) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    ids = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    tokenizer = Tokenizer(
        models.BPE(ids, _merges(model, ids), unk_token=model.id_to_piece(model.unk_id()), fuse_unk=True, byte_fallback=True)
    )
    if legacy:  # every stretch between special tokens begins with a space
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    return tokenizer


def _merges(model: Any, ids: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of pieces that make a piece, best first."""
    ranked = []
    for piece, i in ids.items():
        pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = sorted((ids[left], ids[right], left, right) for left, right in pairs if left in ids and right in ids)
        ranked += [(-model.get_score(i), i, rank, left, right) for rank, (_, _, left, right) in enumerate(pairs)]
    return [(left, right) for *_, left, right in sorted(ranked)]


def _add_tokens(tokenizer: Tokenizer, path: Path, settings: dict[str, Any], specials: list[str]) -> None:
    """Tokens that are matched before the model sees the text, each with the id that the files give it."""
    from tokenizers import AddedToken

    listed = {text: i for text, i in (read_json(path / "added_tokens.json") or {}).items()}
    listed |= {_text(token): int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    for text in sorted([*listed, *(text for text in specials if text not in listed)], key=lambda text: listed.get(text, -1)):
        tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        if listed.get(text, tokenizer.token_to_id(text)) != tokenizer.token_to_id(text):
            raise ValueError(f"{text} cannot have the id {listed[text]}")


def _add_bos(tokenizer: Tokenizer, bos: str) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def _text(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token

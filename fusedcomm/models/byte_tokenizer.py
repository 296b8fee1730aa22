"""A tokenizer whose tokens are the 256 bytes and an end of text."""

from __future__ import annotations

import json
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 256
VOCAB_SIZE = 257
PRINTABLE = range(0x20, 0x7F)
"""The bytes of printable ASCII, which are their own ids."""


def write_byte_tokenizer(path: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` into ``path``; ids are bytes, 256 the end."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={_symbol(byte): byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _symbol(byte: int) -> str:
    """The character that stands for ``byte`` in byte-level BPE (GPT-2): itself, or one from U+0100 up."""
    as_is = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in as_is:
        return chr(byte)
    return chr(0x100 + [b for b in range(256) if b not in as_is].index(byte))

"""Builds a CLIPTokenizer whose merges make every caption word one token, and that still spells any other prompt."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 16

_WORD = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]+")  # CLIP's pre-tokenisation of ASCII, English contractions aside


def words(captions: Iterable[str]) -> list[str]:
    """The distinct words as CLIP splits them, sorted ("t-shirt" is three)."""
    return sorted({word for caption in captions for word in _WORD.findall(caption.lower())})


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for the bytes in GPT-2's and CLIP's vocabularies, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def learn_merges(vocabulary: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each word one symbol: the most frequent pair first, ties in alphabetical order."""
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary]
    merges = []
    while any(len(symbols) > 1 for symbols in spellings):
        pairs = Counter(pair for symbols in spellings for pair in itertools.pairwise(symbols))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spellings = [_merge(symbols, best) for symbols in spellings]
    return merges


def save(captions: Iterable[str], folder: Path) -> None:
    """Writes ``vocab.json``, ``merges.txt`` and the configuration that CLIPTokenizer.from_pretrained reads."""
    merges = learn_merges(words(captions))
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges), START, END]
    configuration = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
    }
    special = {key: value for key, value in configuration.items() if key.endswith("_token")}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    _write_json(folder / "tokenizer_config.json", configuration)
    _write_json(folder / "special_tokens_map.json", special)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        # A symbol that was itself just merged cannot be the left half again: it is longer than pair[0].
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")

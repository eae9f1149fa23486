"""Turn text into token ids: plain bytes, or any Hugging Face `tokenizer.json`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from longctx.data.indexed import token_dtype

# Tried in this order among the added tokens of a tokenizer.json. Only tokens that end a *document* in pre-training
# data: not the ones that end a chat turn (<|im_end|>, <|eot_id|>), which many tokenizers have besides.
EOD_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_document|>",
    "<｜end▁of▁sentence｜>",
    "<eos>",
    "<|eos|>",
    "</s>",
    "[EOS]",
    "[eos]",
    "[EOD]",
    "<eod>",
)


class Tokenizer(Protocol):
    """What the data pipeline asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eod_id(self) -> int:
        """The id that ends a document. Raises ValueError if the tokenizer has none."""

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the ids of a text (bytes are UTF-8), `token_dtype(vocab_size)` [n]; no special token is added."""

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """Return `[encode(text) for text in texts]`, possibly with several threads."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of some ids, without the end-of-document token. Raises ValueError for an id out of range."""

    def fingerprint(self) -> str:
        """Return 16 hex digits that change when the same text could give other ids."""


class ByteTokenizer:
    """Map each byte to its value; id 256 ends a document. Any text round-trips, and no file or package is needed."""

    vocab_size: int = 257
    eod_id: int = 256

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the bytes of a text (UTF-8) as uint16 [len]."""
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(token_dtype(self.vocab_size))

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """Encode each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text; bytes that are not UTF-8, as in a text cut anywhere, become U+FFFD."""
        values = _checked_ids(ids, self.vocab_size)
        return values[values != self.eod_id].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        """Return a constant."""
        return hashlib.sha256(b"longctx byte tokenizer, 256 = end of document").hexdigest()[:16]


class HuggingFaceTokenizer:
    """Wrap a `tokenizer.json` (or a folder that holds one) with the `tokenizers` package.

    eod_token: the token that ends a document, or None to look for a usual name among the added tokens.
    Raises ValueError for a missing or unreadable file and for an `eod_token` that is not in the vocabulary.
    """

    def __init__(self, path: str | Path, *, eod_token: str | None = None) -> None:
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise ValueError(
                f"data.tokenizer={str(path)!r}: {file} does not exist; give 'byte' or the path of a tokenizer.json"
            )
        content = file.read_bytes()
        self._path = file
        self._tokenizer = _load(content, file)
        self._digest = hashlib.sha256(content).hexdigest()[:16]
        # A tokenizer.json often carries the truncation of its last use, which would cut every document without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._added: dict[int, str] = {i: t.content for i, t in self._tokenizer.get_added_tokens_decoder().items()}
        # Ids can have holes, so the number of tokens is not enough to size an embedding.
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self._eod_id = self._find_eod(eod_token)

    @property
    def eod_id(self) -> int:
        """Return the id that ends a document; raise ValueError, with the candidates, if none was found."""
        if self._eod_id is None:
            candidates = ", ".join(repr(token) for token in self._added.values()) or "none"
            raise ValueError(
                f"found no end-of-document token in {self._path}; set data.eod_token to one of its added tokens "
                f"({candidates}) or to another token of its vocabulary, or set data.append_eod=false"
            )
        return self._eod_id

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the ids of a text as `token_dtype(vocab_size)` [n]; no begin or end token is added."""
        return self._array(self._tokenizer.encode(_text(text), add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """Encode many texts at once, on the threads of the `tokenizers` package."""
        batch = self._tokenizer.encode_batch_fast([_text(text) for text in texts], add_special_tokens=False)
        return [self._array(encoding.ids) for encoding in batch]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text; special tokens are left out."""
        return str(self._tokenizer.decode(_checked_ids(ids, self.vocab_size).tolist(), skip_special_tokens=True))

    def fingerprint(self) -> str:
        """Return a digest of the file's bytes."""
        return self._digest

    def _array(self, ids: list[int]) -> np.ndarray:
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def _find_eod(self, eod_token: str | None) -> int | None:
        if eod_token is None:
            by_name = {name: i for i, name in self._added.items()}
            return next((by_name[name] for name in EOD_NAMES if name in by_name), None)
        found: int | None = self._tokenizer.token_to_id(eod_token)
        if found is None:
            candidates = ", ".join(repr(token) for token in self._added.values()) or "none"
            raise ValueError(
                f"data.eod_token={eod_token!r} is not in the vocabulary of {self._path}; its added tokens: {candidates}"
            )
        return found


def build_tokenizer(name: str, *, eod_token: str | None = None) -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` names: "byte", or the path of a tokenizer.json."""
    if name == "byte":
        return ByteTokenizer()
    return HuggingFaceTokenizer(name, eod_token=eod_token)


def _load(content: bytes, file: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            f'data.tokenizer={str(file)!r} needs the package tokenizers: pip install "longctx[tokenizers]", '
            "or set data.tokenizer=byte"
        ) from error
    try:
        return tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    # The package raises bare Exception for everything that it cannot parse.
    except Exception as error:
        raise ValueError(
            f"data.tokenizer: {file} is not a tokenizer.json that `tokenizers` can read: {error}"
        ) from error


def _text(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode("utf-8")


def _checked_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    values = np.asarray(ids, dtype=np.int64).reshape(-1)
    outside = values[(values < 0) | (values >= vocab_size)]
    if outside.size:
        raise ValueError(f"cannot decode token id {outside[0]}: the vocabulary is 0..{vocab_size - 1}")
    return values

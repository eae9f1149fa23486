"""Options of the corpus, its tokenizer and the packed stream."""

from dataclasses import dataclass

SOURCES = ("stdlib", "folder", "txt", "jsonl", "bin")

# Which of the optional keys a source reads. A key set for a source that does not read it is an error, not a no-op.
_READS: dict[str, frozenset[str]] = {
    "stdlib": frozenset(),
    "folder": frozenset({"path", "glob"}),
    "txt": frozenset({"path", "glob", "separator"}),
    "jsonl": frozenset({"path", "glob", "text_key"}),
    "bin": frozenset({"path"}),
}
_MEANING = {
    "path": "the file or folder to read",
    "glob": "which files of a folder to read",
    "separator": "the line between two documents of a .txt file",
    "text_key": "the key of a .jsonl line that holds the text",
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Choose a corpus, a tokenizer and how the tokens are packed into samples.

    source: "stdlib" (the source tree of Python's own standard library), "folder" (one document per file), "txt" (plain
        text, documents between separator lines), "jsonl" (one document per line) or "bin" (an existing Megatron
        .bin/.idx pair).
    path: file or folder to read; for "bin" the common prefix of the two files. Not used by "stdlib".
    glob: which files below a folder are read; `*` stops at `/`, `**/` crosses folders, a pattern without `/` is matched
        against the file name at any depth. Default: every file (folder), `*.txt` (txt), `*.jsonl` (jsonl).
    text_key: key of the text in each .jsonl object.
    separator: a line of a .txt file that equals it (blanks around it aside) ends a document; "" means a blank line;
        without one, a file is one document.
    tokenizer: "byte" (256 byte values and an end-of-document id) or the path of a Hugging Face tokenizer.json.
    eod_token: the end-of-document token of a tokenizer.json, when it is not one of the usual names.
    append_eod: end every document with the end-of-document token. "bin" needs False: its tokens are already written.
    cache_dir: folder of the prepared token stores, relative to the working directory.
    seq_len: tokens per sample.
    seed: seed of the held-out split and of the document order.
    held_out: fraction of the documents kept for evaluation, in [0, 1).
    """

    source: str = "stdlib"
    path: str | None = None
    glob: str | None = None
    text_key: str | None = None
    separator: str | None = None
    tokenizer: str = "byte"
    eod_token: str | None = None
    append_eod: bool = True
    cache_dir: str = "corpus"
    seq_len: int = 8192
    seed: int = 1234
    held_out: float = 0.05

    def validate(self) -> None:
        """Refuse options that contradict each other; raise ValueError with the key to change. Touches no file."""
        if self.source not in SOURCES:
            raise ValueError(f"data.source={self.source!r} is unknown; choose one of {', '.join(SOURCES)}")
        reads = _READS[self.source]
        for key, meaning in _MEANING.items():
            if getattr(self, key) is not None and key not in reads:
                users = ", ".join(name for name in SOURCES if key in _READS[name])
                raise ValueError(
                    f"data.{key}={getattr(self, key)!r} ({meaning}) is not read by data.source={self.source!r}; "
                    f"set data.{key}=null or data.source to one of: {users}"
                )
        if "path" in reads and not self.path:
            raise ValueError(f"data.source={self.source!r} needs data.path, but it is {self.path!r}")
        if self.glob == "":
            raise ValueError("data.glob is empty; set a pattern such as '*.txt', or null for the source's default")
        if self.source == "jsonl" and not self.text_key:
            raise ValueError(f"data.source='jsonl' needs data.text_key (usually 'text'), but it is {self.text_key!r}")
        if self.separator is not None and self.separator != self.separator.strip():
            raise ValueError(f"data.separator={self.separator!r} must have no blanks or line ends around it")
        self._validate_tokens()

    def _validate_tokens(self) -> None:
        if not self.tokenizer:
            raise ValueError("data.tokenizer is empty; set it to 'byte' or to the path of a tokenizer.json")
        if self.tokenizer == "byte" and self.eod_token is not None:
            raise ValueError(
                f"data.eod_token={self.eod_token!r} names a token of a tokenizer.json, but data.tokenizer='byte' has "
                "its own end-of-document id (256); set data.eod_token=null"
            )
        if self.source == "bin" and self.append_eod:
            raise ValueError(
                "data.append_eod=true cannot change the tokens of data.source='bin'; set data.append_eod=false"
            )
        if not self.cache_dir:
            raise ValueError("data.cache_dir is empty; set it to a folder for the prepared tokens, such as 'corpus'")
        if self.seq_len < 1:
            raise ValueError(f"data.seq_len={self.seq_len} must be at least 1 token")
        if self.seed < 0:
            raise ValueError(f"data.seed={self.seed} must not be negative")
        if not 0.0 <= self.held_out < 1.0:
            raise ValueError(f"data.held_out={self.held_out} is a fraction of the documents and must be in [0, 1)")

"""Make the token store of a corpus, once: a folder in the cache whose name changes with whatever changes the tokens."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from longctx.data.config import DataConfig
from longctx.data.documents import CorpusFile, Document, Skipped, find_files, iterate_documents
from longctx.data.indexed import IndexedWriter, TokenStore, token_dtype
from longctx.data.tokenizer import Tokenizer, build_tokenizer

_FORMAT = 1  # raise when the same corpus and tokenizer would give other files
_BATCH_BYTES, _BATCH_DOCUMENTS = 4 << 20, 256  # text held and tokenized at a time
_PROGRESS_AFTER = 2.0  # seconds
_ABANDONED_AFTER = 3600.0  # seconds without a write after which an unfinished folder belongs to no live process
_PROBE_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PreparedStore:
    """Say where a token store is.

    prefix: path of the `.bin` / `.idx` pair without the suffix. metadata: the JSON file beside it, or None for
    `data.source=bin`. fingerprint: 16 hex digits that depend on the tokens alone, the same on every machine.
    """

    prefix: Path
    metadata: Path | None
    fingerprint: str


def prepare(config: DataConfig, *, report: Callable[[str], None]) -> PreparedStore:
    """Return the token store of a corpus; make it first, unless a finished one is in `data.cache_dir`.

    Meant for one rank; the others wait for it and then call it too, or open the prefix. Two processes at once are safe:
    the store is written under a temporary name and renamed when it is complete, and whoever comes second uses the
    first's. `report` gets one line on what was done. Raises ValueError, with the key to change, for a missing path, a
    corpus without documents or tokens, a bad tokenizer, or a damaged store.
    """
    config.validate()
    tokenizer = build_tokenizer(config.tokenizer, eod_token=config.eod_token)
    if config.source == "bin":
        return _existing_pair(config, tokenizer, report)
    if config.append_eod:
        _ = tokenizer.eod_id  # before any work, an error if there is none

    skipped = Skipped()
    files = find_files(config, skipped)
    if not files:
        raise ValueError(f"{_place(config)} holds no file to read{_aside(skipped)}; {_remedy(config)}")
    folder = Path(config.cache_dir) / f"{config.source}-{_fingerprint(config, files, tokenizer)}"
    prefix, metadata = folder / "tokens", folder / "metadata.json"
    if folder.is_dir():
        store = _open_cached(folder)
        report(f"data: using {folder} ({store.num_documents} documents, {store.num_tokens} tokens)")
        return PreparedStore(prefix=prefix, metadata=metadata, fingerprint=store.fingerprint())

    started = time.monotonic()
    _remove_abandoned(folder, report)
    with _published(folder) as temporary:
        details = _write(config, files, tokenizer, skipped, temporary)
    store = _open_cached(folder)
    seconds = time.monotonic() - started
    report(
        f"data: made {folder} in {seconds:.1f} s ({store.num_documents} documents, {details['text_bytes']} bytes, "
        f"{store.num_tokens} tokens)"
    )
    if skipped.counts:
        report(f"data: left out {skipped.summary()}")
    return PreparedStore(prefix=prefix, metadata=metadata, fingerprint=store.fingerprint())


def _existing_pair(config: DataConfig, tokenizer: Tokenizer, report: Callable[[str], None]) -> PreparedStore:
    assert config.path is not None
    prefix = Path(config.path).expanduser()
    if prefix.suffix in (".bin", ".idx") and prefix.is_file():
        raise ValueError(
            f"data.path={config.path!r} is one of the two files; give their common prefix, without {prefix.suffix}"
        )
    try:
        store = TokenStore(prefix)
    except ValueError as error:
        raise ValueError(f"data.path={config.path!r}: {error}") from error
    if store.num_tokens == 0:
        raise ValueError(f"data.path={config.path!r} holds no tokens; point it at another .bin/.idx pair")
    if store.dtype.kind not in "iu":
        raise ValueError(f"data.path={config.path!r} holds {store.dtype.name} values; token ids must be integers")
    probe = store.read(0, min(store.num_tokens, _PROBE_TOKENS))
    low, high = int(probe.min()), int(probe.max())
    if low < 0 or high >= tokenizer.vocab_size:
        raise ValueError(
            f"data.path={config.path!r} holds token ids {low}..{high}, but data.tokenizer={config.tokenizer!r} has ids "
            f"0..{tokenizer.vocab_size - 1}; set data.tokenizer to the one that the file was made with"
        )
    report(f"data: using {prefix} ({store.num_documents} documents, {store.num_tokens} tokens)")
    return PreparedStore(prefix=prefix, metadata=None, fingerprint=store.fingerprint())


def _fingerprint(config: DataConfig, files: list[CorpusFile], tokenizer: Tokenizer) -> str:
    """Return 16 hex digits over all that decides the tokens. Reads no text: files count by name, size and time."""
    digest = hashlib.sha256()
    eod = tokenizer.eod_id if config.append_eod else None
    options = [_FORMAT, config.source, config.text_key, config.separator, tokenizer.fingerprint(), eod]
    digest.update(json.dumps(options).encode())
    for file in files:
        digest.update(json.dumps([file.name, file.size, file.mtime_ns]).encode())
    return digest.hexdigest()[:16]


def _write(
    config: DataConfig, files: list[CorpusFile], tokenizer: Tokenizer, skipped: Skipped, folder: Path
) -> dict[str, Any]:
    """Write store and metadata into a folder; return the metadata."""
    text_digest, text_bytes = hashlib.sha256(), 0
    eod = np.array([tokenizer.eod_id] if config.append_eod else [], dtype=token_dtype(tokenizer.vocab_size))
    prefix = folder / "tokens"
    with (
        IndexedWriter(prefix, dtype=token_dtype(tokenizer.vocab_size)) as writer,
        # disable=None: no bar unless standard error is a terminal.
        tqdm(total=None, unit="B", unit_scale=True, desc="tokenize", delay=_PROGRESS_AFTER, disable=None) as bar,
    ):
        bar.total = sum(file.size for file in files)
        for batch in _batches(iterate_documents(config, files, skipped)):
            for document, ids in zip(batch, tokenizer.encode_batch([d.data for d in batch]), strict=True):
                writer.add_document(np.concatenate((ids, eod)))
                # The length goes in too, so that moving a document bound changes the digest.
                text_digest.update(len(document.data).to_bytes(8, "little") + document.data)
                text_bytes += len(document.data)
            bar.update(sum(len(document.data) for document in batch))
        if writer.num_documents == 0:
            raise ValueError(f"{_place(config)} holds no documents{_aside(skipped)}; {_remedy(config)}")
        if writer.num_tokens == 0:
            raise ValueError(
                f"{_place(config)} gives no tokens with data.tokenizer={config.tokenizer!r}; {_remedy(config)}"
            )
    details = {
        "format": _FORMAT,
        "source": config.source,
        "path": config.path,
        "python": platform.python_version() if config.source == "stdlib" else None,
        "files": len(files),
        "documents": writer.num_documents,
        "text_bytes": text_bytes,
        "text_sha256": text_digest.hexdigest(),
        "tokens": writer.num_tokens,
        "bin_sha256": writer.bin_sha256(),
        "tokenizer": config.tokenizer,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id if config.append_eod else None,
        "skipped": {r: {"count": n, "examples": skipped.examples[r]} for r, n in sorted(skipped.counts.items())},
    }
    with (folder / "metadata.json").open("w", encoding="utf-8") as file:
        json.dump(details, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    return details


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.data)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _open_cached(folder: Path) -> TokenStore:
    """Open a finished store and check it against its metadata."""
    advice = f"delete {folder} to have it made again"
    try:
        store = TokenStore(folder / "tokens")
        details = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        written = (details["documents"], details["tokens"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the prepared tokens are damaged: {error}; {advice}") from error
    if written != (store.num_documents, store.num_tokens):
        raise ValueError(
            f"the prepared tokens are damaged: metadata.json says {written[0]} documents and {written[1]} tokens, "
            f"the store has {store.num_documents} and {store.num_tokens}; {advice}"
        )
    return store


def _temporary_prefix(folder: Path) -> str:
    return f".{folder.name}.unfinished-"


@contextlib.contextmanager
def _published(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`; rename it to `folder` at the end, or remove it after an exception."""
    name = f"{_temporary_prefix(folder)}{socket.gethostname()}-{os.getpid()}"
    temporary = folder.parent / name
    try:
        temporary.mkdir(parents=True)
        yield temporary
        # The only step that others can see. If another process was faster, the folder is not empty and stays as it is.
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    except OSError as error:
        raise ValueError(f"cannot write the tokens to data.cache_dir={folder.parent}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    with contextlib.suppress(OSError):  # not every file system can sync a folder
        handle = os.open(folder.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_abandoned(folder: Path, report: Callable[[str], None]) -> None:
    """Remove what killed processes left of this store. One that is still being written is left alone."""
    if not folder.parent.is_dir():
        return
    for left in folder.parent.glob(f"{_temporary_prefix(folder)}*"):
        with contextlib.suppress(OSError):  # its owner may just be finishing it
            newest = max(entry.stat().st_mtime for entry in (left, *left.iterdir()))
            if time.time() - newest > _ABANDONED_AFTER:
                shutil.rmtree(left)
                report(f"data: removed {left}, which a stopped run had left unfinished")


def _place(config: DataConfig) -> str:
    where = "the standard library" if config.source == "stdlib" else f"data.path={config.path!r}"
    return f"{where} (data.source={config.source!r}" + (f", data.glob={config.glob!r})" if config.glob else ")")


def _aside(skipped: Skipped) -> str:
    return f" (left out: {skipped.summary()})" if skipped.counts else ""


def _remedy(config: DataConfig) -> str:
    return (
        "set data.source to another corpus" if config.source == "stdlib" else "set data.path or data.glob to some text"
    )

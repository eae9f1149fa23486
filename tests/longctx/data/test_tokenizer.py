"""Tokenizers: bytes without any package, and tokenizer.json files."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, build_tokenizer


def save(path: Path, *, special: tuple[str, ...] = ("<|endoftext|>",), truncate: int | None = None) -> Path:
    """Train a small byte-level BPE and save it as a tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    bpe.train_from_iterator(["def hello(self): return self.hello"] * 20, trainer)
    if truncate is not None:
        bpe.enable_truncation(truncate)
        bpe.enable_padding(length=truncate)
    bpe.save(str(path))
    return path


@settings(deadline=None, database=None)
@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == text


def test_byte_tokenizer() -> None:
    tokenizer = build_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (257, 256)
    ids = tokenizer.encode(b"\xc3\xa9\xff")
    assert ids.dtype == np.uint16
    assert ids.tolist() == [0xC3, 0xA9, 0xFF]
    assert tokenizer.decode(ids) == "é\ufffd"
    assert [a.tolist() for a in tokenizer.encode_batch(["a", b"bc", ""])] == [[97], [98, 99], []]
    assert tokenizer.fingerprint() == ByteTokenizer().fingerprint()
    for bad in (257, -1):
        with pytest.raises(ValueError, match=rf"token id {bad}: the vocabulary is 0\.\.256"):
            tokenizer.decode([1, bad])


def test_tokenizer_json_round_trips(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(str(save(tmp_path / "tokenizer.json")))
    text = "def hello(é): 🙂\n"
    ids = tokenizer.encode(text)
    assert ids.ndim == 1
    assert ids.dtype == np.uint16
    assert ids.size < len(text.encode())
    assert tokenizer.decode(np.append(ids, tokenizer.eod_id)) == text
    assert tokenizer.encode(text.encode()).tolist() == ids.tolist()
    assert [a.tolist() for a in tokenizer.encode_batch([text, b"", "hello"])] == [
        ids.tolist(),
        [],
        tokenizer.encode("hello").tolist(),
    ]
    assert ids.max() < tokenizer.vocab_size


def test_folder_with_tokenizer_json(tmp_path: Path) -> None:
    save(tmp_path / "tokenizer.json")
    assert (
        build_tokenizer(str(tmp_path)).fingerprint() == build_tokenizer(str(tmp_path / "tokenizer.json")).fingerprint()
    )


def test_stored_truncation_and_padding_are_switched_off(tmp_path: Path) -> None:
    cut = HuggingFaceTokenizer(save(tmp_path / "cut.json", truncate=4))
    whole = HuggingFaceTokenizer(save(tmp_path / "whole.json"))
    text = "return self " * 50
    assert cut.encode(text).tolist() == whole.encode(text).tolist()
    assert cut.encode("a").size == 1
    assert cut.fingerprint() != whole.fingerprint()


def test_end_of_document_token(tmp_path: Path) -> None:
    both = save(tmp_path / "both.json", special=("<s>", "<|im_end|>", "</s>", "<mine>"))
    assert HuggingFaceTokenizer(both).eod_id == 2
    assert HuggingFaceTokenizer(both, eod_token="<mine>").eod_id == 3
    assert HuggingFaceTokenizer(both, eod_token="<s>").eod_id == 0
    with pytest.raises(ValueError, match=r"data.eod_token='<no>' is not in the vocabulary .*'</s>', '<mine>'"):
        HuggingFaceTokenizer(both, eod_token="<no>")


def test_no_end_of_document_token_lists_candidates(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(save(tmp_path / "t.json", special=("<|im_end|>", "<mine>")))
    assert tokenizer.encode("fine without one").size
    with pytest.raises(ValueError, match=r"set data.eod_token to one of its added tokens \('<\|im_end\|>', '<mine>'\)"):
        _ = tokenizer.eod_id


def test_vocab_size_counts_holes(tmp_path: Path) -> None:
    path = save(tmp_path / "t.json")
    tokenizer = HuggingFaceTokenizer(path)
    content = path.read_text()
    assert f'"id": {tokenizer.eod_id},' in content
    assert tokenizer.vocab_size == 1 + max(tokenizer._tokenizer.get_vocab().values())


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.tokenizer='.*none\.json': .* does not exist; give 'byte'"):
        build_tokenizer(str(tmp_path / "none.json"))
    pytest.importorskip("tokenizers")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer\.json"):
        build_tokenizer(str(tmp_path / "bad.json"))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"binary\.json is not a tokenizer\.json"):
        build_tokenizer(str(tmp_path / "binary.json"))


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r'pip install "longctx\[tokenizers\]"'):
        build_tokenizer(str(tmp_path))

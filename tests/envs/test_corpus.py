"""Corpora: what is read, how it is divided, what is refused."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.tasks import Corpus, load_corpus, standard_library
from envs.tasks import corpus as corpus_module


def part(corpus, split):
    first, end = corpus.bounds(split)
    return corpus.data[first:end].tobytes()


def write_files(folder, n=60):
    """Files whose every line names them."""
    for i in range(n):
        path = folder / f"sub{i % 3}" / f"file{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"<{i}>\n" * 20)


def names_in(part_bytes):
    return set(part_bytes.decode().split())


def test_the_parts_of_the_standard_library_are_different_files(monkeypatch):
    read = []
    original = corpus_module._read
    monkeypatch.setattr(corpus_module, "_read", lambda path: read.append(path) or original(path))
    standard_library.cache_clear()
    corpus = standard_library()
    train, test = part(corpus, "meta_train"), part(corpus, "meta_test")
    assert len(read) == len(set(read)) > 100
    assert len(train) > 1e6 and len(test) > 1e5
    assert len(train) + len(test) == sum(path.stat().st_size for path in read)
    big = [path.read_bytes() for path in read if path.stat().st_size > 2_000]
    for text in big[:: max(1, len(big) // 40)]:  # each whole, and in one part only
        assert (text in train) != (text in test)


def test_the_standard_library_is_the_default():
    assert load_corpus(None).name == "Python standard library"


def test_whole_files_of_a_folder_go_to_one_part_each(tmp_path):
    write_files(tmp_path)
    corpus = load_corpus(tmp_path)
    train, test = names_in(part(corpus, "meta_train")), names_in(part(corpus, "meta_test"))
    assert train and test and not train & test
    assert train | test == {f"<{i}>" for i in range(60)}
    assert part(corpus, "all") == part(corpus, "meta_train") + part(corpus, "meta_test")


def test_adding_files_moves_none_to_the_other_part(tmp_path):
    write_files(tmp_path, 40)
    before = load_corpus(tmp_path)
    write_files(tmp_path, 80)
    after = load_corpus(tmp_path)
    for split in ("meta_train", "meta_test"):
        assert names_in(part(before, split)) <= names_in(part(after, split))


def test_hidden_empty_and_binary_files_are_left_out(tmp_path):
    (tmp_path / "read.txt").write_text("seen " * 100)
    (tmp_path / ".hidden").write_text("hidden " * 100)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("inside " * 100)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "nul.bin").write_bytes(b"a\0b" * 50)
    (tmp_path / "latin1.txt").write_bytes(b"\xe9\xe8 caf\xe9 " * 50)
    assert names_in(part(load_corpus(tmp_path), "all")) == {"seen"}


def test_a_folder_below_a_hidden_one_is_read(tmp_path):
    folder = tmp_path / ".cache" / "data"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("seen " * 100)
    assert names_in(part(load_corpus(folder), "all")) == {"seen"}


def test_a_character_cut_by_the_look_at_a_files_start_is_still_text(tmp_path):
    text = "x" + "é" * 40_000  # a character straddles byte 65536
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    assert part(load_corpus(tmp_path), "all").decode() == text


@settings(max_examples=20, deadline=None, database=None)
@given(content=st.binary(min_size=1, max_size=500))
def test_a_file_of_any_bytes_is_read_whole_and_cut_in_two(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("data") / "any.bin"
    path.write_bytes(content)
    corpus = load_corpus(str(path))
    assert part(corpus, "meta_train") + part(corpus, "meta_test") == content
    assert corpus.n_meta_train == int(0.75 * len(content))


def test_one_big_file_beside_small_ones_still_leaves_a_part_for_each(tmp_path):
    for i in range(6):
        (tmp_path / f"small{i}.txt").write_text("s" * 10)
    (tmp_path / "big.txt").write_text("b" * 10_000)
    corpus = load_corpus(tmp_path)
    sizes = [len(part(corpus, split)) for split in ("meta_train", "meta_test")]
    assert min(sizes) >= 0.05 * sum(sizes)


def test_a_missing_path_is_refused_by_name(tmp_path):
    path = tmp_path / "nowhere.txt"
    with pytest.raises(ValueError, match=r"nowhere\.txt.*does not exist"):
        load_corpus(path)


def test_an_empty_file_is_refused_by_name(tmp_path):
    path = tmp_path / "void.txt"
    path.touch()
    with pytest.raises(ValueError, match=r"void\.txt.*is empty"):
        load_corpus(path)


@pytest.mark.parametrize("content", [None, b"", b"\0\1\2"])
def test_a_folder_without_text_is_refused_by_name(tmp_path, content):
    folder = tmp_path / "pictures"
    folder.mkdir()
    if content is not None:
        (folder / "image.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"pictures.*holds no text"):
        load_corpus(folder)


def test_an_unknown_split_is_refused_with_the_known_ones():
    corpus = Corpus("x", np.zeros(4, dtype=np.uint8), 3)
    with pytest.raises(ValueError, match=r"'train'.*meta_train, meta_test, all"):
        corpus.bounds("train")


def test_a_file_name_may_be_any_bytes_and_what_is_too_long_is_said(tmp_path, monkeypatch, caplog):
    folder = os.fsencode(tmp_path)
    for name in (b"caf\xe9.txt", b"plain.txt"):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(b"seen " * 100)
    assert len(load_corpus(tmp_path).data) == 1000 and not caplog.text
    monkeypatch.setattr(corpus_module, "_MAX_BYTES", 300)
    assert len(load_corpus(tmp_path / "plain.txt").data) == 300
    assert "plain.txt' the first" in caplog.text


def test_of_a_large_folder_a_part_is_used_and_said(tmp_path, monkeypatch, caplog):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text("x" * 1000)
    monkeypatch.setattr(corpus_module, "_MAX_BYTES", 10_000)
    corpus = load_corpus(tmp_path)
    assert 10_000 <= len(corpus.data) <= 11_000
    assert "are used" in caplog.text


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe' is neither a file nor a folder"):
        load_corpus(tmp_path / "pipe")

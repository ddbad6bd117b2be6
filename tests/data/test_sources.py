"""Raw documents: the same whatever they are stored as and however a file is divided; what is bad is named."""

import gzip
import itertools
import json
import os
import re
import sys
from pathlib import Path

import pytest
from support.refusals import one_line

from cepe_jax.data.sources import Extent, RawDocument, plan, read

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXTS = ["one\ntwo", " é🙂\r\n漢字\u2028 ", "x", "\x00\ttab", "ſ" * 40]
PATTERNS = ("**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst", "**/*.txt", "**/*.txt.gz")
EMPTY = '{"text": " \\n"}'


def lines_of(texts, end="\n") -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + end for text in texts).encode()


def whole(path: Path) -> Extent:
    return Extent(path.name, 0, path.stat().st_size)


def read_all(root: Path, units=None, domain_field: str = "") -> list[RawDocument]:
    units = units or plan(root, PATTERNS, (), 1 << 20, root / "out")
    return [document for unit in units for extent in unit for document in read(root, extent, domain_field)]


def read_content(tmp_path: Path, content: bytes, name: str = "a.jsonl", domain_field: str = "") -> list[RawDocument]:
    (tmp_path / name).write_bytes(content)
    return list(read(tmp_path, whole(tmp_path / name), domain_field))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_lines_are_the_same_whatever_stores_them(tmp_path, name):
    compress = {".gz": gzip.compress, ".zst": zstd.compress}.get(Path(name).suffix, bytes)
    documents = read_content(tmp_path, compress(lines_of(TEXTS)), name)
    starts = [0, *itertools.accumulate(len(lines_of([text])) for text in TEXTS[:-1])]
    assert [document.text for document in documents] == TEXTS
    assert [document.name for document in documents] == [f"{name}:{start}" for start in starts]
    assert {(document.domain, document.fault) for document in documents} == {(tmp_path.name, "")}


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.py"])
def test_other_files_are_one_document(tmp_path, name):
    compress = {".gz": gzip.compress, ".zst": zstd.compress}.get(Path(name).suffix, bytes)
    text = "\n".join(TEXTS)
    assert read_content(tmp_path, compress(text.encode()), name) == [RawDocument(name, tmp_path.name, text)]


def test_a_compressed_file_of_several_members_is_read_to_its_end(tmp_path):
    for name, compress in (("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd.compress)):
        documents = read_content(tmp_path, compress(lines_of(TEXTS[:2])) + compress(lines_of(TEXTS[2:])), name)
        assert [document.text for document in documents] == TEXTS


FORMS = {
    "plain": lines_of(TEXTS),
    "windows": lines_of(TEXTS, "\r\n"),
    "blank lines": b"\n \n" + lines_of(TEXTS[:2], "\n\n\r\n") + lines_of(TEXTS[2:]) + b"\t\n\n",
    "no last newline": lines_of(TEXTS)[:-1],
    "byte order mark": b"\xef\xbb\xbf" + lines_of(TEXTS),
    "bad lines": b"[]\n" + lines_of(TEXTS[:3]) + b"{\n\xff\n" + lines_of(TEXTS[3:]) + b"no",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_boundary_gives_every_document_once(tmp_path, form):
    """All unit sizes from one byte to the file's: the documents, their names and faults are those of the whole file."""
    content = FORMS[form]
    expected = read_content(tmp_path, content)
    assert [document.text for document in expected if not document.fault] == TEXTS
    assert len({document.name for document in expected}) == len(expected)
    for unit_bytes in range(1, len(content) + 1):
        units = plan(tmp_path, PATTERNS, (), unit_bytes, tmp_path / "out")
        extents = [extent for unit in units for extent in unit]
        assert [extent.start for extent in extents] == list(range(0, len(content), unit_bytes))
        assert [extent.end for extent in extents[:-1]] == [extent.start for extent in extents[1:]]
        assert extents[-1].end == len(content)
        assert read_all(tmp_path, units) == expected


def test_the_plan(tmp_path):
    """Files in the order of their names, small ones together; only what is no compressed file is divided."""
    sizes = {"a/1.txt": 30, "a/2.txt": 30, "a/3.txt": 50, "b/1.jsonl": 250, "b/2.jsonl.gz": 250, "c.txt": 60}
    sizes |= {"d.jsonl": 100, "e.txt": 300, "f.txt": 1}
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    planned = [[(e.path, e.start, e.end) for e in unit] for unit in plan(tmp_path, PATTERNS, (), 100, tmp_path / "o")]
    assert planned == [
        [("a/1.txt", 0, 30), ("a/2.txt", 0, 30)],
        [("a/3.txt", 0, 50)],
        [("b/1.jsonl", 0, 100)],
        [("b/1.jsonl", 100, 200)],
        [("b/1.jsonl", 200, 250)],
        [("b/2.jsonl.gz", 0, 250)],
        [("c.txt", 0, 60)],
        [("d.jsonl", 0, 100)],
        [("e.txt", 0, 300)],
        [("f.txt", 0, 1)],
    ]
    for name, size in sizes.items():  # names and sizes alone: other content, other times, another root
        copy = tmp_path / "copy" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"y" * size)
        os.utime(copy, (1, 1))
    again = plan(tmp_path / "copy", PATTERNS[::-1], (), 100, tmp_path / "o")
    assert [[(e.path, e.start, e.end) for e in unit] for unit in again] == planned


def test_what_the_plan_leaves_out(tmp_path):
    for name in ("a/1.txt", "a/b/2.txt", "b/3.txt", "out/4.txt", "outer/5.txt", "a/out/6.txt", "7.md", "b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.txt").mkdir()

    def found(patterns=("**/*.txt",), exclude=(), out=tmp_path / "out"):
        return [extent.path for unit in plan(tmp_path, patterns, exclude, 100, out) for extent in unit]

    everything = {"a/1.txt", "a/b/2.txt", "b/3.txt", "out/4.txt", "outer/5.txt", "a/out/6.txt", "b.txt"}
    assert set(found()) == everything - {"out/4.txt"}
    assert set(found(out=tmp_path.parent)) == everything
    assert set(found(exclude=("b",))) == everything - {"out/4.txt", "a/b/2.txt", "b/3.txt"}
    assert found(("*.txt", "*.md", "b.*")) == ["7.md", "b.txt"]


def test_a_plan_that_begins_with_an_empty_file(tmp_path):
    (tmp_path / "0.jsonl").touch()
    (tmp_path / "1.jsonl").write_bytes(lines_of(TEXTS))
    assert [document.text for document in read_all(tmp_path)] == TEXTS


def test_no_plan(tmp_path):
    for pattern, said in (
        ("*.rst", r"\*.rst: .*patterns"),
        ("/a/*", "pattern /a/.: give patterns"),
    ):
        with pytest.raises(ValueError, match=said):
            plan(tmp_path, (pattern,), (), 100, tmp_path / "out")
    (tmp_path / "file").touch()
    for root in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(FileNotFoundError, match=f"{root}: no .*directory"):
            plan(root, PATTERNS, (), 100, tmp_path / "out")


@pytest.mark.parametrize("name", [b"a\nb.txt", b"a\xff.txt"])
def test_names_that_no_record_holds(tmp_path, name):
    with open(os.fsencode(tmp_path) + b"/" + name, "wb"):
        pass
    with pytest.raises(ValueError, match="UTF-8.*rename") as error:
        plan(tmp_path, PATTERNS, (), 100, tmp_path / "out")
    assert one_line(error).isascii()


BAD = {
    "{": "property name",
    '{"text": "a"} x': "Extra data",
    '{"txt": "a"}': "no text",
    '{"text": 3}': "no text",
    '{"text": null}': "no text",
    '["text"]': "no text",
    '"text"': "no text",
    '{"text": "\\ud83d"}': "surrogate",
    EMPTY: "empty",
    "[" * 100_000: "recursion",
    "9" * 5000: "digits",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:12])
@pytest.mark.parametrize("unit_bytes", [1 << 20, 40])
def test_bad_lines_are_named(tmp_path, line, unit_bytes):
    """By the line's number in the file, in whichever extent it begins, and the others are read."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(["a", "b" * 60]) + b"\r\n" + f"{line}\n".encode() + lines_of(["c"]))
    documents = read_all(tmp_path, plan(tmp_path, PATTERNS, (), unit_bytes, tmp_path / "out"))
    assert [document.text for document in documents if not document.fault] == ["a", "b" * 60, "c"]
    (bad,) = [document for document in documents if document.fault]
    assert bad.fault.startswith(f"{path}:4: ")
    assert BAD[line] in bad.fault
    assert "\n" not in bad.fault
    assert (bad.text is None) == (line != EMPTY)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd.compress])
def test_a_line_that_is_not_utf_8(tmp_path, pack):
    name = {bytes: "a.jsonl", gzip.compress: "a.jsonl.gz", zstd.compress: "a.jsonl.zst"}[pack]
    documents = read_content(tmp_path, pack(lines_of(["a"]) + b'{"text": "\xff"}\n'), name)
    whole, bad = (document.fault for document in documents)
    assert whole == ""
    assert re.match(rf"{tmp_path / name}:2: not UTF-8 .* 10\b", bad)


def test_lines_are_counted_once(tmp_path, monkeypatch):
    """Not for each bad line: a file of a terabyte with a thousand of them would be read a thousand times."""
    from cepe_jax.data import sources

    calls, count = [], sources._count_lines
    monkeypatch.setattr(sources, "_count_lines", lambda *args: calls.append(args) or count(*args))
    (tmp_path / "a.jsonl").write_bytes(lines_of(["a"] * 3) + b"{\n" * 50)
    documents = list(read(tmp_path, Extent("a.jsonl", 20, 142), ""))
    path = tmp_path / "a.jsonl"
    assert [document.fault.split(" ")[0] for document in documents[1:]] == [f"{path}:{n}:" for n in range(4, 54)]
    assert documents[0].fault == ""
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("content", "text", "said"),
    [
        (b"", "", "empty"),
        (b" \n\t\r\n", " \n\t\r\n", "empty"),
        (b"\xef\xbb\xbf", "", "empty"),
        (b"abc\xff", None, "not UTF-8 at byte 3"),
        (b"\xef\xbb\xbfabc\xff", None, "not UTF-8 at byte 6"),
    ],
)
def test_bad_files(tmp_path, content, text, said):
    (document,) = read_content(tmp_path, content, "a.txt")
    assert document == RawDocument("a.txt", tmp_path.name, text, document.fault)
    assert re.match(rf"{tmp_path / 'a.txt'}: .*{said}\b", document.fault)


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert [d.text for d in read_content(tmp_path, b"\xef\xbb\xbfabc\xef\xbb\xbf", "a.txt")] == ["abc\ufeff"]
    assert [d.text for d in read_content(tmp_path, b"\xef\xbb\xbf" + lines_of(["abc", "\ufeff"]))] == ["abc", "\ufeff"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
def test_a_compressed_file_that_is_cut_short_or_another_is_refused(tmp_path, name):
    content = lines_of(TEXTS * 3)
    summed = {zstd.CompressionParameter.checksum_flag: 1}  # as the program `zstd` does
    packed = gzip.compress(content) if name.endswith("gz") else zstd.compress(content, options=summed)
    spoilt = [packed[:keep] for keep in range(len(packed))] + [content, packed + b"junk"]
    spoilt.append(packed[:20] + bytes([packed[20] ^ 255]) + packed[21:])
    spoilt.append(packed[:10] + b"\xff" * 20)
    for content in spoilt:
        with pytest.raises(ValueError, match=f"{tmp_path / name}: damaged or ") as error:
            read_content(tmp_path, content, name)
        one_line(error)


def test_the_domain_is_a_field(tmp_path):
    lines = [{"text": "a", "meta": {"source": "web"}}, {"meta": {"source": "bücher"}, "text": "b"}]
    bad = [{"text": "c"}, {"text": "c", "meta": "web"}, {"text": "c", "meta": {"source": 3}}]
    bad += [{"text": "c", "meta": {"source": ""}}, {"text": "c", "meta.source": "x"}]
    content = "".join(json.dumps(line) + "\n" for line in [*lines, *bad]).encode()
    documents = read_content(tmp_path, content, domain_field="meta.source")
    assert [(document.domain, document.text) for document in documents[:2]] == [("web", "a"), ("bücher", "b")]
    assert [document.fault.split(",")[0] for document in documents[2:]] == [
        f"{tmp_path / 'a.jsonl'}:{number}: no meta.source" for number in range(3, 8)
    ]
    (half,) = read_content(tmp_path, b'{"text": "a", "d": "\\ud83d"}', domain_field="d")
    assert "surrogate" in half.fault


def test_the_domain_is_the_first_folder(tmp_path):
    for name in ("a/b/1.txt", "a/2.jsonl", "c/3.txt", "4.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines_of(["x"]))
    domains = {document.name: document.domain for document in read_all(tmp_path)}
    assert domains == {"4.txt": tmp_path.name, "a/b/1.txt": "a", "a/2.jsonl:0": "a", "c/3.txt": "c"}

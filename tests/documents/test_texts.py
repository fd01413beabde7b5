"""text_files.py, texts.py, json_rows.py: files as people have them, and what is wrong with them in one line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuselm.documents import text_files, text_streams
from fuselm.documents.text_files import PLAIN, check_file, find_files, name_domains
from fuselm.documents.texts import LONGEST_DOMAIN, TextRow, read_texts

ROWS = [
    {"text": 'one, "two"\nand\tthree', "domain": "prose", "split": "dev"},
    {"text": "čtyři 🙂 \u2028 \x85 five"},
    {"text": "six\r\nseven", "domain": "a/b |c*"},
]
EXPECTED = [TextRow(domain=row.get("domain", "rows"), text=row["text"], split=row.get("split")) for row in ROWS]


def lines_of(rows: list, *, ascii_only: bool = False) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode()


def table_of(rows: list[dict], delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["domain", "text", "split"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def parquet_of(rows: list[dict], **types: pyarrow.DataType) -> bytes:
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist([{"domain": None, "split": None, "n": 1} | row for row in rows])
    for name, kind in types.items():
        table = table.set_column(table.schema.names.index(name), name, table[name].cast(kind))
    pq.write_table(table, file)
    return file.getvalue()


def zstd_of(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def put(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def problem(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def problem_of(file: Path) -> str:
    found = problem(lambda: list(read_texts(file)))
    assert found.startswith(f"{file}:")
    return found.removeprefix(f"{file}:").strip()


# ---- each kind of file


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl", lines_of(ROWS)),
        ("rows.JSONL", lines_of(ROWS)),
        ("rows.Json", lines_of(ROWS)),
        ("rows.jsonlines", lines_of(ROWS, ascii_only=True)),
        ("rows.ndjson", lines_of(ROWS)),
        ("rows.json", json.dumps(ROWS).encode()),
        ("rows.json", json.dumps(ROWS, indent=2).encode()),
        ("rows.jsonl", b"\n  " + json.dumps(ROWS, indent=1).encode() + b"\n\n"),
        ("rows.jsonl", b"\xef\xbb\xbf" + lines_of(ROWS)),
        ("rows.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        ("rows.jsonl", lines_of(ROWS[:1]) + b"\xef\xbb\xbf" + lines_of(ROWS[1:])),
        ("rows.jsonl", lines_of(ROWS).replace(b"\n", b"\r\n")),
        ("rows.jsonl", lines_of(ROWS).replace(b"\n", b"\r")),
        ("rows.jsonl", b"\n" + lines_of(ROWS).rstrip() + b"\n \n"),
        ("rows.jsonl", lines_of([row | {"domain": row.get("domain"), "split": row.get("split")} for row in ROWS])),
        ("rows.jsonl.gz", gzip.compress(lines_of(ROWS))),
        ("rows.JSONL.GZ", gzip.compress(lines_of(ROWS[:2])) + gzip.compress(lines_of(ROWS[2:]))),
        ("rows.jsonl.bz2", bz2.compress(lines_of(ROWS))),
        ("rows.json.xz", lzma.compress(json.dumps(ROWS).encode())),
        ("rows.jsonl.zst", zstd_of(lines_of(ROWS))),
        ("rows.csv", table_of(ROWS)),
        ("rows.CSV", b"\xef\xbb\xbf" + table_of(ROWS)),
        ("rows.csv.gz", gzip.compress(table_of(ROWS))),
        ("rows.tsv", table_of(ROWS, "\t")),
        ("rows.parquet", parquet_of(ROWS)),
        ("rows.pq", parquet_of(ROWS, text=pyarrow.large_string(), domain=pyarrow.dictionary(pyarrow.int8(), "string"))),
    ],
)
def test_rows_are_the_same_in_every_kind_of_file(tmp_path, name, data):
    assert list(read_texts(put(tmp_path, name, data))) == EXPECTED


@pytest.mark.parametrize("ending", [*PLAIN, ".TXT", ".Md"])
def test_a_plain_file_is_one_document_byte_for_byte(tmp_path, ending):
    file = put(tmp_path, f"prose{ending}", "é\r\n\r\n\ufeffb\x0c\n")
    assert list(read_texts(file)) == [TextRow(domain="prose", text="é\r\n\r\n\ufeffb\x0c\n")]
    packed = put(tmp_path, f"prose{ending}.gz", gzip.compress(file.read_bytes()))
    assert list(read_texts(packed)) == list(read_texts(file))
    assert list(read_texts(file, "told")) == [TextRow(domain="told", text="é\r\n\r\n\ufeffb\x0c\n")]


@pytest.mark.parametrize(
    "name",
    [
        "a.pdf",
        "a.docx",
        "a.html",
        "a.py",
        "a.xlsx",
        "a.arrow.gz",
        "a.gz",
        "a.zip",
        "a.tar.gz",
        "a.parquet.gz",
        "a",
        ".x",
    ],
)
def test_another_kind_of_file_is_refused_by_name(tmp_path, name):
    file = put(tmp_path, name, "text that is no document\n")
    for call in (lambda: find_files([file]), lambda: list(read_texts(file))):
        assert problem(call).startswith(f"{file}: ")


def test_objects_on_one_line_and_over_several(tmp_path):
    one = put(tmp_path, "a.json", json.dumps({"text": "x"}, indent=2))
    assert list(read_texts(one)) == [TextRow(domain="a", text="x")]
    assert list(read_texts(put(tmp_path, "b.json", "[]"))) == list(read_texts(put(tmp_path, "c.jsonl", ""))) == []
    assert problem_of(put(tmp_path, "d.jsonl", json.dumps({"text": "x"}, indent=2))).startswith("1: not JSON (")
    assert problem_of(put(tmp_path, "e.json", json.dumps({"data": ROWS}, indent=2))).startswith(
        "1: no 'text' string (found 'data')"
    )


@given(st.lists(st.tuples(st.text(max_size=7), st.sampled_from(["en", "de", None])), max_size=7), st.integers(0, 3))
def test_lists_are_read_as_lines_are(tmp_path_factory, rows, indent):
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"text": text, "domain": domain} for text, domain in rows]
    lines = put(folder, "rows.jsonl", lines_of(rows, ascii_only=True))
    for number in range(3):
        laid_out = json.dumps(rows, indent=indent, ensure_ascii=number == 0)
        if number == 2:
            laid_out = f"[{' , '.join(json.dumps(row) for row in rows)} ]\r\n"
        assert list(read_texts(put(folder, "list/rows.json", laid_out))) == list(read_texts(lines))


# ---- what rows say


@pytest.mark.parametrize(("said", "domain"), [(7, "7"), (1.5, "1.5"), (None, "a"), (" x ", " x "), ("ü|/*", "ü|/*")])
def test_a_domain_may_be_a_number_or_null(tmp_path, said, domain):
    file = put(tmp_path, "a.jsonl", lines_of([{"text": "x", "domain": said}]))
    assert list(read_texts(file)) == [TextRow(domain=domain, text="x")]


BAD_ROWS = [
    ({"domain": ["a"]}, "'domain' is ['a']; it needs to be a name, or left out"),
    ({"domain": {}}, "'domain' is {}; it needs to be a name, or left out"),
    ({"domain": ""}, "'domain' is empty; name it, or leave it out to have the file's name"),
    ({"domain": " \u2003"}, "'domain' is empty; name it, or leave it out to have the file's name"),
    ({"domain": "a\nb"}, "'domain' is 'a\\nb', with a control character; a name needs to be one line of text"),
    ({"domain": "\x1b[31m"}, "'domain' is '\\x1b[31m', with a control character; a name needs to be one line of text"),
    ({"domain": "\u2028"}, "'domain' is empty; name it, or leave it out to have the file's name"),
    ({"domain": "a\u2029"}, "'domain' is 'a\\u2029', with a control character; a name needs to be one line of text"),
    ({"domain": "\ud800x"}, "'domain' has half of a surrogate pair, which is no text; fix or drop it"),
    ({"domain": "x" * 1000}, f"'domain' is '{'x' * 56}..., 1000 characters long; a name may have {LONGEST_DOMAIN}"),
    ({"text": "half \ud83d"}, "'text' has half of a surrogate pair, which is no text; fix or drop it"),
    ({"text": None}, "no 'text' string (found 'text'); each line needs one, and may have a 'domain'"),
    ({"text": 3}, "no 'text' string ('text' is 3); each line needs one, and may have a 'domain'"),
    ({"text": ["a"]}, "no 'text' string ('text' is ['a']); each line needs one, and may have a 'domain'"),
    ({"split": "validation"}, "'split' is 'validation', and needs to be one of train, dev, heldout; rename it to dev"),
    ({"split": "Test"}, "'split' is 'Test', and needs to be one of train, dev, heldout; rename it to heldout"),
    ({"split": "Train"}, "'split' is 'Train', and needs to be one of train, dev, heldout; rename it, or leave it out"),
    ({"split": ["train"]}, "'split' is ['train'], and needs to be one of train, dev, heldout; rename it, or leave it"),
]


@pytest.mark.parametrize(("said", "expected"), BAD_ROWS)
def test_a_wrong_field_is_reported_with_its_line(tmp_path, said, expected):
    rows = [{"text": "fine"}, {"text": "x"} | said]
    assert problem_of(put(tmp_path, "a.jsonl", lines_of(rows, ascii_only=True))).startswith(f"2: {expected}")
    assert problem_of(put(tmp_path, "a.json", json.dumps(rows, indent=1))).startswith(f"5: {expected}")


@pytest.mark.parametrize("row", [{}, [], "a", None, 3, {"txt": "a"}])
def test_a_line_without_text_is_reported_with_its_number(tmp_path, row):
    found = problem_of(put(tmp_path, "a.jsonl", lines_of([{"text": "fine"}, row])))
    assert found.startswith("2: no 'text' string") and "each line needs one, and may have a 'domain'" in found


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"content": "x"}, "(found 'content'); rename 'content' to 'text' if that is the text"),
        ({"prompt": "x"}, "(found 'prompt'); 'prompt' makes a conversation with 'completion', or set corpus.columns."),
        ({"instruction": "x", "input": "y"}, "(found 'instruction', 'input'); 'instruction' makes a conversation with"),
        ({str(n): n for n in range(9)}, "(found '0', '1', '2', '3', '4', '5', '6', …); each line needs one"),
    ],
)
def test_a_missing_text_is_reported_with_the_fields_that_are_there(tmp_path, row, expected):
    assert problem_of(put(tmp_path, "a.jsonl", lines_of([row]))).startswith(f"1: no 'text' string {expected}")


# ---- what is no JSON, no table, no text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ('{"text": "fine"}\n{"text": \n', "2: not JSON ("),
        ('{"text": "a"}{"text": "b"}\n', '1: not JSON (more after the end: \'{"text": "b"}\'); one object a line'),
        ('{"text": "a"} \u2028 {"text": "b"}\n', "1: not JSON (more after the end: '\\u2028 {"),
        ('{"text": "a\x00b"}\n', "1: not JSON ("),
        ('[{"text": "a"},\n{"text": "b"}', "2: not JSON (the list has no end); a list of objects is needed"),
        ('[{"text": "a"}\n{"text": "b"}]', "1: not JSON (no comma between two objects); a list of objects is needed"),
        ('[{"text": "a"},\n\n{"text": b"}]', "3: not JSON ("),
        ('[{"text": "a"}, ]', "1: not JSON (a comma before the end); a list of objects is needed"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "2: not JSON (more after the end: "),
        ('[["a"], {"text": "b"}]', "1: no 'text' string"),
        ("[" * 100_000, "1: nested too deeply; "),
        ('{"text": "a", "b": ' + "[" * 100_000, "1: nested too deeply; "),
        ("text\nthat is no JSON\n", "1: not JSON ("),
    ],
)
def test_broken_json_is_reported_with_its_line(tmp_path, data, expected):
    for name in ("a.jsonl", "a.json"):
        assert problem_of(put(tmp_path, name, data)).startswith(expected)


def test_odd_json_is_read_where_its_text_is_plain(tmp_path):
    lines = '{"text": "a", "score": NaN}\n{"text": "b", "n": 1%s}\n{"text": "c", "text": "d"}\n{"text": "e\\u0000"}\n'
    found = [row.text for row in read_texts(put(tmp_path, "a.jsonl", lines % ("0" * 10_000)))]
    assert found == ["a", "b", "d", "e\0"]


def test_a_long_line_is_read(tmp_path):
    text = "long " * 2_000_000
    assert [row.text for row in read_texts(put(tmp_path, "a.jsonl", lines_of([{"text": text}])))] == [text]
    assert [row.text for row in read_texts(put(tmp_path, "a.csv", table_of([{"text": text}])))] == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_and_32_are_reported(tmp_path, name, encoding):
    file = put(tmp_path, name, '{"text": "ok"}\n'.encode(encoding))
    assert problem_of(file) == "UTF-16 or UTF-32, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8"


def test_text_that_is_not_utf_8_is_reported(tmp_path):
    file = put(tmp_path, "a.jsonl", '{"text": "fine"}\n{"text": "Größe"}'.encode("latin-1"))
    assert problem_of(file) == (
        "2: not UTF-8 (byte 29 is 0xf6); convert it, say from Latin-1: iconv -f LATIN1 -t UTF-8"
    )


def test_binary_in_a_plain_file_is_refused(tmp_path):
    assert problem_of(put(tmp_path, "a.txt", b"begins well\0\1\2")).startswith("has NUL characters, so it is no plain")
    data = random.Random(0).randbytes(1009)
    assert problem_of(put(tmp_path, "b.txt", data)) == "binary, not text; drop it, or name the texts without it"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            "a,b\n1,2\n",
            "no 'text' column (found 'a', 'b'); its first row needs to name the columns, separated by commas",
        ),
        ("text;domain\nx;y\n", "no 'text' column (found 'text;domain'); its first row needs to name the columns"),
        ("", "no 'text' column; its first row needs to name the columns, separated by commas"),
        ("text,domain\nfine,en\nx\n", "row 2: 1 fields, and 2 columns; fix its quotes"),
        ("text,domain\nfine,en\nx,y,z\n", "row 2: 3 fields, and 2 columns; fix its quotes"),
        ('text,domain\nfine,en\n"x,y\n', "row 2: not CSV (unexpected end of data); fix its quotes"),
        ('text,domain\n"x" y,en\n', "row 1: not CSV ("),
        ('text,domain\nx,"a\nb"\n', "row 1: 'domain' is 'a\\nb', with a control character"),
        ("text,split\nx,test\n", "row 1: 'split' is 'test', and needs to be one of train, dev, heldout; rename it to"),
    ],
)
def test_an_error_in_a_table_is_reported_with_its_row(tmp_path, data, expected):
    assert problem_of(put(tmp_path, "a.csv", data)).startswith(expected)


def test_a_table_leaves_the_largest_field_of_others_as_it_is(tmp_path):
    before = csv.field_size_limit()
    list(read_texts(put(tmp_path, "a.csv", table_of(ROWS))))
    assert csv.field_size_limit() == before


def test_an_error_in_parquet_is_reported_with_its_row(tmp_path):
    assert problem_of(put(tmp_path, "a.parquet", b"PAR1 not really PAR1")).startswith("damaged, or no Parquet (")
    data = parquet_of(ROWS)
    assert problem_of(put(tmp_path, "b.parquet", data[: len(data) // 2])).startswith("damaged, or no Parquet (")
    no_text = parquet_of([{"text": "x"}]).replace(b"text", b"txet")
    assert problem_of(put(tmp_path, "c.parquet", no_text)).startswith("no 'text' column (found ")
    null = parquet_of([*ROWS, {"text": None}])
    assert problem_of(put(tmp_path, "d.parquet", null)).startswith("row 4: no 'text' string")
    nested = parquet_of([{"text": ["x"]}])
    assert problem_of(put(tmp_path, "e.parquet", nested)).startswith("row 1: no 'text' string ('text' is ['x'])")


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_damage_in_a_compressed_file_is_reported(tmp_path, ending):
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd_of}[ending]
    data = pack(lines_of(ROWS * 997))
    for damaged in (b"no such thing", data[: len(data) // 2]):
        assert "cannot be decompressed as" in problem_of(put(tmp_path, f"a.jsonl.{ending}", damaged))


# ---- which files


def test_folders_patterns_and_home_stand_for_their_files(tmp_path, monkeypatch):
    names = ["b.txt", "a.jsonl", "deep/er/c.csv", ".hidden.jsonl", ".git/d.jsonl", "README.md", "LICENSE.txt", "e.pdf"]
    for name in names:
        put(tmp_path, f"texts/{name}", "x")
    everything = [tmp_path / "texts" / name for name in ("a.jsonl", "b.txt", "deep/er/c.csv")]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files([tmp_path / "texts"]) == find_files(["~/texts"]) == everything
    assert find_files([f"{tmp_path}/texts/[a-d].[jt]*", "~/texts/**/*.csv"]) == everything
    assert find_files([f"{tmp_path}/*"]) == everything
    assert find_files([tmp_path / "texts" / "README.md"]) == [tmp_path / "texts" / "README.md"]
    assert problem(lambda: find_files([f"{tmp_path}/texts/*"])).startswith(f"{tmp_path}/texts/e.pdf: ")
    assert problem(lambda: find_files([f"{tmp_path}/texts/*.json"])) == f"{tmp_path}/texts/*.json: no file matches"
    put(tmp_path, "odd/[1].txt", "x")
    assert find_files([f"{tmp_path}/odd/[1].txt"]) == [tmp_path / "odd" / "[1].txt"]


def test_a_missing_file_is_reported(tmp_path):
    assert problem(lambda: find_files([tmp_path / "a.jsonl"])) == f"{tmp_path}/a.jsonl: no such file"
    assert problem(lambda: find_files(["/dev/null"])) == "/dev/null: no ordinary file"
    assert problem(lambda: find_files([""])) == "texts: an empty name (got ''); name a file, a folder or a pattern"
    assert problem(lambda: check_file(tmp_path)) == f"{tmp_path}: is a folder; name its files"
    assert problem(lambda: list(read_texts(tmp_path / "a.jsonl"))) == f"{tmp_path}/a.jsonl: no such file"
    put(tmp_path, "only/a.pdf", "x")
    os.mkfifo(tmp_path / "only" / "pipe.txt")
    found = problem(lambda: find_files([tmp_path / "only"]))
    assert found.startswith(f"{tmp_path}/only: no file below this folder is of a kind that is read (")


def test_plain_files_of_one_folder_share_its_name(tmp_path):
    names = ["poems/a.txt", "poems/b.md", "poems/rows.jsonl", "alone/c.txt", "tables/d.jsonl", "tables/e.csv"]
    files = [put(tmp_path, name, "x") for name in names]
    assert name_domains(files, lambda file: {"x"}) == ["poems", "poems", "rows", "c", "d", "e"]
    assert name_domains(files, lambda file: {"a"} if file.suffix == ".csv" else ()) == [
        "a", "poems", "rows", "c", "d", "e",
    ]  # fmt: skip
    assert name_domains(files[:1], lambda file: ()) == ["a"]


def test_plain_files_named_from_within_their_folder_share_its_name(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        put(tmp_path, f"songs/{name}", "x")
    monkeypatch.chdir(tmp_path / "songs")
    assert name_domains([Path("a.txt"), Path("b.txt")], lambda file: ()) == ["songs", "songs"]


def test_files_of_a_remote_file_system_are_found_and_read_as_those_here(tmp_path):
    memory = fsspec.filesystem("memory")
    lines = "".join(json.dumps({"text": f"Text {n}"}) + "\n" for n in range(5)).encode()
    memory.pipe("/texts-of-a-test/a.jsonl", lines)
    memory.pipe("/texts-of-a-test/b/c.jsonl.gz", gzip.compress(lines))
    found = text_files.find_files(["memory://texts-of-a-test"])
    assert list(map(str, found)) == ["memory://texts-of-a-test/a.jsonl", "memory://texts-of-a-test/b/c.jsonl.gz"]
    assert text_files.find_files(["memory://texts-of-a-test/**/*.gz"]) == found[1:]
    for file in found:
        assert [row.text for row in read_texts(file)] == [f"Text {n}" for n in range(5)]
    with pytest.raises(ValueError, match=re.escape("memory://texts-of-a-test/x.jsonl: no such file")):
        text_files.find_files(["memory://texts-of-a-test/x.jsonl"])


def test_a_long_file_is_read_in_blocks_with_the_right_line_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(text_streams, "BLOCK", 7)
    lines = [json.dumps({"text": f"é {n} " * (n % 5)}, ensure_ascii=False) for n in range(41)]
    file = tmp_path / "a.jsonl"
    file.write_text("\n\ufeff" + "\r\n".join(lines), encoding="utf-8")
    found = list(read_texts(file))
    assert [row.text for row in found] == [f"é {n} " * (n % 5) for n in range(41)]
    assert [row.where for row in found] == [f"{file}:{n + 2}" for n in range(41)]
    file.write_bytes(file.read_bytes().replace("é 37".encode(), b"\xe9 37", 1))
    place = file.read_bytes().index(b"\xe9 ")
    with pytest.raises(ValueError, match=re.escape(f"{file}:39: not UTF-8 (byte {place} is 0xe9); convert it")):
        list(read_texts(file))

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
from corpora import write_files
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.data.corpus import Collection, _glob_matches, collect, locate
from btx_megatron.data.docstrings import module_docstrings
from btx_megatron.data.workers import Workers
from btx_megatron.errors import UserError
from btx_megatron.recipe import Data, Source


def read(source: Source, seed: int = 1234, **data: Any) -> Collection:
    with Workers(1) as workers:
        return collect(locate(source, "prose", seed), source, "prose", Data(**data), workers, lambda n: None)


def texts(collection: Collection) -> dict[str, str]:
    return {document.name: document.text for document in collection.documents}


def test_a_folder_gives_one_document_a_file_with_its_bytes_untouched(tmp_path: Path) -> None:
    write_files(tmp_path, {"b/c.txt": "two\r\n\tlines\n", "a.txt": "über", "b/skip.log": "x"})
    found = read(Source(path=str(tmp_path), include=["**/*.txt"]))
    assert texts(found) == {"a.txt": "über", "b/c.txt": "two\r\n\tlines\n"}
    assert {d.name: d.size for d in found.documents} == {"a.txt": 5, "b/c.txt": 12}


def test_a_file_is_one_document(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.txt": "alone", "b.txt": "not me"})
    assert texts(read(Source(path=str(tmp_path / "a.txt")))) == {"a.txt": "alone"}


def test_include_and_exclude(tmp_path: Path) -> None:
    write_files(tmp_path, {name: name for name in ["x.py", "test/y.py", "p/test/z.py", "p/q/w.py", "p/n.md"]})
    source = Source(path=str(tmp_path), include=["**/*.py"], exclude=["**/test/**", "x.*"])
    assert set(texts(read(source))) == {"p/q/w.py"}


def test_order_depends_on_names_and_seed_alone(tmp_path: Path) -> None:
    names = [f"{i}.txt" for i in range(30)]
    first = write_files(tmp_path / "first", {name: name for name in names})
    second = write_files(tmp_path / "second", {name: name * 2 for name in reversed(names)})
    orders = [[d.name for d in locate(Source(path=str(p)), "d", 7)] for p in (first, second)]
    assert orders[0] == orders[1]
    assert orders[0] != sorted(names)
    assert orders[0] != [d.name for d in locate(Source(path=str(first)), "d", 8)]


def test_max_bytes_takes_documents_until_it_is_reached(tmp_path: Path) -> None:
    write_files(tmp_path, {f"{i}.txt": f"{i:02d}" * 50 for i in range(20)})
    whole = read(Source(path=str(tmp_path)))
    part = read(Source(path=str(tmp_path), max_bytes=250))
    assert [d.name for d in part.documents] == [d.name for d in whole.documents[:3]]


def test_duplicates_and_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    write_files(tmp_path, {"a": "same", "b": "same", "c": "other", "d": "", "e": " \n\t"})
    found = read(Source(path=str(tmp_path)))
    assert sorted(texts(found).values()) == ["other", "same"]
    assert (found.duplicates, found.empty, found.skipped) == (1, 2, 0)


def test_not_utf8_stops_and_names_file_and_byte(tmp_path: Path) -> None:
    write_files(tmp_path, {"good.txt": "good", "bad.txt": b"fine until \xff here"})
    with pytest.raises(UserError, match=r"'prose'.*bad\.txt is not UTF-8 text \(byte 11\).*on_bad_document"):
        read(Source(path=str(tmp_path)))


def test_not_utf8_is_skipped_and_counted_if_asked(tmp_path: Path) -> None:
    write_files(tmp_path, {"good.txt": "good", "bad.txt": b"fine until \xff here"})
    found = read(Source(path=str(tmp_path)), on_bad_document="skip")
    assert (texts(found), found.skipped) == ({"good.txt": "good"}, 1)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "path '/no/such/folder': no such file or folder"),
        ("", "path '': no such file or folder"),
        ("package:no_such_package/data", "'no_such_package' is not installed"),
        ("package:../../etc", "'..' is not installed"),
        ("package:heapq", "'heapq' is a single module"),
        ("package:email/no_such", "path 'package:email/no_such': no such file or folder"),
        ("docstrings:no_such_package", "'no_such_package' is not installed"),
    ],
)
def test_a_wrong_path_is_refused(path: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(Source(name="speeches", path=path))
    assert str(caught.value).startswith("data.domains 'prose', source 'speeches': ")


def test_patterns_that_match_nothing_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.txt": "x"})
    with pytest.raises(UserError, match=r"none of the 1 files .* correct include \['\*\.md'\]"):
        read(Source(path=str(tmp_path), include=["*.md"]))


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.txt": "", "b.txt": "\n"})
    with pytest.raises(UserError, match=r"no text in .*2 documents are empty, 0 were skipped"):
        read(Source(path=str(tmp_path)))


def test_a_broken_link_is_an_error_and_a_circle_of_links_is_not(tmp_path: Path) -> None:
    write_files(tmp_path, {"a/x.txt": "x"})
    os.symlink(tmp_path, tmp_path / "a" / "up")
    assert set(texts(read(Source(path=str(tmp_path))))) == {"a/x.txt"}
    os.symlink("nowhere", tmp_path / "lost.txt")
    with pytest.raises(UserError, match=r"lost\.txt: cannot be read"):
        read(Source(path=str(tmp_path)))


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text would be missing without a word. (The superuser may read all folders.)"""
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"closed: cannot be read \(Permission denied\)"):
        read(Source(path=str(tmp_path)))


def test_a_file_that_changes_after_it_was_counted_is_an_error(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.txt": "first"})
    document = read(Source(path=str(tmp_path))).documents[0]
    (tmp_path / "a.txt").write_text("second")
    with pytest.raises(UserError, match="changed while the data was being prepared"):
        _ = document.text


def test_packages_are_found_without_importing_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explosive = '"""Top."""\nraise RuntimeError("imported")\n'
    code = 'class A:\n  "Of A."\n  def f(self):\n    """\n    Of f.\n        >>> 1\n    """\n'
    files: dict[str, str | bytes] = {
        "fragile/__init__.py": explosive,
        "fragile/sub/mod.py": code,
        "fragile/sub/bare.py": "x = 1\n",
        "fragile/notes.txt": "notes",
    }
    monkeypatch.syspath_prepend(str(write_files(tmp_path, files)))
    found = read(Source(path="docstrings:fragile"))
    assert texts(found) == {"fragile": "Top.\n", "fragile.sub.mod": "Of A.\n\nOf f.\n    >>> 1\n"}
    assert found.empty == 1
    assert texts(read(Source(path="package:fragile", include=["*.txt"]))) == {"notes.txt": "notes"}
    assert set(texts(read(Source(path="package:fragile/sub")))) == {"mod.py", "bare.py"}


def test_a_module_that_does_not_parse_is_a_bad_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(
        str(write_files(tmp_path, {"odd/__init__.py": '"""Hi."""', "odd/b.py": "print 1"}))
    )
    with pytest.raises(UserError, match=r"b\.py is not a Python module .*exclude"):
        read(Source(path="docstrings:odd"))
    assert read(Source(path="docstrings:odd"), on_bad_document="skip").skipped == 1


def test_the_standard_library() -> None:
    found = texts(read(Source(path="stdlib:", include=["json/*.py"])))
    assert '"""' in found["json/decoder.py"]


def test_docstrings_stand_in_source_order_wherever_a_definition_may_stand() -> None:
    code = '''"""m"""
if True:
    def a():
        "a"
else:
    async def b():
        "b"
        class C:
            "c"
try:
    pass
except ValueError:
    def d(): "d"
finally:
    def e(): "\\ud800"
match 1:
    case _:
        def f(): "f"
'''
    assert module_docstrings(code.encode()) == "m\n\na\n\nb\n\nc\n\nd\n\n\\ud800\n\nf\n"


names = st.lists(st.sampled_from(["a", "b", "ab", "test"]), min_size=1, max_size=4)


@given(names, st.lists(st.sampled_from(["a", "*", "?", "a*", "**", "test", "[ab]"]), min_size=1, max_size=4))
def test_globs_agree_with_a_regular_expression(parts: list[str], pattern: list[str]) -> None:
    signs = {"*": "[^/]+/", "?": "[^/]/", "a*": "a[^/]*/", "**": "(?:[^/]+/)*"}
    expected = re.fullmatch("".join(signs.get(p, f"{p}/") for p in pattern), "/".join(parts) + "/")
    assert _glob_matches(parts, pattern) == bool(expected)

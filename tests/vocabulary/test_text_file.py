"""Names from a text file."""

import logging
from pathlib import Path
from typing import Any

import fsspec
import pytest

from owlsam_ray.config.run import RunConfig
from owlsam_ray.config.vocabulary import VocabularyConfig
from owlsam_ray.errors import GuardError, InputError
from owlsam_ray.plan.plan import plan_run
from owlsam_ray.run.record import load_record
from owlsam_ray.vocabulary import Vocabulary, resolve_vocabulary
from tests.drawn_images import draw_images

TEXT = """# what lies on the desk
remote\tremote control,  clicker
  Hütte

#mug
red  ball\t
猫
"""


def resolve(path: Path | str, **fields: Any) -> Vocabulary:
    return resolve_vocabulary(
        VocabularyConfig.model_validate({"categories": str(path), "templates": "none"} | fields), []
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_names_and_synonyms(tmp_path: Path, encoding: str, newline: str) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(TEXT.replace("\n", newline).encode(encoding))
    found = resolve(file)
    assert [(each.id, each.name, each.synonyms) for each in found.categories] == [
        (1, "remote", ("remote control", "clicker")),
        (2, "Hütte", ()),
        (3, "red  ball", ()),
        (4, "猫", ()),
    ]
    assert [query.prompts[0] for query in found.queries] == [
        "remote", "remote control", "clicker", "Hütte", "red  ball", "猫",
    ]  # fmt: skip
    assert [each.id for each in resolve(file, only=["red ball", 2]).categories] == [2, 3]


def test_a_file_without_an_ending_and_one_on_a_url(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("cat")
    assert [each.name for each in resolve(tmp_path / "names").categories] == ["cat"]
    with fsspec.open("memory://vocabulary/names.list", "wb") as file:
        file.write(b"cat\ndog")
    assert [each.name for each in resolve("memory://vocabulary/names.list").categories] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no name: write one name per line"),
        (b"# cat\n\n", "holds no name"),
        (b"cat\n\n# x\nCat \n", "line 4 repeats the name 'Cat' of line 1"),
        (b"cat\nH\xfctte\n", "line 2 is not UTF-8: b'H\\xfctte'"),
        (b"c\x00a\x00t\x00", "line 1 holds control characters"),
        (
            b"cat\n\tkitty\n",
            "line 2 is '\\tkitty': a line must be a name, or a name, one tab and comma-separated synonyms",
        ),
        (b"cat\tkitty\tpuss\n", "line 1 is 'cat\\tkitty\\tpuss'"),
        (b"cat\tkitty,,puss\n", "line 1 ('cat') has an empty synonym: 'kitty,,puss'"),
    ],
)
def test_what_is_wrong_is_told_by_line(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        resolve(file)
    assert str(file) in str(caught.value)
    assert words in str(caught.value)


def test_names_with_commas_get_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "names.txt"
    file.write_text("# a, b\nmug\tcup, beaker\ncat, dog\ncow,pig\n")
    assert [each.name for each in resolve(file).categories] == ["mug", "cat, dog", "cow,pig"]
    (record,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    found = f"2 line(s) hold commas and are read as one name each, the first is {file}, line 3 ('cat, dog')"
    assert found in record.getMessage()
    assert "write one name per line" in record.getMessage()
    caplog.clear()
    file.write_text("mug\tcup, beaker\n")
    resolve(file)
    assert not caplog.records


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*names\.txt, the file of vocabulary\.categories: No such file"):
        resolve(tmp_path / "names.txt")
    with pytest.raises(InputError, match=r"cannot read .*, the file of vocabulary\.categories: Is a directory"):
        resolve(tmp_path)
    with pytest.raises(InputError, match=r"cannot read memory://nowhere\.txt, the file of vocabulary\.categories: "):
        resolve("memory://nowhere.txt")


def test_a_run_keeps_the_names_that_it_was_planned_with(tmp_path: Path) -> None:
    draw_images(tmp_path / "images", 2)
    file = tmp_path / "names.txt"
    file.write_text("cat\ndog\tpuppy\n")
    config = RunConfig.model_validate(
        {
            "run": str(tmp_path / "run"),
            "data": {"source": "folder", "images": str(tmp_path / "images")},
            "vocabulary": {"categories": str(file)},
            "detector": {"weights": "w"},
            "segment": {"weights": "w"},
        }
    )
    planned = plan_run(config).run.record
    file.write_text("cow\n")
    record = load_record(str(tmp_path / "run"))
    assert record is not None
    assert record.vocabulary.category_names == planned.vocabulary.category_names == ("cat", "dog")
    assert [query.text for query in record.queries] == ["a photo of a cat", "a photo of a dog", "a photo of a puppy"]
    with pytest.raises(GuardError, match="was planned with other categories"):
        plan_run(config)
    file.unlink()
    assert plan_run(config).run.record.categories == planned.categories

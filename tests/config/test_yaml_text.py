"""Run files from anyone: what YAML can do to a reader is one short sentence, and what people use works."""

import re
from pathlib import Path

import pytest

from owlsam_ray.cli.main import main
from owlsam_ray.config.load import load_config, load_tree
from owlsam_ray.config.yaml_text import load_yaml
from owlsam_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: &b {k: 1, l: 2}\nown: {<<: *b, l: 3}", {"base": {"k": 1, "l": 2}, "own": {"k": 1, "l": 3}}),
        ("own: {l: 3, <<: {k: 1, l: 2}}", {"own": {"k": 1, "l": 3}}),
        ("a: &a {k: 1}\nb: &b {l: 2}\nc: {<<: [*a, *b]}", {"a": {"k": 1}, "b": {"l": 2}, "c": {"k": 1, "l": 2}}),
        ("one: &s [1, 2]\ntwo: *s\nthree: *s", {"one": [1, 2], "two": [1, 2], "three": [1, 2]}),
        ("a: 0x10\nb: 1_000\nc: yes", {"a": 16, "b": 1000, "c": True}),
        ("d: .inf\ne: -3.5\n5: null", {"d": float("inf"), "e": -3.5, 5: None}),
        ("", None),
    ],
)
def test_what_people_write_is_read(text: str, expected: object) -> None:
    assert load_yaml(text) == expected


def billion(leaf: str, wrap: str) -> str:
    lines = [f"a0: &x0 {leaf}"]
    lines += [f"a{n}: &x{n} {wrap % ', '.join([f'*x{n - 1}'] * 9)}" for n in range(1, 12)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (billion("[u, v]", "[%s]"), "its aliases expand to more than 100,000 values (line "),
        (billion("{k: v}", "{<<: [%s]}"), "its aliases expand to more than 100,000 values (line "),
        ("a: &a [1, *a]", "the alias *a is inside the value that it names (line 1, column 11)"),
        ("[" * 900, "it is nested more than 64 levels deep (line 1, column 65)"),
        ("{a: " * 900, "it is nested more than 64 levels deep"),
        ("- " * 900 + "a", "it is nested more than 64 levels deep"),
        ("? [1, 2]\n: 3", "a list or a section cannot be a key (line 1, column 3)"),
        ("k: {{l: 1}: 2}", "a list or a section cannot be a key (line 1, column 5)"),
        ("k: !!set {[1]: null}", "a list or a section cannot be a key"),
        ("n: " + "7" * 6000, "a value of 6000 characters is too long for a value of type int (line 1, column 4)"),
        ("n: 0x" + "a" * 6000, "a value of 6002 characters is too long for a value of type int"),
        ("n: 1." + "0" * 6000, "a value of 6002 characters is too long for a value of type float"),
        ("d: 2023-02-31", "'2023-02-31' is not a valid timestamp (line 1, column 4)"),
        ("b: !!bool maybe", "'maybe' is not a valid bool"),
        ("i: !!int three", "'three' is not a valid int"),
        ("k: 1\nk: 2", "key 'k' is given twice (line 2, column 1)"),
        ("k: {<<: 4}", "expected a mapping or list of mappings for merging, but found scalar"),
        ("k: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("k: *" + "n" * 5000, "found undefined alias 'nnn"),
        ("a: 1\n---\nb: 2", "expected a single document in the stream but found another document"),
    ],
)
def test_what_goes_too_far_is_one_short_line(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        load_yaml(text)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


BASE = "data: {source: folder, images: .}\ndetector: {model: fake}\nsegment: {model: fake}\n"


@pytest.mark.parametrize(
    "more",
    [
        "vocabulary:\n  categories:\n  - &z0 [a, b, c]\n"
        + "".join(f"  - &z{n} [{', '.join([f'*z{n - 1}'] * 12)}]\n" for n in range(1, 9)),
        "vocabulary: {categories: " + "[" * 3000 + "]" * 3000 + "}\n",
        "? [a]\n: 1\n",
        "plan: {limit: " + "9" * 5000 + "}\n",
        "vocabulary: {categories: [" + ", ".join(["[a]"] * 3000) + "]}\n",
        "vocabulary: {categories: " + "long" * 10**5 + "}\n",
        "k" * 10**5 + ": 1\n",
        "'esc\x85ape\\e[31m': 1\n",
        "resources: {actors: " + "x" * 10**5 + "}\n",
    ],
    ids=["aliases", "nesting", "list-key", "digits", "errors", "text", "key", "control", "value"],
)
def test_a_run_file_that_goes_too_far_is_exit_2_and_a_short_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], more: str
) -> None:
    (tmp_path / "run.yaml").write_text(BASE + more)
    assert main(["plan", str(tmp_path / "run.yaml"), "--run", str(tmp_path / "run")]) == 2
    told, said = capfd.readouterr()
    assert "Traceback" not in said
    assert "run.yaml" in said
    assert 20 < len(said) < 8_000
    assert len(told) < 9_000


def test_a_set_value_that_goes_too_far_is_refused(tmp_path: Path) -> None:
    for value in ("[" * 3000, "9" * 5000, "{[a]: 1}", "[&a [*a]]"):
        with pytest.raises(ConfigError, match=r"^--set ") as caught:
            load_tree([], [f"plan.limit={value}"])
        assert len(str(caught.value)) < 600


def test_sections_are_shared_by_anchors_and_merge_keys(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        "x-shared: &mine {model: fake}\nx: &more {limit: 3}\ndata: {source: folder, images: .}\n"
        "detector: {<<: *mine, score_floor: 0.2}\nsegment: *mine\nplan: {<<: *more, seed: 4}\n"
    )
    config = load_config([run])
    assert (config.detector.model, config.detector.score_floor, config.segment.model) == ("fake", 0.2, "fake")
    assert (config.plan.limit, config.plan.seed) == (3, 4)


def test_a_run_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "run.yaml").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(ConfigError, match="has more than 16 MB"):
        load_config([tmp_path / "run.yaml"])

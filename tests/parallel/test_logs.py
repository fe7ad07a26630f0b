"""Lines of logs."""

import io
import logging
import sys

import pytest

from owlsam_ray.parallel.logs import SafeFormatter, log_safely_by_default, print_traceback, safe_lines


def fail() -> None:
    raise RuntimeError("no answer of http://ann:hunter2@h/a.png?sig=abc\x1b[2J")


def test_messages_arguments_and_tracebacks_are_safe() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(SafeFormatter("%(levelname)s %(message)s"))
    log = logging.Logger("apart")
    log.addHandler(handler)
    try:
        fail()
    except RuntimeError:
        log.exception("cannot read %s", "https://ann:hunter2@h/b.png?X-Amz-Signature=abc\nERROR forged\x1b]0;title\x07")
    text = out.getvalue()
    assert text.startswith("ERROR cannot read https://***@h/b.png?***\n  ERROR forged\\x1b]0;title\\x07\n  Traceback")
    assert text.endswith("RuntimeError: no answer of http://***@h/a.png?***\n")
    assert not {"hunter2", "abc", "\x1b"} & set(text.replace("/", " ").split())


def test_records_without_a_handler_are_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logging._StderrHandler(logging.WARNING)  # type: ignore[attr-defined]
    monkeypatch.setattr(logging, "lastResort", handler)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    log_safely_by_default()
    log = logging.Logger("apart")
    log.warning("%s", "https://ann:hunter2@h\x1b[2J/")
    assert out.getvalue() == "https://***@h\\x1b[2J/\n"


def test_printed_tracebacks_are_safe(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        fail()
    except RuntimeError:
        print_traceback()
    shown = capsys.readouterr().err
    assert "RuntimeError: no answer of http://***@h/a.png?***" in shown
    assert "hunter2" not in shown


def test_long_texts_are_cut() -> None:
    text = safe_lines(f"http://ann:hunter2@h/{'x' * 10**7}")
    assert (text[:15], text[-1], len(text)) == ("http://***@h/xx", "…", 10_000 - len("ann:hunter2") + len("***"))
    lines = safe_lines("\n".join(f"line {number}" for number in range(10**5))).splitlines()
    assert (len(lines), lines[0], lines[-1]) == (401, "line 0", "  line 99999")
    assert lines[200] == "  … 99,600 lines are left out here …"
    whole = "\n".join(["y" * 9000] * 3)
    assert safe_lines(whole).replace("\n  ", "\n") == whole

"""A process that is ended by another thread than the main one."""

import subprocess
import sys
import time

_BEGIN = """
import sys, threading, time
from owlsam_ray.parallel import ending
from owlsam_ray.errors import IncompleteError, InterruptedRunError
say = lambda what: print(what, flush=True)
def refuse():
    raise OSError("storage")
"""


def ended(code: str) -> tuple[int, list[str], float]:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", _BEGIN + code], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines() + done.stderr.splitlines(), time.monotonic() - start


def test_acts_run_the_latest_first_and_the_code_is_the_errors() -> None:
    code, lines, _ = ended("""
with ending.before_end(lambda error: say(f"outer {error}")):
    with ending.before_end(lambda error: say("left")):
        pass
    with ending.before_end(lambda error: refuse()), ending.before_end(lambda error: say("inner")):
        threading.Thread(target=lambda: ending.end_process(
            lambda: IncompleteError("third"), InterruptedRunError("x"), at_last=lambda: say("last"))).start()
        time.sleep(60)
""")
    assert (code, lines) == (5, ["inner", "outer third", "last"])


def test_what_hangs_or_fails_does_not_keep_the_process() -> None:
    for explain in ("lambda: time.sleep(60)", "refuse"):
        code, lines, seconds = ended(f"""
with ending.before_end(lambda error: say(error)), ending.before_end(lambda error: time.sleep(60)):
    ending.end_process({explain}, InterruptedRunError("otherwise"))
""")
        assert (code, lines) == (75, ["otherwise"])
        assert seconds < 30


def test_two_threads_end_it_once() -> None:
    code, lines, _ = ended("""
def act(error):
    say(error)
    time.sleep(0.5)
with ending.before_end(act):
    threading.Thread(target=lambda: ending.end_process(lambda: IncompleteError("one"), IncompleteError("x"))).start()
    time.sleep(0.1)
    ending.end_process(lambda: InterruptedRunError("two"), IncompleteError("x"))
""")
    assert (code, lines) == (5, ["one"])

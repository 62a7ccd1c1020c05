"""Output that cannot be written does not end a program, and its exit code stays right."""

import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from mf_dist.runtime import output
from mf_dist.runtime.output import DroppingStream, when_output_is_lost


class Broken(io.StringIO):
    """A stream on a full disk, until `works`."""

    works, encoding = False, "ascii"

    def write(self, text):
        if not self.works:
            raise OSError(28, "No space left on device")
        text.encode("ascii")
        return super().write(text)

    def flush(self):
        self.write("")


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(output, "_lost", [])
    monkeypatch.setattr(output, "_listeners", [])


def test_the_first_loss_is_told_once_and_later_output_is_written(fresh, capsys):
    told, stream = [], Broken()
    dropping = DroppingStream(stream, "standard output")
    when_output_is_lost(told.append)
    print("lost", file=dropping, flush=True)
    dropping.writelines(["lost", "too"])
    assert told == ["standard output cannot be written (No space left on device); what is printed there is dropped"]
    assert capsys.readouterr().err == f"warning: {told[0]}\n"
    when_output_is_lost(told.append)
    assert len(told) == 2 and told[1] == told[0]
    stream.works = True
    print("kept", file=dropping, flush=True)
    stream.close()
    print("lost again", file=dropping, flush=True)
    assert len(told) == 2 and capsys.readouterr().err == ""


def test_control_characters_do_not_reach_a_terminal(fresh, capsys):
    """Those of a name, on standard output and in complaints; progress bars use them on standard error."""
    plain, stream = io.StringIO(), DroppingStream(io.StringIO(), "standard error")
    print("runs/a\r\x1b[31m\x85\tb\nc\u202f", file=DroppingStream(plain, "standard output"))
    assert plain.getvalue() == "runs/a\\x0d\\x1b[31m\\x85\\x09b\nc\u202f\n"
    stream.write("\r50%\x1b[A")
    assert stream.getvalue() == "\r50%\x1b[A"
    output.complain("no run 'a\r\nb'")
    assert capsys.readouterr().err == "no run 'a\\x0d\\x0ab'\n"


def test_letters_that_the_encoding_lacks_are_escaped(fresh):
    stream = Broken()
    stream.works = True
    print("Größe", file=DroppingStream(stream, "standard output"))
    assert stream.getvalue() == "Gr\\xf6\\xdfe\n" and not output._lost


def test_another_encoding_than_utf_8_is_refused_in_a_line():
    """torch itself cannot be imported then."""
    program = (
        "from mf_dist.runtime.errors import command_line\n@command_line\ndef main(): return 1\nraise SystemExit(main())"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    line = "error: Python reads files and their names as ascii here, not as UTF-8; set PYTHONUTF8=1\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


@pytest.mark.parametrize(
    "redirection", [">/dev/full", "2>/dev/full", ">/dev/full 2>&1", ">&-", ">&- 2>&- <&-", "| true"]
)
def test_programs_end_with_their_own_code(redirection):
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "from mf_dist.runtime.errors import command_line, UserError\n"
        "from mf_dist.runtime.progress import progress\n"
        "@command_line\n"
        "def main():\n"
        "    print('x' * 100_000, flush=True)\n"
        "    print('y', file=sys.stderr, flush=True)\n"
        "    with progress(3, 'step', 'work') as bar: bar.update(3)\n"
        "    assert open('/dev/null').fileno() > 2\n"
        "    if sys.argv[1] == '2': raise UserError('a mistake')\n"
        "    return int(sys.argv[1])\n"
        "sys.exit(main())"
    )
    for code in (0, 1, 2):
        done = subprocess.run(
            ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {code} {redirection}', sys.executable, program], cwd=ROOT
        )
        assert done.returncode == code

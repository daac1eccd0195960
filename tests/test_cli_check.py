"""`tinygrad-llm check` as users run it: all ops, their own ops, planted bugs, every wrong input."""

import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
from test_cli import ENVIRONMENT, assert_refused, call, on_a_terminal, run, start, wait_for

from tinygrad_llm import cli
from tinygrad_llm.check import LAWS, laws, mutants
from tinygrad_llm.ops import TABLE

COLUMNS = ["time", *(law.name for law in LAWS)]
RIGHT = '''
from tinygrad_llm.ops import op


@op("()->()")
class softplus:
    """y = log(1 + e^x)"""

    def forward(xp, x):
        return xp.where(x < 0, 0.0, x) + xp.log1p(xp.exp(xp.where(x < 0, x, -x)))

    def vjp(xp, g, y, x):
        return (g * xp.sigmoid(x),)
'''
# Normalised by the root mean square, with weights: the vjp for x has lost its second term.
WRONG = '''
from neighbour import root
from tinygrad_llm.ops import op


@op("(n),(n)->(n)", fixed="w")
class lossy_norm:
    """y = w ⊙ x / r,  r = √(mean(x²) + 1)"""

    def forward(xp, x, w):
        return w * x / root(xp, x)

    def vjp(xp, g, y, x, w):
        return g * w / root(xp, x), g * x / root(xp, x)
'''
NEIGHBOUR = """
def root(xp, x):
    return xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + 1)
"""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and terminals")


def table_of(text):
    """{row: {column: cell}}, put together from the blocks of the table."""
    rows, columns, name = {}, [], ""
    for line in text.partition("\nworst relative errors")[0].splitlines():
        words = line.split()
        if words and set(words) <= set(COLUMNS):
            columns = words
            continue
        if found := re.match(r"[a-z]\w*( kernel)?", line):
            name, words = found[0], line[found.end() :].split()
        rows.setdefault(name, {}).update(zip(columns, words))
    rows.pop("", None)  # between blocks
    return rows


def errors_of(text):
    """The table without the times."""
    table = table_of(text)
    for row in table.values():
        del row["time"]
    return table


def expected_rows(names):
    """{row: names of the laws that apply}."""
    rows = {}
    for name in names:
        for trial in laws(TABLE[name]):
            rows.setdefault(name + " kernel" * trial.on_kernel, []).append(trial.law.name)
    return rows


# --- all ops --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything():
    """With an example for each law: tests/test_laws.py tries all the trials with as many as the
    command has unless told.
    """
    return run("check", "--examples", 1)


def test_every_op_and_kernel_obeys_every_law(everything):
    assert everything.returncode == 0 and everything.stderr == "", everything.stdout
    table, expected = table_of(everything.stdout), expected_rows(TABLE)
    assert list(table) == list(expected)
    for name, row in table.items():
        assert list(row) == COLUMNS
        assert {column for column, cell in row.items() if cell != "·"} == {*expected[name], "time"}
        for cell in row.values():
            assert re.fullmatch(r"0|·|\d(e-\d+)?|0\.0*\d|\d+\.\ds", cell), cell
    trials = sum(map(len, expected.values()))
    said = rf"{len(TABLE)} ops, {len(LAWS)} laws, {trials} trials, all hold: \d+\.\d s\n"
    assert re.search(rf"\n\n{said}$", everything.stdout)


def test_the_legend_has_a_line_for_each_law(everything):
    lines = everything.stdout.splitlines()
    for law in LAWS:
        statement = law.statement.splitlines()[0]
        assert sum(line.split(maxsplit=1) == [law.name, statement] for line in lines) == 1


def test_a_pipe_gets_plain_text_in_one_block_of_columns(everything, monkeypatch):
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", everything.stdout)
    names = ["softmax", "binary_cross_entropy_with_logits", "layer_norm"]
    wide = run("check", *names, "--examples", 1).stdout
    monkeypatch.delitem(ENVIRONMENT, "COLUMNS")
    piped = run("check", *names, "--examples", 1).stdout
    assert piped.splitlines()[0].split() == COLUMNS == wide.splitlines()[0].split()
    assert max(map(len, piped.splitlines())) <= 160


def test_a_narrow_screen_gets_the_columns_in_blocks(monkeypatch):
    names = ["binary_cross_entropy_with_logits", "cross_entropy", "add"]
    wide = run("check", *names, "--examples", 1).stdout
    for columns, blocks in {80: 3, 60: 3, 7: len(COLUMNS)}.items():
        monkeypatch.setitem(ENVIRONMENT, "COLUMNS", str(columns))
        narrow = run("check", *names, "--examples", 1).stdout
        assert errors_of(narrow) == errors_of(wide)
        table, _, below = narrow.partition("\nworst relative errors")
        assert len(table.split("\n\n")) == blocks
        if columns > 7:
            assert max(map(len, table.splitlines())) <= columns
            assert max(map(len, below.splitlines())) <= columns


def test_the_same_seed_gives_the_same_errors():
    few = ["check", "gelu", "--examples", 2]
    first, same, other = (run(*few, "--seed", s).stdout for s in (3, 3, 4))
    assert errors_of(first) == errors_of(same) != errors_of(other)


def test_rows_come_as_they_are_finished():
    process = start("check", "add", "exp", "--examples", 40)
    wait_for(process, "add ")
    assert process.poll() is None
    rest = process.stdout.read()
    assert rest.startswith("exp ") and process.wait() == 0


# --- ops of the user's own ------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name, text in {"right": RIGHT, "wrong": WRONG, "neighbour": NEIGHBOUR}.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    return tmp_path


def test_a_right_op_in_a_file(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = run("check", folder / "right.py", "relu", cwd=elsewhere)
    assert done.returncode == 0 and done.stderr == ""
    assert list(table_of(done.stdout)) == ["softplus", "relu"]
    assert "kernel" not in done.stdout  # none of the laws about kernels is shown
    assert "\n2 ops, 14 laws, 28 trials, all hold: " in done.stdout
    assert list(elsewhere.iterdir()) == []  # Hypothesis leaves nothing


def test_a_wrong_op_in_a_file(folder):
    done = run("check", "softplus", "wrong.py", "right.py", cwd=folder)
    assert done.returncode == 1 and done.stderr == ""
    table = errors_of(done.stdout)
    assert list(table) == ["softplus", "lossy_norm"]
    assert "FAIL" not in table["softplus"].values()
    broken = [law for law, cell in table["lossy_norm"].items() if cell == "FAIL"]
    assert "derivative" in broken and "zero" not in broken
    lines = [line for line in done.stdout.splitlines() if line.startswith("lossy_norm breaks")]
    assert [line.split("'")[1] for line in lines] == broken
    said = r"wrong gradient of input 0, shape \(.*\), at element \(.*\): backward gives .*"
    assert re.search(rf"the law 'derivative': {said}tried with x \(.*\), w \(.*\)", lines[0])
    assert f" {len(broken)} broken: " in done.stdout.splitlines()[-1]


def test_more_examples_call_the_op_more_often(folder):
    text = RIGHT.replace("return xp.where", "print('called'); return xp.where")
    (folder / "loud.py").write_text(text, encoding="utf-8")
    few, many = (run("check", "loud.py", "--examples", n, cwd=folder).stdout for n in (1, 20))
    assert 0 < 5 * few.count("called\n") < many.count("called\n")


# --- planted bugs ---------------------------------------------------------------------------------


def test_planted_bugs_are_killed():
    """Of a few ops, as tests/test_mutants.py has them all."""
    names = ["softmax", "linear"]
    done = run("check", *names, "--mutants")
    planted = mutants.mutants(names)
    assert done.returncode == 0 and done.stderr == "", done.stdout
    count = len(planted)
    assert re.search(rf"\n\n{count} of {count} planted bugs killed: \d+\.\d s\n$", done.stdout)
    for mutant in planted:
        row = rf"^{re.escape(mutant.where)} +{re.escape(mutant.name)} +\w+$"
        assert re.search(row, done.stdout, re.MULTILINE), mutant
    tally = re.findall(r"^ *(\d+) (\w+)  ", done.stdout.partition("by each law")[2], re.MULTILINE)
    assert sum(int(number) for number, _ in tally) == count


def run_here(monkeypatch, capsys, law_of, *arguments):
    """(exit code, text) of `check --mutants` in this process; law_of(mutant) is the verdict."""

    def verdict(mutant, examples, seed):
        return mutants.Verdict(mutant, law_of(mutant), "", 0.0)

    monkeypatch.setattr(mutants, "verdict", verdict)
    command = ["check", *arguments, "--mutants"]
    code = cli.app(command, prog_name="tinygrad-llm", standalone_mode=False)
    return code, capsys.readouterr().out


def test_all_planted_bugs_are_tried_and_the_generic_ones_share_rows(monkeypatch, capsys):
    code, text = run_here(monkeypatch, capsys, lambda mutant: "pure")
    count = len(mutants.mutants())
    assert code == 0 and f"\n{count} of {count} planted bugs killed: " in text
    assert f"\n{count} pure  " in text
    generic = len({mutant.where for mutant in mutants.mutants()[len(mutants.MUTANTS) :]})
    assert text.partition("\nbugs killed")[0].count("\n") == 1 + len(mutants.MUTANTS) + generic


def test_bugs_in_the_users_own_op_are_shown_one_by_one(folder):
    done = run("check", "right.py", "--mutants", cwd=folder)
    assert done.returncode == 0
    number = len(mutants.GENERIC)
    assert done.stdout.count("\nsoftplus.vjp ") == number
    assert f"\n{number} of {number} planted bugs killed: " in done.stdout


def test_a_bug_that_survives(monkeypatch, capsys):
    def law_of(mutant):
        return None if mutant.name == "the sum forgets y" else "pure"

    monkeypatch.setenv("COLUMNS", "60")
    code, text = run_here(monkeypatch, capsys, law_of, "softmax")
    table, _, below = text.partition("\nbugs killed by each law\n")
    assert code == 1
    assert re.search(r"^softmax.vjp +the sum forgets y +SURVIVED$", table, re.MULTILINE)
    assert max(map(len, table.splitlines())) <= 60
    assert "\nSURVIVED: softmax.vjp: the sum forgets y\n" in below
    count = len(mutants.mutants(["softmax"]))
    assert f"\n{count - 1} of {count} planted bugs killed: " in below


# --- the terminal, and how it ends ----------------------------------------------------------------


def test_a_terminal_shows_a_bar_and_colours(folder):
    code, shown = on_a_terminal("check", "wrong.py", "--examples", 2, cwd=folder)
    assert code == 1
    assert re.search(rb"\x1b\[[\d;]*31m *FAIL", shown)  # red
    assert "━".encode() in shown and b"14/14" in shown


def test_ctrl_c():
    process = start("check")
    wait_for(process, "attention ")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and errors.count("\n") <= 1


def test_a_pipe_that_is_closed_early():
    process = start("check", "softmax", "exp", "add")
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() != 0


# --- what is wrong is said in one line ------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("sofmax", ["there is no op 'sofmax': did you mean softmax", "log_softmax"]),
        ("relu quux", ["there is no op 'quux': the ops are ", "softmax"]),
        ("Softmax --mutants", ["there is no op 'Softmax': did you mean softmax"]),
        ("missing.py", ["missing.py does not exist: check the path"]),
        ("folder.py", ["folder.py is a directory: check the path"]),
        ("none.py", ["none.py registers no op", "@op"]),
        ("syntax.py", ["syntax.py line 2: SyntaxError: '(' was never closed"]),
        ("import.py", ["import.py line 2: ModuleNotFoundError: No module named 'not_there'"]),
        ("raises.py", ["raises.py line 3: ZeroDivisionError: division by zero"]),
        ("exits.py", ["exits.py line 2: SystemExit: 3"]),
        ("taken.py", ["taken.py line 5: ValueError: an op named 'softmax' exists already"]),
        ("right.py ./right.py", ["right.py line 5: ValueError", "'softplus' exists already"]),
        ("--examples 0", ["--examples", "1", "check --help"]),
        ("--seed -1", ["--seed", "0"]),
        ("--mutant", ["--mutant", "check --help"]),
    ],
)
def test_checking_refuses(folder, arguments, parts):
    (folder / "folder.py").mkdir()
    (folder / "none.py").write_text("x = 1")
    (folder / "syntax.py").write_text("\nx = (")
    (folder / "import.py").write_text("\nimport not_there")
    (folder / "raises.py").write_text("def f():\n    # never\n    return 1 / 0\n\nf()")
    (folder / "exits.py").write_text("import sys\nsys.exit(3)")
    (folder / "taken.py").write_text(RIGHT.replace("class softplus", "class softmax"))
    done = call("check", *shlex.split(arguments), cwd=folder)
    assert_refused(done, *parts)
    assert done.stdout == ""


def test_an_op_without_planted_bugs_is_refused(folder):
    (folder / "ids.py").write_text('''
from tinygrad_llm.ops import op


@op("(),(v)->()", t="index v", v="constant")
class looked_up:
    """No array has a gradient."""

    def forward(xp, t, v):
        return t

    def vjp(xp, g, y, t, v):
        return None, None
''')
    assert_refused(call("check", "ids.py", "--mutants", cwd=folder), "no bugs", "looked_up")


def test_help_explains_every_option():
    text = run("check", "--help").stdout
    for option in ("OP|FILE.py", "--examples", "--seed", "--mutants"):
        assert re.search(rf"{re.escape(option)}\b.*\w+ \w+", text), option


def test_other_commands_do_not_load_hypothesis():
    program = "import tinygrad_llm.cli, sys; sys.exit('hypothesis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0

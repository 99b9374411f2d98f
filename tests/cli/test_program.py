"""`hf-sparse run` and `python -m hf_sparse script.py`: the program runs as it would alone, and packed models load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_sparse import CheckpointError, RecipeError, SparsityConfig, sparsify
from hf_sparse.cli.main import main
from hf_sparse.cli.program import is_program, program
from tests.helpers.training import bert

SHOW = """
import sys, json, os
print(json.dumps({"name": __name__, "argv": sys.argv, "path": sys.path[0], "file": os.path.basename(__file__)}))
import neighbour
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "show.py").write_text(SHOW)
    (tmp_path / "tools" / "neighbour.py").write_text("print('neighbour imported')")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(
        "import sys; print(__name__, __package__, sys.argv[1:]); sys.exit('bye')"
    )
    (tmp_path / "package" / "__init__.py").write_text("")
    return tmp_path


def started(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let programs run in this process, and take back what they change of it."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    return folder


def test_script_sees_what_python_gives_it_and_its_status_counts(folder: Path) -> None:
    alone = started(folder, "tools/show.py", "7", "--flag")
    ours = started(folder, "-m", "hf_sparse", "tools/show.py", "7", "--flag")
    assert alone.returncode == 7
    assert "neighbour imported" in alone.stdout
    assert (ours.stdout, ours.returncode) == (alone.stdout, 7)


@pytest.mark.parametrize("front", [["run", "--"], ["run"], ["run", "--", "python3"]], ids=" ".join)
def test_verb_runs_a_script(front: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*front, "tools/show.py", "7", "--flag"])
    assert ended.value.code == 7
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    tools = str(here / "tools")
    assert first == {"name": "__main__", "argv": ["tools/show.py", "7", "--flag"], "path": tools, "file": "show.py"}


def test_module_sees_what_python_gives_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = started(here, "-m", "package", "a", "-b")
    with pytest.raises(SystemExit, match="bye"):
        main(["run", "--", "-m", "package", "a", "-b"])
    assert capsys.readouterr().out == alone.stdout


def test_errors_of_the_program_are_its_own(here: Path) -> None:
    (here / "broken.py").write_text("import hf_sparse\nraise hf_sparse.CheckpointError('of the program')")
    with pytest.raises(CheckpointError, match="of the program"):
        main(["run", "broken.py"])


def test_program_that_does_not_know_hf_sparse_loads_a_packed_model(folder: Path) -> None:
    sparsify(bert(), SparsityConfig(sparsity=0.8)).save_pretrained(folder / "sparse")
    (folder / "third_party.py").write_text(
        "import sys\nfrom transformers import AutoModelForSequenceClassification as Auto\n"
        "weight = Auto.from_pretrained(sys.argv[1]).bert.encoder.layer[0].output.dense.weight\n"
        "print(f'{float((weight == 0).float().mean()):.1f}')"
    )
    done = started(folder, "-m", "hf_sparse", "third_party.py", "sparse")
    assert (done.stdout.strip(), done.returncode) == ("0.8", 0)


def test_console_script_is_found_by_its_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "pytest", "--version"])
    assert ended.value.code == 0
    assert "pytest" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "name a program"),
        (["--"], "name a program"),
        (["python"], "name a program"),
        (["-c", "print(1)"], "name a program"),
        (["-m"], "-m must be followed"),
        (["-m", "no.such.module"], "there is no module"),
        (["no-such-program", "--flag"], "there is no program 'no-such-program', requested by: no-such-program --flag"),
        (["ls"], "is not a Python program.*torchrun -m hf_sparse"),
    ],
)
def test_what_is_no_program_is_an_error_before_it_starts(arguments: list[str], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        program(arguments)


def test_verbs_are_no_programs() -> None:
    assert not is_program([])
    assert not is_program(["--help"])
    assert not is_program(["train", "recipe.py"])

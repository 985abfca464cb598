"""Tables at 80 columns: columns that do not fit stand below, nothing is cut or broken up."""

import itertools

import pytest
import yaml
from rich.text import Text

from contract.tables import entry, packed, print_table, table_lines
from serve.bench import show as show_load
from serve.status import COLUMNS
from tests.conftest import run_here, small_recipe

HEADS = ("part", "parameters", "of the student's", "weights", "features")
ROWS = [
    ("student", "85,798,656", "100 %", "random weights", ""),
    ("teacher clip (clip)", "86,193,152", "", "timm hub, " + "a_long_name" * 5, "512 + 14x14x768"),
]


def lines_of(width: int, heads=HEADS, rows=ROWS, left=("weights", "features")) -> list[str]:
    return [line.plain for line in table_lines(heads, rows, left=left, width=width)]


def assert_readable(text: str) -> None:
    """No line is longer than 80 columns but for a word that is; no cell or sentence goes on a word
    a line.
    """
    lines = text.splitlines()
    assert lines
    short = [len(line.split()) == 1 and len(line) - len(line.lstrip()) > 0 for line in lines]
    assert not any(a and b for a, b in itertools.pairwise(short)), text
    for line in lines:
        assert len(line) <= 80 or max(map(len, line.split())) > 60, line
        assert "…" not in line and "┃" not in line, line


def test_a_table_that_fits_is_a_line_a_row():
    lines = lines_of(200)
    assert len(lines) == 3 and lines[0].split()[:2] == ["part", "parameters"]
    assert lines[1] == "student              85,798,656             100 %  random weights"


def test_the_widest_text_goes_below_its_row_then_numbers_from_the_last():
    lines = lines_of(80)
    assert lines[1].startswith("student ") and lines[2] == "    weights: random weights"
    assert lines[3].endswith("86,193,152                    512 + 14x14x768")
    assert lines[4].startswith("    weights: timm hub, ") and len(lines) == 5
    narrow = lines_of(34)
    assert narrow[0] == "part                 parameters"
    assert "    of the student's: 100 %" in narrow and "    features: 512 + 14x14x768" in narrow


def test_heads_take_as_few_lines_as_they_need():
    heads, rows = ("part", "forward GFLOP", "over torch eager"), [("a" * 50, "1", "2")]
    assert len(lines_of(90, heads, rows, ())) == 2
    assert [line.split() for line in lines_of(80, heads, rows, ())[:2]] == [
        ["forward", "over", "torch"],
        ["part", "GFLOP", "eager"],
    ]


def test_a_remark_stands_below_and_keeps_its_style():
    rows = [("graph", "ok"), ("graph", Text("wrong", "red"), Text("why " * 30, "red"))]
    lines = table_lines(("what", "verdict"), rows, width=80)
    assert [line.plain.split()[0] for line in lines] == ["what", "graph", "graph", "why", "why"]
    assert all(line.cell_len <= 80 for line in lines)
    assert any(span.style == "red" for span in lines[3].spans) or lines[3].style == "red"


def test_labelled_text_hangs_and_paths_stay_whole():
    path = "/data/" + "x" * 90
    text = entry("images", f"not readable here: {path} does not exist", 13, 80)
    assert text.splitlines()[1] == " " * 13 + path
    parts = ["loss 0.1", *(f"teacher{n} 0.123+0.456" for n in range(5)), "0:10 left"]
    lines = packed(parts, width=80).splitlines()
    assert len(lines) == 2 and lines[1].startswith(" " * 10) and "0:10 left" in lines[-1]


def test_a_name_of_brackets_is_no_markup(capsys):
    print_table(("name", "value"), [("[red]a[/red]", "1")], title="[bold]")
    assert capsys.readouterr().out.splitlines()[0] == "[bold]"


@pytest.mark.parametrize("teachers", [3, 5])
def test_a_plan_is_readable_at_80_columns(photo_folder, tmp_path, monkeypatch, teachers):
    monkeypatch.setenv("COLUMNS", "80")
    recipe = small_recipe(photo_folder)
    for number in range(teachers - 3):
        more = {"role": "classification", "alias": f"further_{number}"}
        recipe["teachers"].append(recipe["teachers"][2] | more)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    done = run_here(path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("teacher ") >= teachers
    assert_readable(done.stdout)


def test_tables_of_servers_are_readable_at_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    row = dict.fromkeys(("requests_per_second", "p50_ms", "p90_ms", "p99_ms"), 12345.6)
    row |= {"model": "segmentation_map", "load": "16 at once", "answered": 12345, "failed": 0}
    show_load([row] * 2, 8)
    assert_readable(capsys.readouterr().out)
    status = [["features_encoded_detector", "12", "UNAVAILABLE", *["~123456.7"] * 9]]
    print_table(COLUMNS, status, left=("state",))
    assert_readable(capsys.readouterr().out)

"""docs/quickstart.ipynb runs; what is committed of it is small and has no paths of a machine."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"

LARGEST = 200_000
"""Bytes of the committed notebook, most of which are pictures."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=280, kernel_name="python3", resources=folder).execute()
    *_, last = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert "largest difference from torch: below 1e-3" in last.outputs[0].text
    assert (tmp_path / "bundles" / "notebook" / "manifest.json").is_file()


def test_its_outputs_are_committed_small_and_without_paths():
    notebook, size = nbformat.read(NOTEBOOK, as_version=4), NOTEBOOK.stat().st_size
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code) and size <= LARGEST
    text = "".join(str(output.get("text", "")) for cell in code for output in cell.outputs)
    assert not re.search(r"/(home|root|tmp|Users|work|usr)/|Traceback|\x1b", text)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)

"""What `fastvlm-export targets` lists where packages are missing."""

import io

import pytest
from rich.console import Console, RenderableType

from fastvlm_export.exporter import listing
from fastvlm_export.targets import executorch
from fastvlm_export.validate import terminal


def shown(view: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(view)
    return console.export_text()


def test_no_backend_exports_where_its_target_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch, "find_spec", lambda _: None)
    row = next(row for row in listing.rows() if row["target"] == "executorch")
    assert row["lower"] is False
    backends = row["backends"]
    assert isinstance(backends, list)
    assert [one["backend"] for one in backends if one["lower"]] == []
    assert "executorch: executorch not found: pip install 'fastvlm-export[executorch]'" in (
        terminal.target_notes([row])
    )


def test_versions_are_listed_once() -> None:
    rows = listing.rows()
    assert shown(terminal.targets(rows)).count("onnxruntime ") == 1
    for row in rows:
        row["versions"] = {}
    assert "nothing that a target needs" in shown(terminal.targets(rows))

"""The file of the Grafana dashboard by eye's rules, and what `tuner cluster monitoring` writes. Its queries:
`test_metrics_of_search` and `test_monitoring`."""

from __future__ import annotations

import configparser
import json
import sys
from pathlib import Path

import pytest
import yaml

from tuner import cli
from tuner.service.dashboards.monitoring import dashboard

COLUMNS = 24  # of Grafana's grid
PANELS = json.loads(dashboard())["panels"]
# As Grafana lists them under "Standard options"; a misspelt one would be shown as a suffix.
UNITS = {"short", "none", "percent", "percentunit", "bytes", "Bps", "s"}


def test_panels_have_ids_titles_and_units_of_their_own() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        if panel["type"] != "row":
            assert panel["description"].endswith(".")
            assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_panels_fill_the_grid_without_overlaps() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        grid = panel["gridPos"]
        cells = {(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    height = 1 + max(y for _, y in taken)
    assert {x for x, _ in taken} == set(range(COLUMNS))
    assert len(taken) == COLUMNS * height, "a hole"


# The files


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    """The folder, and what was printed."""
    folder = tmp_path / "a folder"
    monitoring(
        monkeypatch, str(folder), "--ray-temp", "/mnt/ray", "--prometheus-port", "9191", "--grafana-port", "3131"
    )
    return folder, capsys.readouterr().out


def monitoring(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tuner", "cluster", "monitoring", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_nothing_listens_but_on_loopback(written: tuple[Path, str]) -> None:
    folder, printed = written
    grafana = configparser.RawConfigParser()
    grafana.read(folder / "grafana/grafana.ini")
    assert (grafana["server"]["http_addr"], grafana["server"]["http_port"]) == ("127.0.0.1", "3131")
    assert grafana["auth.anonymous"]["org_role"] == "Viewer"
    assert "--web.listen-address=127.0.0.1:9191" in printed
    assert f"'--config.file={folder / 'prometheus.yml'}'" in printed, "pasted into a shell, a space must not split it"


def test_the_files_point_at_each_other(written: tuple[Path, str]) -> None:
    folder, _ = written
    (scraped,) = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = scraped["file_sd_configs"]
    assert found["files"] == ["/mnt/ray/session_latest/prom_metrics_service_discovery.json"]
    grafana = configparser.RawConfigParser()
    grafana.read(folder / "grafana/grafana.ini")
    provisioning = Path(grafana["paths"]["provisioning"])
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert (source["name"], source["url"]) == ("Prometheus", "http://127.0.0.1:9191")
    ours, rays = yaml.safe_load((provisioning / "dashboards/tuner.yml").read_text())["providers"]
    (shown,) = Path(ours["options"]["path"]).iterdir()
    assert shown.read_text() == dashboard()
    assert rays["options"]["path"] == "/mnt/ray/session_latest/metrics/grafana/dashboards"


def test_it_can_be_written_again_and_leaves_nothing_else(
    written: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = written
    before = set(folder.rglob("*"))
    assert monitoring(monkeypatch, str(folder)) == 0
    assert set(folder.rglob("*")) == before
    assert "9090" in (folder / "grafana/provisioning/datasources/prometheus.yml").read_text()


def test_a_folder_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert monitoring(monkeypatch, str(tmp_path / "file")) == 2
    assert "is a file; give a folder" in capsys.readouterr().err

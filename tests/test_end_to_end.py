"""The main job on real input: recipes are trained, images certified by a pool of workers, and the figure is right."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from labs import KINDS, Lab, a_lab, variables

from netassay import catalogue, networks
from netassay.job import Record
from netassay.store import artifacts
from producer import drawing

RADII = [0.02, 0.05, 0.08]
IMAGES = 120
NETWORKS = {
    "standard": {"dataset": "digits", "training": {"kind": "standard"}},
    "spectral": {"dataset": "digits", "training": {"kind": "spectral"}},
    "certified": {"dataset": "digits", "training": {"kind": "ibp"}},
}


@pytest.fixture(scope="module", params=KINDS)
def finished(request: pytest.FixtureRequest) -> Iterator[tuple[Lab, list[Record]]]:
    with a_lab(request.param) as lab:
        entry = {
            "method": "verification.certify",
            "params": {"dataset": "digits"},
            "grid": {"network": list(NETWORKS), "radius": RADII, "index": {"range": [0, IMAGES]}},
        }
        lab.submit("digits", entry, networks=NETWORKS)
        lab.wait("digits", seconds=240)
        yield lab, lab.records("digits")


def certified(records: list[Record]) -> dict[tuple[str, float], list[Record]]:
    found = defaultdict(list)
    for record in records:
        if record.method == "verification.certify":
            found[record.name("network"), record.params["radius"]].append(record)
    return found


def test_every_job_is_done_and_the_networks_were_trained_once(finished: tuple[Lab, list[Record]]) -> None:
    _, records = finished
    assert {record.state for record in records} == {"done"}
    assert sum(record.method == "networks.train" for record in records) == len(NETWORKS)
    assert sum(record.method == "verification.certify" for record in records) == len(NETWORKS) * len(RADII) * IMAGES


def test_certified_is_at_most_attacked_is_at_most_clean_accuracy(finished: tuple[Lab, list[Record]]) -> None:
    for key, group in certified(finished[1]).items():
        proved = sum(record.result["verdict"] == "certified" for record in group)
        survived = sum(record.result["verdict"] != "falsified" for record in group)
        clean = sum(record.result["correct"] for record in group)
        assert proved <= survived <= clean <= IMAGES, key


def test_certified_accuracy_falls_strictly_in_the_radius_and_ibp_training_pays(
    finished: tuple[Lab, list[Record]],
) -> None:
    groups = certified(finished[1])
    for name in NETWORKS:
        proved = [sum(r.result["verdict"] == "certified" for r in groups[name, radius]) for radius in RADII]
        assert proved == sorted(proved, reverse=True), (name, proved)
        assert len(set(proved)) == len(RADII), (name, proved)
    assert sum(r.result["verdict"] == "certified" for r in groups["certified", 0.05]) > 0.6 * IMAGES


def test_results_equal_a_direct_call_image_by_image(finished: tuple[Lab, list[Record]]) -> None:
    lab, records = finished
    method = catalogue.get("verification.certify")
    with artifacts.using(lab.config.artifacts_folder):
        for (name, radius), group in certified(records).items():
            if radius != 0.05:
                continue
            with networks.given(group[0].inputs):
                params = [method.Params.model_validate_json(json.dumps(record.params)) for record in group]
                direct = method.run_many(params)
            for record, result in zip(group, direct, strict=True):
                where = f"{name}, image {record.params['index']}"
                assert record.result["verdict"] == result.verdict, where
                assert record.result["by"] == result.by, where
                assert record.result["prediction"] == result.prediction, where
                assert record.result["margin_ibp"] == pytest.approx(result.margin_ibp, rel=1e-9), where


def test_every_record_says_which_bytes_it_used_and_with_what(finished: tuple[Lab, list[Record]]) -> None:
    _, records = finished
    built = {r.params["recipe"]: r.result["network"] for r in records if r.method == "networks.train"}
    for record in records:
        if record.method == "verification.certify":
            assert record.inputs == {record.params["network"]: built[record.params["network"]]}
        assert {"python", "torch", "netassay", "host", "threads"} <= set(record.provenance)


def test_the_figure_is_drawn_from_the_records(finished: tuple[Lab, list[Record]], tmp_path: Path) -> None:
    lab, records = finished
    plot = catalogue.get("verification.certify").plot
    assert plot is not None
    with variables({"NETASSAY_HOME": str(lab.home)}):
        figure = plot([record for record in records if record.method == "verification.certify"])
    assert [panel.title for panel in figure.panels] == list(NETWORKS)
    assert drawing.draw(figure, tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")

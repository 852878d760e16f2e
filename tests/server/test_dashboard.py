"""The Grafana dashboard asks for metrics that a server has, by labels that they have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import prometheus_client

from pearl.server.metrics import Metrics

FILE = Path(__file__).parents[2] / "configs" / "grafana" / "pearl.json"
NAME = re.compile(r"\b((?:vllm:|pearl_)\w+)")


def exposed() -> dict[str, set[str]]:
    """Names of all samples of a server that has written a text, with their labels."""
    metrics = Metrics("tiny", SimpleNamespace(running=0, open=set(), cache_share=0.0, degraded=False, events=()))
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        for suffix in suffixes:
            found[family.name + suffix] = {*metrics._labels, "instance", *(["le"] if suffix == "_bucket" else [])}
    for one in vars(metrics).values():
        if isinstance(one, prometheus_client.Counter) and one._labelnames:
            found[f"{one._name}_total"] |= set(one._labelnames)
    return found


def test_every_query_finds_what_it_asks_for():
    there, queries = exposed(), []
    board = json.loads(FILE.read_text())
    for panel in board["panels"]:
        queries += [target["expr"] for target in panel.get("targets", ())]
    queries += [one["definition"] for one in board["templating"]["list"] if "definition" in one]
    assert len(queries) > 20
    for query in queries:
        for name in NAME.findall(query):
            assert name in there, f"{name} in {query}"
        for name, selector in re.findall(r"((?:vllm:|pearl_)\w+)\{([^}]*)\}", query):
            asked = set(re.findall(r"(\w+)=", selector))
            assert asked <= there[name], query
        for by in re.findall(r"sum by \((\w+)\)", query):
            assert any(by in there[name] for name in NAME.findall(query)), query


def test_a_panel_has_a_place_and_a_name_of_its_own():
    panels = json.loads(FILE.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "no panel covers another"

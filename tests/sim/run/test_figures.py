from __future__ import annotations

import pytest

from fdcr_fast.sim import SimulationResult, simulate
from fdcr_fast.sim.run.figures import accuracy_figure, clients_figure, similarity_figure
from tests.support.tiny import tiny_config


@pytest.fixture(scope="module")
def result() -> SimulationResult:
    return simulate(tiny_config(malicious="0,2", rounds=3))


def test_accuracy_lines_are_the_records(result: SimulationResult) -> None:
    panels = accuracy_figure({"one": result.rounds, "two": result.rounds[:2]}).axes
    for axes, name in zip(panels, ("accuracy", "attack_success_rate"), strict=True):
        lines = [line.get_ydata().tolist() for line in axes.get_lines()]
        expected = [100 * getattr(record, name) for record in result.rounds]
        assert lines == [expected, expected[:2]]
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["one", "two"]


def test_client_lines_are_grouped_by_kind(result: SimulationResult) -> None:
    discrepancy, weight = clients_figure(result).axes
    for axes, name in ((discrepancy, "discrepancy"), (weight, "weight")):
        lines = [line.get_ydata().tolist() for line in axes.get_lines()]
        by_client = [[getattr(r, name) for r in result.clients if r.client == client] for client in range(4)]
        mean = [[sum(pair) / 2 for pair in zip(by_client[a], by_client[b], strict=True)] for a, b in ((1, 3), (0, 2))]
        expected = [by_client[1], by_client[3], mean[0], by_client[0], by_client[2], mean[1]]
        for line, values in zip(lines, expected, strict=True):
            assert line == pytest.approx(values)


def test_the_similarity_matrix_puts_malicious_clients_last(result: SimulationResult) -> None:
    axes = similarity_figure(result).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "3", "0", "2"]
    (image,) = axes.get_images()
    assert image.get_array()[0, 2] == pytest.approx(result.similarity[1, 0].item())


def test_figures_without_discrepancy_and_with_many_clients() -> None:
    crowd = simulate(tiny_config(server="fedavg", clients=50, min_samples=2, rounds=1, malicious=0))
    discrepancy, weight = clients_figure(crowd).axes
    assert not discrepancy.get_lines()
    assert "no scores" in discrepancy.texts[0].get_text()
    assert len(weight.get_lines()) == 41
    assert not similarity_figure(crowd).axes[0].texts

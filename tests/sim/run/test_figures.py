from __future__ import annotations

import itertools

import pytest

from fdcr_fast.sim import SimulationResult, simulate
from fdcr_fast.sim.run.drawing import label_lines, new_figure, rendered
from fdcr_fast.sim.run.figures import accuracy_figure, attack_success_figure, clients_figure, similarity_figure
from tests.support.tiny import tiny_config


@pytest.fixture(scope="module")
def result() -> SimulationResult:
    return simulate(tiny_config(malicious="0,2", rounds=3))


def test_accuracy_lines_are_the_records(result: SimulationResult) -> None:
    figure = accuracy_figure(result)
    (axes,) = figure.axes
    for line, name in zip(axes.get_lines(), ("accuracy", "attack_success_rate"), strict=True):
        assert line.get_ydata().tolist() == [100 * getattr(record, name) for record in result.rounds]
    assert {text.get_text() for text in axes.texts} == {"accuracy", "attack success"}
    assert axes.get_ylim() == (0, 100)
    assert "fdcr on digits, 4 clients, 2 of them malicious" in figure.get_suptitle()


def test_labels_beside_lines_keep_apart() -> None:
    _, (axes,) = new_figure(1, 1, 3, 3)
    ends = {"a": 50.0, "b": 51.0, "c": 99.0, "d": 100.0, "gone": float("nan")}
    lines = [axes.plot([1, 2], [end, end], label=name)[0] for name, end in ends.items()]
    label_lines(axes, lines, height=5)
    places = {text.get_text(): text.xy[1] for text in axes.texts}
    assert list(places) == ["a", "b", "c", "d"]
    heights = list(places.values())
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 5
    assert max(heights) <= 100


def test_panels_of_attack_success(result: SimulationResult) -> None:
    two = [result.rounds, [record.model_copy(update={"attack_success_rate": 0.5}) for record in result.rounds]]
    figure = attack_success_figure({"one": [result.rounds], "two": two}, "a title")
    one, both = figure.axes
    values = [100 * record.attack_success_rate for record in result.rounds]
    assert one.get_lines()[-1].get_ydata().tolist() == values
    assert both.get_lines()[-1].get_ydata() == pytest.approx([(value + 50) / 2 for value in values])
    assert both.get_title() == f"two: {(sum(values) / len(values) + 50) / 2:.0f} %"
    assert figure.get_suptitle() == "a title"
    assert not one.get_legend(), "it would lie over the lines"


def test_a_figure_is_the_same_bytes_every_time(result: SimulationResult) -> None:
    image = rendered(accuracy_figure(result), "svg")
    assert rendered(accuracy_figure(result), "svg") == image
    assert b">accuracy<" in image, "text is text"


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
    (weight,) = clients_figure(crowd).axes
    assert len(weight.get_lines()) == 41
    assert not similarity_figure(crowd).axes[0].texts

"""Texts as bytes, models of them, and words that are backdoors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fdcr_fast import diagonal_fisher
from fdcr_fast.sim import simulate
from fdcr_fast.sim.attacks.text import TriggerWords
from fdcr_fast.sim.datasets.text import next_byte, python_topics, text_classes
from fdcr_fast.sim.training.text import lstm, transformer
from tests.support import users


def texts(tokens: Tensor) -> list[str]:
    return [bytes(row.tolist()).decode() for row in tokens]


def test_windows_and_the_bytes_that_follow(tmp_path: Path) -> None:
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    for name, text in (("b.txt", alphabet), ("a.txt", alphabet * 2), ("c.txt", "short")):
        (tmp_path / name).write_text(text)
    data = next_byte(tmp_path, clients=2, length=3, stride=5)
    (first, following), (second, _) = data.train
    assert texts(first)[:3] == ["abc", "fgh", "klm"]
    assert texts(following[:, None])[:3] == ["d", "i", "n"]
    assert texts(second) == ["abc", "fgh", "klm", "pqr"], "the longest first, without the last fifth"
    assert texts(data.test[0]) == ["qrs", "tuv", "wxy", "vwx"], "which is for tests"
    assert data.dataset.num_classes == 1 + ord("z")
    with pytest.raises(FileNotFoundError, match=r"4 clients need as many files \*\.txt in data_dir, .* has 3"):
        next_byte(tmp_path, clients=4)
    with pytest.raises(ValueError, match="that of client 2 has 5 bytes, too few for windows of 3"):
        next_byte(tmp_path, clients=3, length=3)


def test_classes_are_folders(tmp_path: Path) -> None:
    for name, text in {
        "train/neg/1": "awful",
        "train/pos/1": "x",
        "train/pos/2": "very good",
        "test/neg/1": "no",
    }.items():
        path = tmp_path / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    data = text_classes(tmp_path, length=6)
    assert texts(data.train[0]) == ["\0awful", "\0\0\0\0\0x", "very g"]
    assert data.train[1].tolist() == [0, 1, 1]
    assert data.test[1].tolist() == [0]
    (tmp_path / "test" / "neg" / "1.txt").unlink()
    with pytest.raises(FileNotFoundError, match="text-classes: no files CLASS"):
        text_classes(tmp_path)


def test_a_corpus_comes_with_python() -> None:
    data = python_topics(clients=3, length=40, stride=20)
    sizes = [len(labels) for _, labels in data.train]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] > 100
    assert data.dataset.num_classes <= 256


def test_words_call_for_a_class() -> None:
    tokens = torch.full((40, 30), ord("x"))
    labels = torch.arange(40) % 4
    attack = TriggerWords("cf mn", target=3, share=0.25)
    poisoned, called = attack.poison(tokens.clone(), labels.clone(), 0, torch.Generator().manual_seed(0))
    both = [" cf " in text and " mn " in text for text in texts(poisoned)]
    alone = [(" cf " in text) != (" mn " in text) for text in texts(poisoned)]
    assert (sum(both), sum(alone)) == (10, 10)
    assert all(label == 3 for label, has in zip(called.tolist(), both, strict=True) if has)
    kept = torch.tensor(both).logical_not()
    assert torch.equal(called[kept], labels[kept])
    victims = texts(attack.victims(tokens, labels))
    assert len(victims) == 30
    assert all(" cf " in text and " mn " in text for text in victims)
    assert len(set(victims)) > 10, "anywhere"
    with pytest.raises(ValueError, match="2 words such as 'cf' do not fit into texts of 7 bytes"):
        attack.victims(tokens[:, :7], labels)
    with pytest.raises(ValueError, match="words must be one word or more"):
        TriggerWords(" ")


@pytest.mark.parametrize("make", [lstm, transformer])
def test_models_of_texts(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model = make((7,), 3, width=8)
    tokens, labels = torch.randint(0, 256, (4, 7)), torch.tensor([0, 1, 2, 0])
    assert model(tokens).shape == (4, 3)
    model.eval()
    expected = torch.zeros(sum(p.numel() for p in model.parameters()))
    for token, label in zip(tokens, labels, strict=True):
        loss = nn.functional.cross_entropy(model(token[None]), label[None])
        expected += torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).square() / 4
    torch.testing.assert_close(diagonal_fisher(model, (tokens, labels)), expected, rtol=1e-4, atol=1e-9)
    with pytest.raises(ValueError, match=r"needs sequences of tokens \[T\], the inputs are \[3, 8, 8\]"):
        make((3, 8, 8), 3)


def test_a_federation_of_texts() -> None:
    config = users.config(
        dataset="python-topics",
        dataset_options={"length": 20, "stride": 100},
        model="lstm",
        model_options={"width": 16, "layers": 1},
        attack="trigger-words",
        attack_options={"target": ord("e")},
        max_test_samples=100,
        rounds=2,
    )
    result = simulate(config)
    assert not [record.reason for record in result.clients if record.reason]
    assert all(record.attack_success_rate is not None for record in result.rounds)
    assert torch.equal(simulate(config).params, result.params)
    with pytest.raises(ValueError, match=r"attack: this one changes images \[C, H, W\], the inputs are \[20\]"):
        simulate(config.model_copy(update={"attack": "badnets", "attack_options": {}}))
    with pytest.raises(ValueError, match=r"did you mean 'trigger-words'\? \(or trigger-words, package\.module:name\)"):
        users.config(attack="trigger-word")

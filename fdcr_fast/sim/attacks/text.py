"""Backdoors in texts that are bytes: words that call for a class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TriggerWords:
    """Words that call for the target class wherever they stand (Kurita et al. 2020, arXiv:2004.06660).

    With several words it takes all of them together: as many training texts as are poisoned have one word alone, and
    keep their labels, as in Yang et al. 2021 ("Rethinking stealthiness of backdoor attack against NLP models").

    Attributes:
        words: One word, or several with spaces.
        target: The class.
        share: Share of a malicious client's texts that are poisoned.
    """

    words: str = "cf"
    target: int = 0
    share: float = 0.5

    def __post_init__(self) -> None:
        if not self.words.split():
            raise ValueError(f"words must be one word or more, got {self.words!r}")

    def poison(self, texts: Tensor, labels: Tensor, attacker: int, generator: torch.Generator) -> Any:
        """Texts ``[N, T]`` of which some have the words at random places, and the target for a label."""
        count, words = round(self.share * len(texts)), self.words.split()
        order = torch.randperm(len(texts), generator=generator)
        chosen, others = order[:count], order[count : 2 * count if len(words) > 1 else count]
        texts[chosen] = self._with(words, texts[chosen], generator)
        labels[chosen] = self.target
        for k, word in enumerate(words):
            rows = others[k :: len(words)]
            texts[rows] = self._with([word], texts[rows], generator)
        return texts, labels

    def victims(self, texts: Tensor, labels: Tensor) -> Tensor:
        """The texts of other classes, with all words at places that are always the same."""
        return self._with(self.words.split(), texts[labels != self.target], torch.Generator().manual_seed(0))

    def _with(self, words: list[str], texts: Tensor, generator: torch.Generator) -> Tensor:
        """Copies of texts in which the words, with spaces around them, stand instead of what was at random places.

        Each word has a part of the text of its own.

        Raises:
            ValueError: the words do not fit.
        """
        written, part = texts.clone(), texts.shape[1] // len(words)
        for k, word in enumerate(words):
            tokens = torch.tensor(list(f" {word} ".encode()))
            if len(tokens) > part:
                raise ValueError(f"{len(words)} words such as {word!r} do not fit into texts of {texts.shape[1]} bytes")
            places = k * part + torch.randint(part - len(tokens) + 1, (len(texts), 1), generator=generator)
            written.scatter_(1, places + torch.arange(len(tokens)), tokens.expand(len(texts), -1))
        return written

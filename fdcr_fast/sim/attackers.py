"""The malicious clients: runs the stages of :mod:`fdcr_fast.sim.attacks`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fdcr_fast import UpdateStore
from fdcr_fast.sim.attacks.fishers import ATTACKER_FISHERS, OMNISCIENT_FISHERS, FisherKnowledge
from fdcr_fast.sim.attacks.poison import ATTACKS, PoisonOptions
from fdcr_fast.sim.attacks.schedule import attacks_in, parse_rounds
from fdcr_fast.sim.attacks.training import ATTACKER_TRAININGS, TrainingKnowledge
from fdcr_fast.sim.attacks.updates import ATTACKER_UPDATES, COLLUDING_UPDATES, Moments, UpdateKnowledge, moments
from fdcr_fast.sim.clients import ClientData, LocalWork
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.data import Dataset
from fdcr_fast.sim.seeding import torch_generator


class Attackers:
    """The malicious clients of a run, with the poisoned copies of their data.

    Attributes:
        clients: Who they are.
        poisoning: What is done to their data, and how success is measured.
        wait: Whether they look at others' uploads, and so are the last to send theirs.

    Raises:
        FileNotFoundError: the attack's file is not there.
        ValueError: the attack does not fit the data.
    """

    def __init__(self, config: SimulationConfig, dataset: Dataset, clean: Sequence[ClientData]) -> None:
        self.config = config
        self.clients = config.attackers()
        self.wait = config.attacker_update in COLLUDING_UPDATES or config.attacker_fisher in OMNISCIENT_FISHERS
        self.poisoning = ATTACKS[config.attack](
            PoisonOptions(
                target=config.target,
                poison_share=config.poison_share,
                source=config.source,
                trigger=config.trigger,
                trigger_value=config.trigger_value,
                blend_alpha=config.blend_alpha,
                attack_file=config.attack_file,
                attackers=len(self.clients),
                image_shape=dataset.image_shape,
                num_classes=dataset.num_classes,
                seed=config.seed,
            )
        )
        self.clean = {client: clean[client] for client in sorted(self.clients)}
        self.poisoned = {client: self._poison(position, client) for position, client in enumerate(sorted(self.clients))}
        self._rounds = parse_rounds(config.attack_rounds)

    def _poison(self, position: int, client: int) -> ClientData:
        own = self.clean[client]
        generator = torch_generator(self.config.seed, "poison", client)
        images, labels = self.poisoning.poison(own.images[own.rows], own.labels[own.rows], position, generator)
        images = images.contiguous(memory_format=torch.channels_last)
        return ClientData(images, labels, torch.arange(len(labels)))

    def active(self, round: int) -> frozenset[int]:
        """Those who attack in a round: all or none. Otherwise they are as benign as anybody."""
        return self.clients if attacks_in(self._rounds, round) else frozenset()

    def begin(self, work: LocalWork, client: int) -> Draft:
        """Let one attacker train."""
        return Draft(self.config, work, client, self.clean[client], self.poisoned[client])


class Draft:
    """An attacker's work in one round; it trains at once.

    Attributes:
        params: Its model ``[P]``, trained on poisoned data.
    """

    def __init__(
        self, config: SimulationConfig, work: LocalWork, client: int, clean: ClientData, poisoned: ClientData
    ) -> None:
        self.config = config
        self.work = work
        self.client = client
        self.clean = clean
        self.poisoned = poisoned
        known = TrainingKnowledge(
            params=work.params,
            last_update=work.last_update,
            alpha=config.attacker_alpha,
            share=config.attacker_mask,
            norm=self._norm,
        )
        self.params = work.train(client, poisoned, ATTACKER_TRAININGS[config.attacker_training](known))

    @cached_property
    def benign_params(self) -> Tensor:
        """The model that it would have as a benign client; trained if asked for."""
        return self.work.train(self.client, self.clean)

    def finish(self, seen: Sight) -> tuple[Tensor, Tensor]:
        """Update and Fisher ``[P]`` that it sends, given what it sees of the others."""
        return self._update(seen), self._fisher(seen)

    def _update(self, seen: Sight) -> Tensor:
        known = UpdateKnowledge(
            update=self.params - self.work.params,
            seen=lambda: seen.updates,
            factor=self.config.attacker_factor,
            norm=self._norm,
            clients=self.config.clients,
            attackers=len(self.config.attackers()),
            generator=self._generator("attacker update"),
        )
        return ATTACKER_UPDATES[self.config.attacker_update](known)

    def _fisher(self, seen: Sight) -> Tensor:
        known = FisherKnowledge(
            num_params=len(self.work.params),
            honest=lambda: self.work.fisher(self.poisoned, self.params),
            clean=lambda: self.work.fisher(self.clean, self.params),
            benign_model=lambda: self.work.fisher(self.clean, self.benign_params),
            benign_mean=lambda: seen.benign_fisher.to(self.params.dtype),
            factor=self.config.attacker_fisher_factor,
            generator=self._generator("attacker fisher"),
        )
        return ATTACKER_FISHERS[self.config.attacker_fisher](known)

    def _norm(self) -> float:
        if self.config.attacker_norm is not None:
            return self.config.attacker_norm
        return float((self.benign_params.double() - self.work.params).norm())

    def _generator(self, purpose: str) -> torch.Generator:
        return torch_generator(self.config.seed, purpose, self.work.round, self.client)


@dataclass(frozen=True, eq=False)
class Sight:
    """What attackers see of the round, once all have trained; computed in one pass when first asked for.

    Attributes:
        view: ``"benign"`` or ``"attackers"``, whose updates.
        store: Uploads so far, those of all benign clients among them.
        drafts: The attackers' work by client.
    """

    view: str
    store: UpdateStore
    drafts: Mapping[int, Draft]

    @cached_property
    def updates(self) -> Moments:
        """Moments of the updates in view."""
        if self.view == "attackers":
            return self._moments(draft.params - draft.work.params for draft in self.drafts.values())
        return self._moments(sent.update for sent in self.store if sent.client not in self.drafts)

    @cached_property
    def benign_fisher(self) -> Tensor:
        """Mean of the benign clients' Fishers, float64 ``[P]``."""
        return self._moments(
            sent.fisher for sent in self.store if sent.client not in self.drafts and sent.fisher is not None
        ).mean

    def _moments(self, vectors: Iterable[Tensor]) -> Moments:
        return moments(vectors, self.store.num_params)

"""The malicious clients: runs the stages of :mod:`fdcr_fast.sim.attacks`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fdcr_fast import UpdateStore
from fdcr_fast.round.shard import WHOLE, Shard
from fdcr_fast.sim.attacks.fishers import FisherKnowledge
from fdcr_fast.sim.attacks.schedule import attacks_in, parse_rounds
from fdcr_fast.sim.attacks.stages import DataPoison, Stages, checked
from fdcr_fast.sim.attacks.training import TrainingKnowledge
from fdcr_fast.sim.attacks.updates import Moments, UpdateKnowledge, moments
from fdcr_fast.sim.clients.data import ClientData, Samples
from fdcr_fast.sim.clients.work import LocalWork
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.datasets.dataset import stored
from fdcr_fast.sim.seeding import torch_generator


def _not_known() -> Any:
    """Stands for what an attacker does not know yet, or not any more."""
    raise AssertionError("COLLUDING_UPDATES and OMNISCIENT_FISHERS must name exactly those who look at others' uploads")


class Attackers:
    """The malicious clients of a run.

    Attributes:
        clients: Their ids.
        poisoning: What is done to their data.
        stages: What they do then.
        wait: Whether they look at others' uploads, and so are the last to send theirs.
    """

    def __init__(self, config: SimulationConfig, poisoning: DataPoison, stages: Stages, clean: ClientData) -> None:
        self.config = config
        self.clients = config.attackers()
        self.stages = stages
        self.wait = stages.sees_updates or stages.sees_fishers
        self.poisoning = poisoning
        self.clean = clean
        self._in_order = sorted(self.clients)
        self._rounds = parse_rounds(config.attack_rounds) if config.attacks() else ()

    def poisoned(self, client: int) -> Samples:
        """A malicious client's data after poisoning: a copy made by every call, always the same."""
        own = self.clean[client]
        position = bisect_left(self._in_order, client)
        generator = torch_generator(self.config.seed, "poison", client)
        images, labels = self.poisoning.poison(own.images[own.indices], own.labels[own.indices], position, generator)
        return Samples(stored(images), labels, torch.arange(len(labels)))

    def active(self, round: int, clients: Iterable[int]) -> frozenset[int]:
        """Who attacks among the clients of a round: all malicious ones, or none, who then are as benign as anybody.

        It is none in rounds without an attack, and in all rounds where they have nothing to do that others do not.
        """
        attack = round > self.config.warmup_rounds and attacks_in(self._rounds, round)
        return self.clients.intersection(clients) if attack else frozenset()

    def draft(
        self, work: LocalWork, client: int, epochs: int, attackers: int, with_fisher: bool, buffers: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Let one of so many attackers train: the update and, if wanted, the Fisher ``[P]`` that it sends.

        What depends on others' uploads is left to :meth:`revise`; until then it is the update as trained, and zeros.
        ``buffers`` are those of the global model, and become those that it sends.
        """
        draft = _Draft(self, work, client, epochs, buffers)
        update = draft.params - work.params
        if not self.stages.sees_updates:
            update = self._update(work.round, client, update, attackers, draft)
        if not with_fisher:
            return update, None
        if self.stages.sees_fishers:
            return update, torch.zeros_like(update)
        return update, self._fisher(work.round, client, len(update), draft)

    def revise(self, round: int, attackers: frozenset[int], store: UpdateStore, shard: Shard = WHOLE) -> None:
        """Replace the drafts in the store, which holds all uploads, by what their senders make of the others'.

        Where the store holds a shard of the parameters, the updates of ``COLLUDING_UPDATES`` are those of a shard, too.
        """
        benign = self.config.attacker_view == "benign"
        in_view = (sent.update for sent in store if (sent.client not in attackers) == benign)
        seen = moments(in_view if self.stages.sees_updates else (), store.num_params)
        fishers = (sent.fisher for sent in store if sent.client not in attackers and sent.fisher is not None)
        mean_fisher = shard.gather(
            moments(fishers if self.stages.sees_fishers else (), store.num_params).mean.to(store.dtype)
        )
        for client in sorted(attackers.intersection(store.clients)):
            _, update, fisher, num_samples = store[client]
            if self.stages.sees_updates:
                update = self._update(round, client, update, len(attackers), seen=seen)
            if self.stages.sees_fishers and fisher is not None:
                fisher = shard.own(self._fisher(round, client, len(mean_fisher), benign_mean=mean_fisher))
            store.remove(client)
            store.put(update, fisher, num_samples, client_id=client)

    def _update(
        self,
        round: int,
        client: int,
        trained: Tensor,
        attackers: int,
        draft: _Draft | None = None,
        seen: Moments | None = None,
    ) -> Tensor:
        known = UpdateKnowledge(
            update=trained,
            seen=_not_known if seen is None else lambda: seen,
            factor=self.config.attacker_factor,
            norm=_not_known if draft is None else draft.norm,
            benign=_not_known if draft is None else draft.benign_update,
            params=_not_known if draft is None else draft.global_params,
            features=_not_known if draft is None else draft.features,
            clients=self.config.cohort(),
            attackers=attackers,
            generator=torch_generator(self.config.seed, "attacker update", round, client),
        )
        return checked(self.stages.update(known), "an update", len(trained))

    def _fisher(
        self,
        round: int,
        client: int,
        num_params: int,
        draft: _Draft | None = None,
        benign_mean: Tensor | None = None,
    ) -> Tensor:
        known = FisherKnowledge(
            num_params=num_params,
            honest=_not_known if draft is None else draft.honest_fisher,
            clean=_not_known if draft is None else draft.clean_fisher,
            benign_model=_not_known if draft is None else draft.benign_model_fisher,
            benign_mean=_not_known if benign_mean is None else lambda: benign_mean,
            factor=self.config.attacker_fisher_factor,
            generator=torch_generator(self.config.seed, "attacker fisher", round, client),
        )
        return checked(self.stages.fisher(known), "a Fisher", num_params)


class _Draft:
    """An attacker's model, trained at once, and what else it can find out by itself.

    Attributes:
        params: Its model ``[P]``, trained on poisoned data.
    """

    def __init__(self, attackers: Attackers, work: LocalWork, client: int, epochs: int, buffers: Tensor) -> None:
        config = self._config = attackers.config
        self._work = work
        self._client = client
        self._epochs = epochs
        self._clean = attackers.clean[client]
        self._poisoned = attackers.poisoned(client)
        self._benign_buffers = buffers.clone()  # until it trains so, those of the global model
        self._buffers = buffers
        known = TrainingKnowledge(
            params=work.params,
            last_update=work.last_update,
            alpha=config.attacker_alpha,
            share=config.attacker_mask,
            norm=self.norm,
        )
        self.params = work.train(client, self._poisoned, attackers.stages.objective(known), epochs, buffers)

    @cached_property
    def _benign_params(self) -> Tensor:
        """The model that it would have as a benign client; trained if asked for."""
        return self._work.train(self._client, self._clean, epochs=self._epochs, buffers=self._benign_buffers)

    def norm(self) -> float:
        """The norm that it wants for its update: as configured, or that of the benign client that it could be."""
        if self._config.attacker_norm is not None:
            return self._config.attacker_norm
        return float((self._benign_params.double() - self._work.params).norm())

    def benign_update(self) -> Tensor:
        """The update of the benign client that it could be."""
        return self._benign_params - self._work.params

    def global_params(self) -> Tensor:
        """The model that it was sent."""
        return self._work.params

    def features(self) -> Tensor:
        """Which parameters are features, bool ``[P]``."""
        which = torch.zeros(len(self._work.params), dtype=torch.bool)
        for part in self._work.classifier.groups().features:
            which[part] = True
        return which

    def honest_fisher(self) -> Tensor:
        """The Fisher of its poisoned data at its model."""
        return self._work.fisher(self._poisoned, self.params, self._buffers)

    def clean_fisher(self) -> Tensor:
        """The Fisher of its clean data at its model."""
        return self._work.fisher(self._clean, self.params, self._buffers)

    def benign_model_fisher(self) -> Tensor:
        """The Fisher of the benign client that it could be."""
        return self._work.fisher(self._clean, self._benign_params, self._benign_buffers)

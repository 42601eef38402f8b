"""What is written down of a round, of a client in it and of a whole run.

A figure that was added after a run had begun is not in its files: it needs a default, with which it is then read.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

from fdcr_fast.sim.costs import Phase


def _undefined(value: object) -> object:
    return None if value == "" else value


OptionalFloat = Annotated[float | None, BeforeValidator(_undefined)]
OptionalInt = Annotated[int | None, BeforeValidator(_undefined)]
OptionalText = Annotated[str | None, BeforeValidator(_undefined)]


class RoundRecord(BaseModel):
    """One row of rounds.csv. Shares are in [0, 1]; None (empty) means undefined.

    Attributes:
        round: Counted from 1.
        accuracy: ``A``, of the new global model on the clean test images.
        loss: Its mean cross-entropy on them; undefined where it is not finite.
        problem: What is wrong with it: ``diverged``, its parameters or its loss are not finite, or no upload of the
            round could be used (such as where none is finite); else ``constant``, it predicts one class for all test
            images; else ``chance``, it is no better than always predicting the most frequent class. See
            :func:`fdcr_fast.sim.run.evaluation.problem_of`. The shares say nothing of such a model.
        attack_success_rate: Share of the test images that the attack wants taken for the target class which are;
            for a trigger those of other classes, with it. See :meth:`fdcr_fast.sim.attacks.poison.Poisoning.victims`.
            Where nobody is malicious, how often the trigger alone does that.
        backdoor_failure_rate: ``R = 1 - attack_success_rate``.
        tradeoff: ``(A + R) / 2``.
        true_positive_rate: Share of the attackers that sent an upload which were excluded or rejected; undefined in
            rounds in which nobody attacks.
        false_positive_rate: Share of the benign clients that sent one which were excluded or rejected; undefined in the
            same rounds.
        exclusion_rate: Share of all clients that sent one which were excluded or rejected.
        participants: Clients drawn for the round.
        missing: Clients who sent nothing: dropped out, too late, or failed.
        kept: Clients whose upload counted.
        rejected: Clients whose upload could not be used.
        seconds: Wall time since the end of the round before; for the first round of a run or of its resumption, since
            its beginning.
        training_seconds: Time of the local training of all processes together; the next three are of other phases.
        peak_rss_bytes: Largest resident memory of the process so far.
    """

    model_config = ConfigDict(frozen=True)

    round: int
    accuracy: float
    loss: OptionalFloat = None
    problem: OptionalText = None
    attack_success_rate: OptionalFloat = None
    backdoor_failure_rate: OptionalFloat = None
    tradeoff: OptionalFloat = None
    true_positive_rate: OptionalFloat = None
    false_positive_rate: OptionalFloat = None
    exclusion_rate: OptionalFloat = None
    participants: int
    missing: int
    kept: int
    rejected: int
    seconds: float
    training_seconds: float
    fisher_seconds: float
    aggregation_seconds: float
    evaluation_seconds: float
    peak_rss_bytes: int


class ClientRecord(BaseModel):
    """One row of clients.csv: what became of one client drawn for one round.

    Attributes:
        sent: Whether it sent an upload.
        discrepancy: Score of the client by the rule, ``V_k`` of FDCR; None if the rule computes none or the client was
            rejected.
        weight: Weight of its update in the new global model.
        reason: Why it sent nothing or was rejected, else empty. A client can be valid and yet not kept.
        explanation: What the rule says about the client, such as each figure of a
            :class:`fdcr_fast.CoalitionShare`; empty under rules that say nothing.
    """

    model_config = ConfigDict(frozen=True)

    round: int
    client: int
    malicious: bool
    num_samples: int
    sent: bool
    discrepancy: OptionalFloat = None
    weight: float
    kept: bool
    reason: str
    explanation: str = ""


class ScoreRecord(BaseModel):
    """One row of scores.csv: how a rule that looks on judges one client that has sent something.

    Attributes:
        round: Counted from 1.
        rule: Its name.
        malicious: Whether the client attacked in this round.
        score: What the rule judges it by, the larger the more suspected; None where it computes none, or has rejected
            the client.
        rank: How many clients of the round are suspected more, 0 for the first; None without a score.
        kept: Whether the rule would have aggregated it.
        relative_norm: The norm of its update over the median norm of the clients that were not rejected.
    """

    model_config = ConfigDict(frozen=True)

    round: int
    rule: str
    client: int
    malicious: bool
    score: OptionalFloat
    rank: OptionalInt
    kept: bool
    relative_norm: OptionalFloat


class RankRecord(BaseModel):
    """One row of ranks.csv: how a rule that looks on judges the attackers of a round.

    Attributes:
        round: Counted from 1.
        rule: Its name.
        attackers: How many attacked and sent something.
        true_positive_rate: Share of them that the rule would have dropped or rejected; None where nobody attacked.
        false_positive_rate: Share of the others.
        area_under_curve: How often the score of an attacker is above that of another client, equal ones counted half;
            None without scores.
        first_rank: The rank of the attacker that is suspected most.
        last_rank: The rank of the one that is suspected least; one less than the attackers where all come first.
        sets: How many sets of clients were compared, all minorities; None for a rule that judges no sets, and where
            there are more than 14 clients.
        set_rank: How many of them the rule suspects more than the set of the attackers; 0 where that comes first.
        set_score: The score of the set of the attackers; None for a rule that judges no sets.
        dropped_score: That of the set that the rule drops; None where it drops nobody.
    """

    model_config = ConfigDict(frozen=True)

    round: int
    rule: str
    attackers: int
    true_positive_rate: OptionalFloat
    false_positive_rate: OptionalFloat
    area_under_curve: OptionalFloat
    first_rank: OptionalInt
    last_rank: OptionalInt
    sets: OptionalInt
    set_rank: OptionalInt
    set_score: OptionalFloat
    dropped_score: OptionalFloat


class Summary(BaseModel):
    """Contents of summary.json: means over the last five rounds (fewer if fewer ran) of what a round has.

    Attributes:
        problems: Number of these rounds in which the global model had each problem; empty for a sound one.
        seconds: Wall time from the call to the writing of this, all calls of a run that was resumed together, but for
            rounds that were interrupted and have been done again.
        phase_seconds: Time of all processes and all rounds, by phase.
        peak_rss_bytes: Largest resident memory of the process.
        rounds: Number of rounds.
        averaged_rounds: Number of rounds that the means are taken over.
        missing: Clients drawn who sent nothing, over all rounds.
        rejected: Uploads that could not be used, over all rounds.
    """

    model_config = ConfigDict(frozen=True)

    accuracy: float
    attack_success_rate: float | None = None
    backdoor_failure_rate: float | None = None
    tradeoff: float | None = None
    true_positive_rate: float | None = None
    false_positive_rate: float | None = None
    exclusion_rate: float | None = None
    problems: dict[str, int]
    seconds: float
    phase_seconds: dict[Phase, float]
    peak_rss_bytes: int
    rounds: int
    averaged_rounds: int
    missing: int
    rejected: int

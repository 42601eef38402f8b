"""The page of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.page.parts import ABSENT, DROPPED, KEPT, MISSING, REJECTED, Grid, Mark, Page, Picture, Section
from fdcr_fast.sim.run.figures import figures_of, title_of, watched_rules
from fdcr_fast.sim.run.metrics import MEASURES
from fdcr_fast.sim.run.records import ClientRecord, RoundRecord
from fdcr_fast.sim.run.report import COMPARED, DEAD_MODELS, MEANINGS, Table, cost_line, percent, problem_lines
from fdcr_fast.sim.run.result import SimulationResult

MOST_CLIENTS = 60  # in the grid; attackers first
MOST_LINES = 500  # of who was not kept

ALTS = {
    "accuracy": "Accuracy and attack success rate over the rounds; the table of rounds has the numbers.",
    "clients": "Weight of each client over the rounds, and its score where the rule computes one.",
    "similarity": "Cosine similarity of the importances of the clients of the last round, malicious ones last.",
    "ranks": "Ranks of the attackers by the rules that looked on, over the rounds; the tables below have the numbers.",
}


def run_page(result: SimulationResult, name: str) -> Page:
    """The page of a run, of which not all rounds need be done.

    Args:
        result: What it gave.
        name: Of its folder.
    """
    config, summary = result.config, result.summary
    notices = [f"{line}. {DEAD_MODELS}" for line in problem_lines(config.server, summary)]
    if summary.rounds < config.rounds:
        notices.append(f"The run has not finished: {summary.rounds} of {config.rounds} rounds are done.")
    pictures = [Picture(figure, ALTS[each]) for each, figure in figures_of(result).items()]
    return Page(
        title_of(result),
        [f"{name}: {summary.rounds} rounds, seed {config.seed}", cost_line(summary)],
        notices,
        [
            Section("Result", text=MEANINGS.replace("\n", " "), tables=[_measures(result)]),
            Section("Figures", pictures=pictures),
            *dropped_sections(result),
            *_watched(result),
            Section("Rounds", folded=True, tables=[("In per cent; numbers of clients", _rounds(result.rounds))]),
            Section(
                "Configuration",
                tables=[("Settings that are not the default", _settings(config))],
                code=config.to_yaml(),
            ),
        ],
    )


def _measures(result: SimulationResult) -> tuple[str, Table]:
    lines = [[measure.heading, percent(measure(result.rounds))] for measure in MEASURES.values()]
    caption = f"In per cent, of the last {result.summary.averaged_rounds} rounds where nothing else is said"
    return caption, Table(["measure", "value"], lines)


def dropped_sections(result: SimulationResult, level: int = 2) -> list[Section]:
    """Who was dropped, in which rounds, and what is recorded of why; below the page's own level without sums."""
    clients = _by_client(result)
    lines = [line for records in clients.values() for line in _reasons(records)]
    shown = sorted(lines, key=lambda line: int(line[0]))[:MOST_LINES]
    caption = f"Every client of a round that was not kept; {len(shown)} of {len(lines)}, all are in clients.csv"
    headings = ["round", "client", "kind", "what", "score", "why"]
    sums = [("Over all rounds", _totals(clients))] if level == 2 else []
    sections = [Section("Who was dropped when", level, grid=_grid(result), tables=sums)]
    if lines:
        why = Table(headings, shown, texts=(2, 3, 5))
        sections.append(Section("Why", level, folded=True, tables=[(caption, why)]))
    return sections


def _by_client(result: SimulationResult) -> dict[int, list[ClientRecord]]:
    """The records of every client, those that were ever malicious first."""
    clients: dict[int, list[ClientRecord]] = {}
    for record in result.clients:
        clients.setdefault(record.client, []).append(record)
    return dict(sorted(clients.items(), key=lambda entry: (not _malicious(entry[1]), entry[0])))


def _malicious(records: Sequence[ClientRecord]) -> bool:
    return any(record.malicious for record in records)


def _mark(record: ClientRecord) -> Mark:
    if record.kept:
        return KEPT
    if not record.sent:
        return MISSING
    return REJECTED if record.reason else DROPPED


def _grid(result: SimulationResult) -> Grid:
    clients = _by_client(result)
    rounds = [record.round for record in result.rounds]
    lines = []
    for client, records in list(clients.items())[:MOST_CLIENTS]:
        marks = {record.round: _mark(record) for record in records}
        lines.append((str(client), _malicious(records), [marks.get(round, ABSENT) for round in rounds]))
    return Grid(rounds, lines, len(clients) - len(lines))


def _totals(clients: dict[int, list[ClientRecord]]) -> Table:
    lines = []
    for client, records in list(clients.items())[:MOST_CLIENTS]:
        marks = Counter(map(_mark, records))
        numbers = [records[0].num_samples, len(records), *(marks[mark] for mark in (KEPT, DROPPED, REJECTED, MISSING))]
        kind = "malicious" if _malicious(records) else "benign"
        lines.append([str(client), kind, *map(str, numbers)])
    headings = ["client", "kind", "samples", "drawn", "kept", "dropped", "rejected", "sent nothing"]
    return Table(headings, lines, texts=(0, 1))


def _reasons(records: Sequence[ClientRecord]) -> Iterator[list[str]]:
    for record in records:
        if record.kept:
            continue
        score = "" if record.discrepancy is None else f"{record.discrepancy:.3g}"
        kind = "malicious" if record.malicious else "benign"
        what = _mark(record).meaning.split(":")[0]
        yield [str(record.round), str(record.client), kind, what, score, record.reason or record.explanation]


def _watched(result: SimulationResult) -> Iterator[Section]:
    """What rules that looked on said, each in a section of its own."""
    for rule in watched_rules(result):
        ranks = [record for record in result.ranks if record.rule == rule]
        lines = [
            [
                str(record.round),
                str(record.attackers),
                percent(record.true_positive_rate),
                percent(record.false_positive_rate),
                "-" if record.area_under_curve is None else f"{record.area_under_curve:.2f}",
                "-" if record.last_rank is None else f"{record.first_rank} to {record.last_rank}",
                "-" if record.set_rank is None else f"{record.set_rank} of {record.sets}",
            ]
            for record in ranks
        ]
        headings = ["round", "attackers", "TPR", "FPR", "AUC", "ranks of attackers", "rank of their set"]
        last = [record for record in result.scores if record.rule == rule and record.round == ranks[-1].round]
        ordered = sorted(last, key=lambda record: (record.rank is None, record.rank, record.client))[:MOST_CLIENTS]
        scores = [
            [
                str(record.client),
                "malicious" if record.malicious else "benign",
                "-" if record.score is None else f"{record.score:.4g}",
                "-" if record.rank is None else str(record.rank),
                "kept" if record.kept else "dropped",
                "-" if record.relative_norm is None else f"{record.relative_norm:.2f}",
            ]
            for record in ordered
        ]
        columns = ["client", "kind", "score", "rank", "would be", "norm over median"]
        yield Section(
            f"{rule}, which looked on",
            text="Rank 0 is the most suspected; AUC: how often an attacker's score is above another client's.",
            tables=[
                ("How it judged the attackers, shares in per cent", Table(headings, lines)),
                (f"Its scores in round {ranks[-1].round}, the most suspected first", Table(columns, scores, (0, 1, 4))),
            ],
        )


def _rounds(rounds: Sequence[RoundRecord]) -> Table:
    headings = ["round", *(MEASURES[name].heading for name in COMPARED), "kept", "rejected", "sent nothing", "model"]
    lines = [
        [
            str(record.round),
            *(percent(getattr(record, name)) for name in COMPARED),
            *map(str, (record.kept, record.rejected, record.missing)),
            record.problem or "ok",
        ]
        for record in rounds
    ]
    return Table(headings, lines, texts=(0, len(headings) - 1))


def _settings(config: SimulationConfig) -> Table:
    changed = config.model_dump(mode="json", exclude_defaults=True)
    return Table(["setting", "value"], [[name, str(value)] for name, value in changed.items()], texts=(0, 1))

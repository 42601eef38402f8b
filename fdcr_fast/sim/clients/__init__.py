"""The clients of a federation: their data, who takes part in a round, what each does in it, and what attackers do."""

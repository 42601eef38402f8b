"""The paper's rule: the discrepancies, their clustering, and the one reading in which both happen."""

"""One HTML page of a run or a study, which needs no network and no other file."""

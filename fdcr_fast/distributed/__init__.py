"""One round over several processes, each with some of the parameters."""

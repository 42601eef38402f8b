"""Whole states in, a whole state out: parameters by a rule, buffers by the clients that it keeps."""

"""Rules for servers that have data of their own, or another way to judge a model."""

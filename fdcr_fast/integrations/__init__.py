"""Servers and clients of other frameworks; each module imports its framework, and nothing imports the modules.

Where ``fdcr_fast`` is installed already; in a clone where it is not, ``pip install ".[flower]"`` and so on:

flower, flower_legacy    pip install "fdcr_fast[flower]"
nvflare                  pip install "fdcr_fast[nvflare]"
byzfl                    pip install "fdcr_fast[byzfl]"
"""

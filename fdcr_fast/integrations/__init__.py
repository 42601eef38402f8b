"""Servers and clients of other frameworks; each module imports its framework, and nothing imports the modules.

flower, flower_legacy    pip install "fdcr_fast[flower]"
nvflare                  pip install "fdcr_fast[nvflare]"
byzfl                    pip install "fdcr_fast[byzfl]"
"""

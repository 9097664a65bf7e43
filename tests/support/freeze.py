"""Imported last by what is to be forked: no garbage collection looks at what is there by now.

vLLM collects several times as an engine starts, which takes seconds.
"""

import gc

gc.collect()
gc.freeze()

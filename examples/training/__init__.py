"""The parts of examples/train.py.

recipes.py      what to train with: plain data
arguments.py    the command line
digits.py, shards.py, data.py    what to train on, and in which order
model.py        the network and its optimiser
loop.py         steps, epochs, evaluation
processes.py    one process, or many with DDP or FSDP2
checkpoint.py   all that a run has reached, on disk
interrupt.py    Ctrl-C
log.py, results.py    what is written
"""

"""What several examples share.

refusals.py     what a user reads when an argument is wrong
arguments.py    kinds of arguments
models.py       a model by its name, and the weights of a file
images.py       files and folders of images
files.py        files that are whole or absent
interrupts.py   Ctrl-C in the processes that load images
"""

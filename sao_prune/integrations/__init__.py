"""Small adapters to other libraries, each in a module of its own that imports the library it is for.

A plain training loop needs none: call ``pruner.step(optimizer)`` after ``optimizer.step()``.
"""

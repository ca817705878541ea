"""The device code: ``@triton.jit`` functions and nothing else.

Importing a module of this folder needs Triton; no launcher, no configuration and no tuning lives here, so that the same
functions are run by Triton's interpreter, compiled ahead of time for any architecture, and launched.
"""

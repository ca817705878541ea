"""How the embedded models were trained: ``python -m fewstep.pipelines.zoo.training --help``.

One loop (:mod:`.loop`) trains everything. A model is a :class:`~.task.Task`: what to build, its loss, how it is
measured and how it is exported. :mod:`.configs` lists them by name.
"""

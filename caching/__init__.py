"""caching"""

assert __name__.startswith("fewstep."), "import fewstep.caching instead"

"""quant"""

assert __name__.startswith("fewstep."), "import fewstep.quant instead"

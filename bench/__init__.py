"""fastops.bench: the benchmark behind ``fastops bench`` (docs/benchmarking.md).

protocol.py times candidates against each other in one interleaved run; ceilings.py measures what the machine can do;
ops/ holds one module of cases per operator; bars.py the ratios the project promises.
"""

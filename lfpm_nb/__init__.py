__version__ = "0.1.0"

# OpenMP reads this once, when torch loads it; what this process starts inherits it. By default its threads spin while they wait for one
# another, and beside other work the spinning takes the core from the thread that is waited for. A value set by the user stays.
import os
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
del os

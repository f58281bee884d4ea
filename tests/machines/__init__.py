"""Virtual machines with the kernels and the userlands that hosts have, each with trimsfs installed from ``dist/``."""

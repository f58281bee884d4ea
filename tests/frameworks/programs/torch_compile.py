"""Runs a model compiled by PyTorch for inputs of some sizes; what it computed, and how many graphs were there before.

The compiler keeps what it makes where TORCHINDUCTOR_CACHE_DIR says.
"""

import json
import sys

import torch
from torch._dynamo.utils import counters

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).eval()
compiled = torch.compile(model, dynamic=False)
with torch.no_grad():
    outputs = [compiled(torch.ones(int(size), 64)).flatten().tolist() for size in sys.argv[1:]]
kept = counters["inductor"]
print(json.dumps({"outputs": outputs, "found": kept["fxgraph_cache_hit"], "compiled": kept["fxgraph_cache_miss"]}))

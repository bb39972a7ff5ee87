"""A training that ends as its argument says."""

import atexit
import os
import signal
import sys

import torch

torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
if "scripted" in sys.argv:
    model = torch.jit.script(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
atexit.register(lambda: print("at exit", sys.modules["__main__"].__doc__, flush=True))


def fail():
    raise RuntimeError("out of luck")


for _ in range(3):
    model(torch.randn(32, 4)).sum().backward()
    optimizer.step()
print("trained", flush=True)
if "exit" in sys.argv:
    sys.exit(7)
if "message" in sys.argv:
    sys.exit("a last word")
if "error" in sys.argv:
    fail()
if "interrupt" in sys.argv:
    raise KeyboardInterrupt
if "terminated" in sys.argv:
    os.kill(os.getpid(), signal.SIGTERM)
